"""Published measurements of fine-tuning on GPUs, and our estimate beside each. No number of the estimate is fitted to
them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from ..lora_config import LoraConfig
from .models import model_config
from .stack import TIERS, Range, StackSetup, estimate

GIB, MIB, GB = 2**30, 2**20, 1e9
USUAL = "usual"  # transformers, PEFT, bitsandbytes
FAR = 0.15  # an error that needs a reason
_QV, _QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
_WEIGHTS = ("embeddings", "head", "norms", "linears", "codes", "constants", "adapter")


@dataclass(frozen=True)
class Measurement:
    """A measurement that was published.

    source: where. versions: the software's and the GPU. stack: "usual", or whose it is. tier: one of TIERS, what it
    measures. nbytes: the bytes it says. setup: what was measured. when: "peak", "between steps", or "loaded", before
    the first step. assumed: what the source does not say and is assumed here. why: where the estimate is far off.
    """

    what: str
    source: str
    versions: str
    stack: str
    tier: str
    nbytes: float
    setup: StackSetup
    when: str = "peak"
    assumed: str = ""
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """A measurement, and the estimate of it."""

    measurement: Measurement
    estimate: Range

    @property
    def error(self) -> float:
        """(estimated - measured) / measured"""
        return self.estimate.expected / self.measurement.nbytes - 1

    @property
    def within(self) -> bool:
        """Whether the measurement lies between the low and the high estimate."""
        return self.estimate.low <= self.measurement.nbytes <= self.estimate.high


def comparisons() -> list[Comparison]:
    """Our estimate beside each measurement."""
    return [Comparison(one, _estimated(one)) for one in measurements()]


def median_errors(found: list[Comparison], stack: str | None = USUAL) -> dict[str, tuple[int, float]]:
    """{tier: (number of measurements, median of |error|)}, of one stack or (None) of all."""
    errors: dict[str, list[float]] = {tier: [] for tier in TIERS}
    for one in found:
        if stack in (None, one.measurement.stack):
            errors[one.measurement.tier].append(abs(one.error))
    return {tier: (len(each), median(each)) for tier, each in errors.items() if each}


def measurements() -> list[Measurement]:
    """All of them: the usual stack first, then others, which compute some things in another way."""
    return [
        *_fms(),
        *_peft(),
        *_bitsandbytes(),
        *_llama_factory(),
        *_figure_6(),
        *_litgpt(),
        *_torchtune(),
        *_unsloth(),
    ]


def _estimated(one: Measurement) -> Range:
    found = estimate(one.setup)
    if one.when == "peak":
        return found.total(one.tier)
    nbytes = found.moments["between steps"]
    if one.when == "loaded":
        nbytes = sum(line.nbytes.expected for line in found.lines if line.category in _WEIGHTS)
    return Range(nbytes, nbytes, nbytes)


# ---- the usual stack -------------------------------------------------------------------------------------------


def _fms() -> Iterator[Measurement]:
    """Trainer, packed sequences of 4096 tokens, flash-attn, gradient checkpointing; float16, which is as wide as
    bfloat16. All hold some 0.5 GB more than is derived, between steps too: a table of RoPE's cos and sin for all 32,768
    positions in each of Mistral's layers, as transformers once had, would be 0.54 GB."""
    make = partial(
        Measurement,
        source="fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv at 04702cc",
        versions="A100 80 GB, 2024",
        stack=USUAL,
    )
    lora = LoraConfig(rank=16, targets=_QKVO)
    mistral, large = model_config("mistral-7b"), model_config("llama-2-70b")
    setup = partial(StackSetup, seq=4096, lora=lora, recompute=True)
    twice = "nvidia-smi has a third more than the tensors; GMLake's average is 15 %. The high estimate covers it."
    upcast = (
        "Each sequence takes 0.6 GB more than derived, as much as one more float32 copy of its logits; which code "
        "makes it is not known."
    )
    runs: tuple[
        tuple[str, dict[str, Any], int, int, int, str], ...
    ] = (  # method, options, batch, allocated, nvidia-smi's MiB, why the latter is far off
        ("lora", {"autocast": False}, 4, 26_108_963_328, 29_731, ""),
        ("lora", {"autocast": False}, 8, 37_098_695_168, 43_195, ""),
        ("qlora", {}, 4, 15_860_019_712, 19_931, twice),
        ("qlora", {}, 8, 26_849_751_552, 34_355, twice),
        ("qlora", {"upcast": True}, 4, 22_825_932_800, 27_023, upcast),
        ("qlora", {"upcast": True}, 8, 40_278_956_032, 47_145, upcast),
        ("full", {"autocast": False}, 4, 72_971_724_288, 77_705, ""),
    )
    for method, options, batch, tensors, process, why in runs:
        what = f"Mistral-7B, {method}{', upcast' if 'upcast' in options else ''}, batch {batch}"
        given = setup(mistral, method, batch, **options)
        yield make(what, tier="allocated", nbytes=tensors, setup=given, why=why if "upcast" in options else "")
        yield make(what, tier="process", nbytes=process * MIB, setup=given, why=why)
    given = setup(large, "qlora", 4)
    yield make("Llama-2-70B, qlora, batch 4", tier="allocated", nbytes=68_159_977_472, setup=given)
    yield make("Llama-2-70B, qlora, batch 4", tier="process", nbytes=72_829 * MIB, setup=given)


def _peft() -> Iterator[Measurement]:
    """PEFT's benchmark: a plain loop, Llama-3.2-3B, batches of 4 whose mean length is 210 tokens."""
    make = partial(
        Measurement,
        source="PEFT, method_comparison/MetaMathQA/results at 0a179c1",
        versions="L40S; torch 2.7.1, transformers 4.52.4, PEFT 0.15.2.dev0",
        stack=USUAL,
        assumed="every batch has the mean length, 4,198,051 tokens / 20,000",
    )
    setup = partial(StackSetup, model_config("llama-3.2-3b"), batch=4, seq=210, autocast=False, holds_output=True)
    lora, full = setup("lora", lora=LoraConfig(rank=32, targets=_QV)), setup("full")
    yield make("LoRA r 32", tier="allocated", nbytes=6_918_408_683.5, setup=lora, when="between steps")
    yield make("full", tier="allocated", nbytes=26_062_803_286, setup=full, when="between steps")
    yield make("LoRA r 32", tier="reserved", nbytes=11_868_689_976, setup=lora)
    yield make("full", tier="reserved", nbytes=33_098_872_284, setup=full)


def _bitsandbytes() -> Iterator[Measurement]:
    """The issue gives the model, 4096 tokens and one sequence; the rest is assumed, and was chosen because it is near
    the first two numbers. Under autocast the three estimates would be 62, 45 and 65 GB: these rows test little."""
    make = partial(
        Measurement,
        source="bitsandbytes #1569",
        versions="torch 2.6.0, transformers 4.51.3, PEFT 0.15.2, bitsandbytes 0.45.5",
        stack=USUAL,
        tier="process",
        assumed="MB are nvidia-smi's MiB; r 16 on all linears; a plain loop without autocast or gradient checkpointing",
    )
    setup = partial(StackSetup, model_config("ministral-8b"), batch=1, seq=4096, autocast=False, holds_output=True)
    yield make("Ministral-8B, LoRA", nbytes=72_840 * MIB, setup=setup("lora"))
    yield make("Ministral-8B, QLoRA", nbytes=63_082 * MIB, setup=setup("qlora"))
    yield make("Ministral-8B, QLoRA, upcast", nbytes=81_076 * MIB, setup=setup("qlora", upcast=True))


def _llama_factory() -> Iterator[Measurement]:
    """Should its GB be GiB, every estimate is 7 % lower beside them."""
    make = partial(
        Measurement,
        source="LLaMA-Factory's wiki, Performance comparison, April 2024",
        versions="A100 40 GB, FlashAttention-2",
        stack=USUAL,
        tier="process",
        assumed="gradient checkpointing and double quantisation, its defaults; GB are decimal",
    )
    setup = partial(StackSetup, model_config("llama-2-7b"), lora=LoraConfig(rank=8), recompute=True)
    even = "Tensors and context alone are 16.7 GB: its allocator wasted next to nothing."
    yield make(
        "Llama-2-7B, 16 bits, batch 4 of 1,024", nbytes=17 * GB, setup=setup("lora", batch=4, seq=1024), why=even
    )
    yield make("Llama-2-7B, 4 bits, batch 4 of 1,024", nbytes=9 * GB, setup=setup("qlora", batch=4, seq=1024))
    for seq, theirs in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        yield make(f"Llama-2-7B, 4 bits, one of {seq:,}", nbytes=theirs * GB, setup=setup("qlora", seq=seq))


def _figure_6() -> Iterator[Measurement]:
    """QLoRA's figure 6: the bars of the model."""
    why = "Some 1 GiB more than its weights, for every size, and 4.5 bits rather than 4.127: see papers.py."
    for size, theirs in ((7, 5046), (13, 8476), (33, 19302), (65, 37074)):
        setup = StackSetup(model_config(f"llama-{size}b"), lora=LoraConfig(rank=64), adapter_dtype="bfloat16")
        yield Measurement(
            f"weights of LLaMA-{size}B", "QLoRA (arXiv 2305.14314), figure 6", "2023", USUAL, "allocated",
            theirs * MIB, setup, "loaded", "the bar contains the adapter", why,
        )  # fmt: skip


# ---- other stacks: what they do otherwise is told by their options, as far as there are any ---------------------


def _litgpt() -> Iterator[Measurement]:
    make = partial(
        Measurement,
        source="litgpt, tutorials/resource-tables.md, October 2023",
        versions="A100 40 GB; torch 2.1.0, bitsandbytes 0.41.1",
        stack="litgpt",
        tier="allocated",
        assumed="the longest sequence, 1,304 tokens, without padding",
    )
    older = "Until July 2024 bitsandbytes kept the inputs of 4-bit linears (#1270): 1.6 GB of the 2.8 GB that 7B lacks."
    lora = LoraConfig(rank=8, targets=_QV, dropout=0.05)
    for size, method, double_quant, batch, theirs in (
        (7, "lora", True, 1, 21.30), (7, "lora", True, 2, 29.07), (7, "qlora", False, 1, 14.14),
        (7, "qlora", True, 1, 13.84), (13, "lora", True, 1, 38.12), (13, "qlora", False, 1, 23.14),
        (13, "qlora", True, 1, 22.55),
    ):  # fmt: skip
        setup = StackSetup(
            model_config(f"llama-2-{size}b"), method, batch, 1304, lora, double_quant, autocast=False,
            holds_output=True, adapter_dtype="bfloat16",
        )  # fmt: skip
        kind = "LoRA" if method == "lora" else f"nf4{'-dq' if double_quant else ''}"
        yield make(
            f"Llama-2-{size}B, {kind}, batch {batch}", nbytes=theirs * GB, setup=setup,
            why=older if method == "qlora" else "",
        )  # fmt: skip


def _torchtune() -> Iterator[Measurement]:
    make = partial(
        Measurement, source="torchtune, README at 0031bfb", versions="2024, torch.compile", stack="torchtune"
    )
    compiled = "torch.compile fuses operations and keeps fewer of their inputs than autograd does."
    setup = partial(
        StackSetup, model_config("llama-3.1-8b"), batch=2, seq=2048, lora=LoraConfig(rank=8), autocast=False,
        adapter_dtype="bfloat16", loss_chunks=8,
    )  # fmt: skip
    yield make(
        "Llama-3.1-8B, QLoRA", tier="allocated", nbytes=7.4 * GIB, setup=setup("qlora", recompute=True), why=compiled
    )
    yield make(
        "Llama-3.1-8B, LoRA", tier="allocated", nbytes=16.2 * GIB, setup=setup("lora", recompute=True), why=compiled
    )
    yield make(
        "Llama-3.1-8B, LoRA, not recomputed", tier="allocated", nbytes=30.3 * GIB, setup=setup("lora"), why=compiled
    )
    small = StackSetup(
        model_config("llama-2-7b"), "lora", lora=LoraConfig(rank=8, targets=_QV), adapter_dtype="bfloat16"
    )
    yield Measurement(
        "Llama-2-7B, LoRA, as it is loaded", "torchtune, tutorials/qlora_finetune.rst", "2024", "torchtune",
        "allocated", 13.96 * GB, small, "loaded",
    )  # fmt: skip


def _unsloth() -> Iterator[Measurement]:
    """Unsloth's least requirements."""
    make = partial(
        Measurement,
        source="unsloth, docs, Unsloth Requirements",
        versions="2025",
        stack="unsloth",
        tier="process",
        assumed="one sequence of 512 tokens, r 16, AdamW in 8 bits, gradient checkpointing, logits in parts",
    )
    models = ("llama-3.2-3b", "mistral-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b")
    needs = ((3.5, 8), (5, 19), (6, 22), (8.5, 33), (26, 76), (41, 164))
    why = (
        "A requirement by size, with settings that are not published. For 14B it is less than the weights of "
        "Qwen2.5-14B alone, whose embeddings and head stay in 16 bits."
    )
    for name, (qlora, lora) in zip(models, needs, strict=True):
        setup = partial(
            StackSetup, model_config(name), batch=1, seq=512, recompute=True, optimizer="adamw8bit", loss_chunks=32
        )
        yield make(f"{name}, QLoRA", nbytes=qlora * GB, setup=setup("qlora"), why=why)
        yield make(f"{name}, LoRA", nbytes=lora * GB, setup=setup("lora"), why=why)
