"""What a training step needs on a GPU with the usual stack: transformers, PEFT and bitsandbytes on torch, computing in
bfloat16 with fused attention.

Everything is derived from the libraries' code and nothing is fitted to measurements. What cannot be known beforehand
has three values: low, expected, high. There are three tiers, each part of the next, and each measured by another tool:

    allocated     tensors: torch.cuda.max_memory_allocated()
    reserved      and what torch's allocator holds beyond them: torch.cuda.max_memory_reserved()
    process       and the CUDA context: nvidia-smi
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checks import SWITCH, check, one_of, whole
from ..config import Config
from ..lora_config import LoraConfig
from ..quantization import quantized_nbytes
from .models import adapter_size, linear_sizes, parameter_count
from .setup import METHODS
from .tape import Run, model_keeps

TIERS = ("allocated", "reserved", "process")
OPTIMIZERS = ("adamw32", "adamw8bit", "paged")
DTYPES = {"bfloat16": 2, "float32": 4}

# What the process holds besides tensors, in bytes: low, expected, high.
CUBLAS = (8_519_680, 8_519_680, 2 * 32 * 2**20)
CUBLAS_SOURCE = (
    "torch's CublasHandlePool.cpp: 4096 KiB twice and 16 KiB eight times; on Hopper 32 MiB, and 32 MiB for cuBLASLt "
    "(pytorch #120925)"
)
CONTEXT = (287_047_680, 400_000_000, 666_632_192)
CONTEXT_SOURCE = (
    "pytorch #86509: 287,047,680 bytes with kernels loaded lazily, 666,632,192 without; about 400 MB: #109888"
)
FRAGMENTATION = (0.0, 0.15, 0.33)  # of what is reserved
FRAGMENTATION_SOURCE = (
    "GMLake (arXiv 2401.08156): 15 % of what is reserved, up to 33 %, over eight LLMs; none with expandable_segments"
)


class Range(NamedTuple):
    """Bytes: the least, what to expect, the most."""

    low: float
    expected: float
    high: float

    def __add__(self, other: object) -> Range:
        assert isinstance(other, Range)
        return Range(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Line:
    """A part of the estimate: its tier, category, formula and bytes. source: the library's file, issue or paper that
    it is taken from."""

    tier: str
    category: str
    what: str
    formula: str
    nbytes: Range
    source: str = ""


@dataclass(frozen=True)
class Estimate:
    """The lines at the moment when most is held, and {moment: bytes expected to be allocated} of all moments."""

    lines: tuple[Line, ...]
    moment: str
    moments: dict[str, float]

    def total(self, tier: str = "process") -> Range:
        """The sum up to and including a tier. Raises ValueError for an unknown one."""
        check("tier", tier, one_of(TIERS))
        within = TIERS[: TIERS.index(tier) + 1]
        return sum((line.nbytes for line in self.lines if line.tier in within), Range(0, 0, 0))


@dataclass(frozen=True)
class StackSetup:
    """A training step with the usual stack. The fields that `Setup` has too mean the same.

    optimizer: "adamw32" is torch's AdamW, whose moments have the dtype of what is trained; "adamw8bit" and "paged" (in
    32 bits) are bitsandbytes'. autocast: as under Trainer with bf16=True. holds_output: the loop has the model's output
    in a variable during the backward, which Trainer has not. adapter_dtype: PEFT makes adapters float32
    (autocast_adapter_dtype). base_dtype: of weights that are not quantised. upcast: those are cast to float32, as
    `prepare_model_for_kbit_training` does. loss_chunks: into how many parts the logits are cut; 1 as transformers
    computes them, more for Liger's fused loss or torchtune's.

    Raises ValueError that begins with the field at fault.
    """

    config: Config
    method: str = "qlora"
    batch: int = 1
    seq: int = 512
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16))
    double_quant: bool = True
    recompute: bool = False
    optimizer: str = "adamw32"
    autocast: bool = True
    holds_output: bool = False
    adapter_dtype: str = "float32"
    base_dtype: str = "bfloat16"
    upcast: bool = False
    loss_chunks: int = 1

    def __post_init__(self) -> None:
        check("method", self.method, one_of(METHODS))
        check("optimizer", self.optimizer, one_of(OPTIMIZERS))
        for name in ("batch", "seq", "loss_chunks"):
            check(name, getattr(self, name), whole(1))
        for name in ("double_quant", "recompute", "autocast", "holds_output", "upcast"):
            check(name, getattr(self, name), SWITCH)
        for name in ("adapter_dtype", "base_dtype"):
            check(name, getattr(self, name), one_of(tuple(DTYPES)))
        if self.config.architecture.layernorm:
            raise ValueError(f"config: expected a model with RMSNorm, got {self.config.model_type}")
        if self.method != "full" and (self.lora.dora or self.lora.layers is not None):
            raise ValueError("lora: expected the same adapter on all layers, without DoRA")

    @property
    def run(self) -> Run:
        """How its layers are run."""
        names = [] if self.method == "full" else self.lora.matches(self.config.linears())
        return Run(
            self.batch * self.seq,
            self.method == "full",
            {name.rpartition(".")[2]: self.lora.rank_of(name) for name in names},
            self.lora.dropout > 0,
            4 if self.upcast else DTYPES[self.base_dtype],
            DTYPES[self.adapter_dtype],
            self.method == "qlora",
            self.autocast,
        )

    @property
    def trained(self) -> tuple[int, int]:
        """How many parameters are trained, and the bytes of each."""
        if self.method == "full":
            return parameter_count(self.config), self.run.weight
        return adapter_size(self.config, self.lora), self.run.adapter


def estimate(setup: StackSetup) -> Estimate:
    """The memory of a step of `setup`, line by line, at the moment when most is expected to be held.

    >>> from refqlora.memory.models import model_config
    >>> found = estimate(StackSetup(model_config("llama-3.1-8b"), "qlora", seq=2048, recompute=True))
    >>> found.moment, round(found.total("allocated").expected / 1e9, 1)
    ('the loss', 9.9)
    """
    held, moments = list(_held(setup)), {}
    for name, moment in _MOMENTS.items():
        moments[name] = list(moment(setup))
    sums = {name: sum(line.nbytes.expected for line in (*held, *lines)) for name, lines in moments.items()}
    most = max(sums, key=lambda name: sums[name])
    lines = [*held, *moments[most]]
    allocated = Estimate(tuple(lines), most, sums).total("allocated")
    wasted = Range(*(n * f / (1 - f) for n, f in zip(allocated, FRAGMENTATION, strict=True)))
    lines.append(
        Line("reserved", "allocator", "free, but in pieces", "allocated · f / (1 - f)", wasted, FRAGMENTATION_SOURCE)
    )
    lines.append(Line("process", "context", "driver and kernels", "", Range(*CONTEXT), CONTEXT_SOURCE))
    return Estimate(tuple(lines), most, sums)


def _line(
    category: str,
    what: str,
    formula: str,
    nbytes: float,
    low: float | None = None,
    high: float | None = None,
    source: str = "",
) -> Line:
    """Of a tensor. `low` and `high` are `nbytes` unless given."""
    values = Range(nbytes if low is None else low, nbytes, nbytes if high is None else high)
    return Line("allocated", category, what, formula, values, source)


# ---- held all the time -----------------------------------------------------------------------------------------


def _held(setup: StackSetup) -> Iterator[Line]:
    c, w = setup.config, setup.run.weight
    sizes, table = linear_sizes(c), c.vocab_size * c.hidden_size
    n, rest = sum(sizes), parameter_count(c) - sum(sizes) - table * (1 if c.tied else 2)
    upcast = "PEFT, utils/other.py, prepare_model_for_kbit_training" if setup.upcast else ""
    yield _line("embeddings", "of the tokens", f"{w} · V D", w * table, source=upcast)
    if not c.tied:
        yield _line("head", "of the logits", f"{w} · V D", w * table, source=upcast)
    yield _line("norms", "their weights, and biases", f"{w} · (P - n - V D)", w * rest, source=upcast)
    if setup.method == "qlora":
        codes = sum(-(-size // 2) for size in sizes)
        constants = sum(quantized_nbytes(size, double_quant=setup.double_quant) for size in sizes) - codes
        yield _line("codes", "of the linears, 4 bits", "n / 2", codes)
        formula = "n / 64 + 4 n / (64 · 256)" if setup.double_quant else "4 n / 64"
        yield _line("constants", "of the codes", formula, constants)
    else:
        yield _line("linears", "their weights", f"{w} · n", w * n)
    trained, itemsize = setup.trained
    p = "P" if setup.method == "full" else "Σ r (in + out)"
    if setup.method != "full":
        yield _line(
            "adapter", "A and B", f"{itemsize} · {p}", itemsize * trained, source="PEFT, autocast_adapter_dtype"
        )
    yield _optimizer(setup, trained, itemsize, p)
    yield _line("batch", "tokens, mask and labels", "3 · 8 · B T", 24 * setup.batch * setup.seq)
    yield Line("allocated", "workspace", "of cuBLAS", "", Range(*CUBLAS), CUBLAS_SOURCE)


def _optimizer(setup: StackSetup, trained: int, itemsize: int, p: str) -> Line:
    if setup.optimizer == "adamw8bit":
        formula = f"2 · (1 + 4 / 256) · {p}"
        source = "bitsandbytes, optim/optimizer.py: blocks of 256"
        return _line("optimizer", "m and v in 8 bits", formula, 2 * (1 + 4 / 256) * trained, source=source)
    if setup.optimizer == "paged":
        source = "bitsandbytes: unified memory, which the driver may move to the CPU's"
        return _line("optimizer", "m and v in 32 bits, paged", f"8 · {p}", 8 * trained, low=0, source=source)
    source = "torch, optim/adamw.py: zeros_like(parameter)"
    return _line("optimizer", "m and v", f"2 · {itemsize} · {p}", 2 * itemsize * trained, source=source)


# ---- held at one moment ----------------------------------------------------------------------------------------


def _at_the_loss(setup: StackSetup) -> Iterator[Line]:
    """When the gradient of the float32 logits is computed, as the backward begins."""
    yield from _kept(setup)
    rows, v, chunks = setup.batch * setup.seq, setup.config.vocab_size, setup.loss_chunks
    n, cut = rows * v / chunks, "" if chunks == 1 else f" / {chunks}"
    loss = "transformers, loss/loss_utils.py: logits.float()"
    yield _line("logits", "log-softmax in float32", f"4 · B T V{cut}", 4 * n, source=loss)
    yield _line("logits", "its gradient", f"4 · B T V{cut}", 4 * n, source="torch, nll_loss_backward")
    yield _line(
        "logits", "the logits' gradient in float32", f"4 · B T V{cut}", 4 * n, source="torch, log_softmax_backward"
    )
    yield from _held_output(setup)
    yield _accumulated(setup)


def _in_the_last_layer(setup: StackSetup) -> Iterator[Line]:
    """When the backward is in the layer that it comes to first, and hardly any gradient is there."""
    yield from _kept(setup)
    yield from _held_output(setup)
    yield from _one_layer(setup)
    yield _accumulated(setup)


def _in_the_first_layer(setup: StackSetup) -> Iterator[Line]:
    """When the backward is in the layer that it comes to last, and all gradients are there."""
    kept, again = model_keeps(setup.config, setup.run, setup.seq, setup.recompute)
    if not again:
        each = sum(one.nbytes for one in kept.values()) / setup.config.layers
        yield _line("activations", "of one layer", "activations / L", each)
    yield from _one_layer(setup)
    trained, itemsize = setup.trained
    yield _line("gradients", "of what is trained", f"{itemsize} each", itemsize * trained)


def _in_the_update(setup: StackSetup) -> Iterator[Line]:
    """When the optimizer takes its step."""
    trained, itemsize = setup.trained
    yield _line("gradients", "of what is trained", f"{itemsize} each", itemsize * trained)
    if setup.optimizer == "adamw32":
        more = itemsize * trained
        source = "torch, optim/adamw.py: _multi_tensor_adamw takes all roots at once; with fused=True there are none"
        yield _line("scratch", "square roots of v", f"{itemsize} each", more, low=0, source=source)


def _between_steps(setup: StackSetup) -> Iterator[Line]:
    """When a step is over: torch keeps the gradients until the next one begins."""
    trained, itemsize = setup.trained
    yield _line("gradients", "of what is trained", f"{itemsize} each", itemsize * trained)
    yield from _held_output(setup)


_MOMENTS: dict[str, Callable[[StackSetup], Iterator[Line]]] = {
    "the loss": _at_the_loss,
    "the last layer's backward": _in_the_last_layer,
    "the first layer's backward": _in_the_first_layer,
    "the update": _in_the_update,
    "between steps": _between_steps,
}


def _kept(setup: StackSetup) -> Iterator[Line]:
    c, run = setup.config, setup.run
    kept, _ = model_keeps(c, run, setup.seq, setup.recompute)
    for what, (formula, nbytes) in kept.items():
        yield _line("activations", what, formula, nbytes, source="tape.py")
    if c.heads > c.kv_heads:
        kv = 2 * run.rows * (c.heads - c.kv_heads) * c.head_dim * 2 * (1 if setup.recompute else c.layers)
        source = "transformers, integrations/sdpa_attention.py: with a mask of padding k and v are repeated"
        yield _line("activations", "k and v for each query head", "L · 2 · 2 · B T (H - K) h", 0, 0, kv, source)
    if c.final_logit_softcapping:
        yield _line("logits", "tanh of the cap", "2 · B T V", 2 * run.rows * c.vocab_size / setup.loss_chunks)


def _held_output(setup: StackSetup) -> Iterator[Line]:
    """The model's output, in the dtype of its head."""
    wide = 2 if setup.autocast else setup.run.weight
    n = setup.batch * setup.seq * setup.config.vocab_size / setup.loss_chunks
    if setup.holds_output:
        yield _line("logits", "the model's output", f"{wide} · B T V", wide * n)


def _one_layer(setup: StackSetup) -> Iterator[Line]:
    c, run = setup.config, setup.run
    _, again = model_keeps(c, run, setup.seq, setup.recompute)
    for what, (formula, nbytes) in again.items():
        yield _line("recomputed", what, formula, nbytes, source="tape.py")
    s, a = (2 if run.autocast else run.weight), (2 if run.autocast else run.adapter)
    adapted = c.architecture.mlp_out.rpartition(".")[2] in run.ranks
    each = max(3 * s, a + 2 * s if adapted else 0)
    what = "of the MLP: those through down's A, its cast and down itself, or of silu, gate and up"
    yield _line("scratch", f"gradients {what}", f"{each} · B T F", each * run.rows * c.intermediate_size)
    yield _line(
        "scratch", "gradient of the residual stream", f"{run.weight} · B T D", run.weight * run.rows * c.hidden_size
    )
    if setup.method == "qlora":
        largest = max(linear_sizes(c))
        source = "bitsandbytes, autograd/_functions.py: MatMul4Bit.backward"
        yield _line("dequantised", "the largest linear", "2 · in out", 2 * largest, source=source)


def _accumulated(setup: StackSetup) -> Line:
    """Gradients of earlier micro-batches, if there are any."""
    trained, itemsize = setup.trained
    source = "torch, zero_grad(set_to_none=True)"
    return _line("gradients", "of earlier micro-batches", f"{itemsize} each", 0, 0, itemsize * trained, source)
