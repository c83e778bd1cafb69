"""What torch's autograd keeps of a Llama-like layer for the backward, derived operation by operation.

The layer is that of transformers, its linears those of PEFT on torch or bitsandbytes, its attention fused
(scaled_dot_product_attention). A tensor counts once, however many operations refer to it; weights do not count. What
each operation keeps:

    RMSNorm       x in float32 and 1 / rms; if its weight is trained, the normalised x too; Gemma's: 1 + weight
    linear        frozen: nothing of its input, as only dx is needed; trained: its input
    LoRA          x in the adapter's dtype and z = x A^T. PEFT casts x for each linear anew: with float32 adapters on
                  q, k and v there are three copies of x. Under autocast they are in 16 bits, and on 4-bit linears,
                  where PEFT then leaves the cast out, it is x itself. With dropout: what dropout gives, and a mask
                  of one byte
    autocast      products cast float32 weights to 16 bits, and keep those copies
    RoPE          cos and sin, shared by all layers
    attention     q, k, v, the output, and logsumexp in float32
    SiLU, GELU    their input
    gate * up     both
    x + y         nothing

An operation keeps nothing if nothing before it is trained: so the first layer keeps less, unless its input is made to
require a gradient, as it is with gradient checkpointing (PEFT: enable_input_require_grads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import Config


@dataclass(eq=False)
class Value:
    """A tensor: its number of elements, in symbols too, the bytes of each, and whether it requires a gradient."""

    symbols: str
    size: int
    itemsize: int
    grad: bool = True

    def like(self, itemsize: int) -> Value:
        """Another tensor of this shape."""
        return Value(self.symbols, self.size, itemsize, self.grad)


class Kept(NamedTuple):
    """A formula and its bytes."""

    formula: str
    nbytes: int


@dataclass(frozen=True)
class Run:
    """How a layer is run.

    rows: B T. trained: whether the base's own weights are. ranks: {linear's last name: r} of linears with an adapter.
    dropout: whether the adapters have one. weight: bytes of a number in the base's norms and embeddings, and in its
    linears if they are dense. adapter: bytes of one in A and B. four_bit: linears compute in 16 bits and give back the
    dtype of their input, as bitsandbytes' do. autocast: products are in 16 bits whatever goes in.
    """

    rows: int
    trained: bool
    ranks: Mapping[str, int] = field(default_factory=dict)
    dropout: bool = False
    weight: int = 2
    adapter: int = 4
    four_bit: bool = False
    autocast: bool = False


class Tape:
    """What has been kept: {what: formula and bytes}."""

    def __init__(self, config: Config, run: Run) -> None:
        self.run, self.one_plus = run, config.architecture.norm_of_one_plus
        self.kept: dict[str, Kept] = {}
        self._seen: list[Value] = []

    def keep(self, what: str, value: Value) -> None:
        if not any(value is one for one in self._seen):
            self._seen.append(value)
            self.kept[what] = Kept(f"{value.itemsize} · {value.symbols}", value.size * value.itemsize)

    def cast(self, x: Value, itemsize: int) -> Value:
        return x if x.itemsize == itemsize else x.like(itemsize)

    def norm(self, what: str, x: Value, rows: Value) -> Value:
        """RMSNorm of as many rows as `rows` has elements."""
        trained = self.run.trained
        if x.grad:
            self.keep(f"{what}: x in float32", self.cast(x, 4))
            self.keep(f"{what}: 1 / rms", rows.like(4))
            if self.one_plus:
                self.keep(f"{what}: 1 + weight", Value("D", x.size // rows.size, 4))
        if trained:
            self.keep(f"{what}: x / rms", x.like(4 if self.one_plus else x.itemsize))
        itemsize = x.itemsize if self.one_plus else max(x.itemsize, self.run.weight)
        return Value(x.symbols, x.size, itemsize, x.grad or trained)

    def linear(self, name: str, x: Value, symbols: str, out: int) -> Value:
        """A linear with `out` outputs (`symbols`), with its adapter if it has one."""
        run, inputs = self.run, x.size // self.run.rows
        if run.trained:
            self.keep(f"{name}: x", self.cast(x, 2) if run.autocast else x)
        if run.autocast and run.weight == 4 and x.grad and not run.four_bit:
            self.keep(f"{name}: weight in 16 bits", Value("in out", inputs * out, 2))
        itemsize = x.itemsize if run.four_bit else 2 if run.autocast else max(x.itemsize, run.weight)
        rank = run.ranks.get(name)
        if rank is not None:
            given = x if run.autocast and run.four_bit else self.cast(x, run.adapter)
            if run.dropout:
                given = given.like(given.itemsize)
                self.keep(f"{name}: dropout's mask", given.like(1))
            if run.autocast:
                given = self.cast(given, 2)
            self.keep(f"{name}: LoRA's x", given)
            self.keep(f"{name}: LoRA's z", Value("B T r", run.rows * rank, given.itemsize))
            if run.autocast and run.adapter == 4:
                both = Value("r (in + out)", rank * (inputs + out), 2) if x.grad else Value("r out", rank * out, 2)
                self.keep(f"{name}: A and B in 16 bits", both)
        return Value(f"B T {symbols}", run.rows * out, itemsize, x.grad or run.trained or rank is not None)


def layer_keeps(config: Config, run: Run, x: Value) -> tuple[dict[str, Kept], Value]:
    """What one layer keeps of its input x (B T D), and its output."""
    tape, a, each = Tape(config, run), config.architecture, Value("B T", run.rows, 4)
    q, k, v, whole = _attention_inputs(tape, config, tape.norm("norm before attention", x, each))
    if a.qk_norm:
        q = tape.norm("norm of q", q, Value("B T H", run.rows * config.heads, 4))
        k = tape.norm("norm of k", k, Value("B T K", run.rows * config.kv_heads, 4))
    q, k = (t.like(max(t.itemsize, x.itemsize)) for t in (q, k))  # after RoPE
    if run.autocast:
        q, k = tape.cast(q, 2), tape.cast(k, 2)
        whole = whole if v.itemsize == 2 else v.like(2)
    y = Value(q.symbols, q.size, q.itemsize, q.grad or k.grad or v.grad)
    if y.grad:
        for name, value in (("q", q), ("k", k), ("v", whole), ("output", y)):
            tape.keep(f"attention: {name}", value)
        tape.keep("attention: logsumexp", Value("B T H", run.rows * config.heads, 4))
    if len(a.qkv) == 1:  # Phi-3's RoPE changes the layout of q, which attention's output takes on: it is copied
        y = y.like(y.itemsize)
    y = tape.linear(_last(a.attention_out), y, "D", config.hidden_size)
    if a.attention_post_norm:
        y = tape.norm("norm after attention", y, each)
    x = _sum(x, y)
    gate, up = _mlp_inputs(tape, config, tape.norm("norm before the MLP", x, each))
    active = gate.like(gate.itemsize)
    if gate.grad:
        tape.keep("MLP: gate", gate)
    if up.grad:
        tape.keep("MLP: activated gate", active)
    if gate.grad:
        tape.keep("MLP: up", up)
    y = tape.linear(_last(a.mlp_out), _sum(active, up), "D", config.hidden_size)
    if a.mlp_post_norm:
        y = tape.norm("norm after the MLP", y, each)
    return tape.kept, _sum(x, y)


def _attention_inputs(tape: Tape, config: Config, n: Value) -> tuple[Value, Value, Value, Value]:
    """q, k, v, and the tensor that attention keeps for v: all of q, k and v where one linear makes them."""
    names, sizes, symbols = config.architecture.qkv, config.qkv_sizes, ("H h", "K h", "K h")
    if len(names) == 3:
        each = zip(names, symbols, sizes, strict=True)
        q, k, v = (tape.linear(_last(name), n, symbol, size) for name, symbol, size in each)
        return q, k, v, v
    whole = tape.linear(_last(names[0]), n, "(H + 2 K) h", sum(sizes))
    parts = zip(symbols, sizes, strict=True)
    q, k, v = (Value(f"B T {symbol}", tape.run.rows * size, whole.itemsize, whole.grad) for symbol, size in parts)
    return q, k, v, whole


def _mlp_inputs(tape: Tape, config: Config, n: Value) -> tuple[Value, Value]:
    names, sizes = config.architecture.mlp_in, config.mlp_sizes
    if len(names) == 2:
        gate, up = (tape.linear(_last(name), n, "F", size) for name, size in zip(names, sizes, strict=True))
        return gate, up
    whole = tape.linear(_last(names[0]), n, "2 F", sum(sizes))
    gate, up = (Value("B T F", whole.size // 2, whole.itemsize, whole.grad) for _ in range(2))
    return gate, up


def model_keeps(config: Config, run: Run, seq: int, recompute: bool = False) -> tuple[dict[str, Kept], dict[str, Kept]]:
    """What all layers and the final norm keep, and what one layer keeps when it is computed again, by what it is; the
    second is empty without `recompute`. The logits are not in them.

    Raises ValueError for an architecture with LayerNorm.
    """
    if config.architecture.layernorm:
        raise ValueError(f"model_type: {config.model_type} is not supported here, as it has LayerNorm, not RMSNorm")
    x = Value("B T D", run.rows * config.hidden_size, run.weight, run.trained or recompute)
    rope = Value("T h", 2 * seq * config.rotary_dim, x.itemsize)
    kept = {"RoPE: cos and sin": Kept(f"2 · {rope.itemsize} · T h", rope.size * rope.itemsize)}
    again: dict[str, Kept] = {}
    if recompute:
        kept["each layer: x"] = Kept(f"L · {x.itemsize} · B T D", config.layers * x.size * x.itemsize)
        again, x = layer_keeps(config, run, x)
    else:
        first, x = layer_keeps(config, run, x)  # it may keep less than the others, which are alike
        later, x = layer_keeps(config, run, x)
        for what, (formula, nbytes) in later.items():
            less = nbytes - first[what].nbytes if what in first else nbytes
            times = "L" if not less else "(L - 1)" if less == nbytes else "less than L"
            kept[what] = Kept(f"{times} · {formula}", config.layers * nbytes - less)
    tape = Tape(config, run)
    n = tape.norm("final norm", x, Value("B T", run.rows, 4))
    if run.trained:
        tape.keep("head: x", tape.cast(n, 2) if run.autocast else n)
    if run.autocast and run.weight == 4:
        tape.keep("head: weight in 16 bits", Value("V D", config.vocab_size * config.hidden_size, 2))
    return kept | tape.kept, again


def _sum(x: Value, y: Value) -> Value:
    """x + y, or x * y"""
    return Value(x.symbols, x.size, max(x.itemsize, y.itemsize), x.grad or y.grad)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
