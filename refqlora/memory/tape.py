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
    autocast      products cast float32 weights to 16 bits, and keep that
    RoPE          cos and sin, shared by all layers
    attention     q, k, v, the output, and logsumexp in float32
    SiLU, GELU    their input
    gate * up     both
    x + y         nothing

An operation keeps nothing if nothing before it is trained: so the first layer keeps less, unless its input is made to
require a gradient, as it is with gradient checkpointing (PEFT: enable_input_require_grads).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import Config


@dataclass(eq=False)
class Value:
    """A tensor of `size` elements of `itemsize` bytes; whether it requires a gradient."""

    size: int
    itemsize: int
    grad: bool


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
    ranks: dict[str, int] = field(default_factory=dict)
    dropout: bool = False
    weight: int = 2
    adapter: int = 4
    four_bit: bool = False
    autocast: bool = False


class Tape:
    """What has been kept: {what: bytes}."""

    def __init__(self, config: Config, run: Run) -> None:
        self.run, self.one_plus = run, config.architecture.norm_of_one_plus
        self.kept: dict[str, int] = {}
        self.seen: set[int] = set()
        self._alive: list[Value] = []  # so that no identity is used twice

    def keep(self, what: str, value: Value) -> None:
        if id(value) not in self.seen:
            self.seen.add(id(value))
            self._alive.append(value)
            self.kept[what] = self.kept.get(what, 0) + value.size * value.itemsize

    def cast(self, x: Value, itemsize: int) -> Value:
        return x if x.itemsize == itemsize else Value(x.size, itemsize, x.grad)

    def norm(self, what: str, x: Value, rows: int) -> Value:
        """RMSNorm of `rows` rows."""
        wide, trained = self.cast(x, 4), self.run.trained
        if x.grad:
            self.keep(f"{what}: x in float32", wide)
            self.keep(f"{what}: 1 / rms", Value(rows, 4, True))
            if self.one_plus:
                self.keep(f"{what}: 1 + weight", Value(x.size // rows, 4, True))
        if trained:
            self.keep(f"{what}: x / rms", Value(x.size, 4 if self.one_plus else x.itemsize, True))
        return Value(x.size, x.itemsize if self.one_plus else max(x.itemsize, self.run.weight), x.grad or trained)

    def linear(self, name: str, x: Value, out: int) -> Value:
        """A linear with `out` outputs, with its adapter if it has one."""
        run, inputs = self.run, x.size // self.run.rows
        narrow = run.four_bit or run.autocast
        if run.trained:
            self.keep(f"{name}: x", self.cast(x, 2) if run.autocast else x)
        if not run.four_bit and run.autocast and run.weight == 4 and x.grad:
            self.keep(f"{name}: weight in 16 bits", Value(inputs * out, 2, True))
        itemsize = x.itemsize if run.four_bit else 2 if narrow else max(x.itemsize, run.weight)
        rank = run.ranks.get(name)
        if rank is not None:
            given = x if run.autocast and run.four_bit else self.cast(x, run.adapter)
            if run.dropout:
                given = Value(given.size, given.itemsize, True)
                self.keep(f"{name}: dropout's mask", Value(given.size, 1, True))
            if run.autocast:
                given = self.cast(given, 2)
            self.keep(f"{name}: LoRA's x", given)
            self.keep(f"{name}: LoRA's z", Value(run.rows * rank, given.itemsize, True))
            if run.autocast and run.adapter == 4:
                self.keep(f"{name}: A and B in 16 bits", Value(rank * (out + inputs * x.grad), 2, True))
        return Value(run.rows * out, itemsize, x.grad or run.trained or rank is not None)


def layer_keeps(config: Config, run: Run, x: Value) -> tuple[dict[str, int], Value]:
    """{what: bytes} that one layer keeps of its input x (B T, D), and its output."""
    tape, a, rows = Tape(config, run), config.architecture, run.rows
    q, k, v, whole = _attention_inputs(tape, config, tape.norm("norm before attention", x, rows))
    if a.qk_norm:
        q = tape.norm("norm of q", q, rows * config.heads)
        k = tape.norm("norm of k", k, rows * config.kv_heads)
    q, k = (Value(t.size, max(t.itemsize, x.itemsize), t.grad) for t in (q, k))  # after RoPE
    if run.autocast:
        q, k = tape.cast(q, 2), tape.cast(k, 2)
        whole = whole if v.itemsize == 2 else Value(v.size, 2, v.grad)
    y = Value(rows * config.heads * config.head_dim, q.itemsize, q.grad or k.grad or v.grad)
    if y.grad:
        for name, value in (("q", q), ("k", k), ("v", whole), ("output", y)):
            tape.keep(f"attention: {name}", value)
        tape.keep("attention: logsumexp", Value(rows * config.heads, 4, True))
    if len(a.qkv) == 1:  # Phi-3's RoPE changes the layout of q, which attention's output takes on: it is copied
        y = Value(y.size, y.itemsize, y.grad)
    y = tape.linear(_last(a.attention_out), y, config.hidden_size)
    if a.attention_post_norm:
        y = tape.norm("norm after attention", y, rows)
    x = _sum(x, y)
    gate, up = _mlp_inputs(tape, config, tape.norm("norm before the MLP", x, rows))
    if gate.grad:
        tape.keep("MLP: gate", gate)
    active = Value(rows * config.intermediate_size, gate.itemsize, gate.grad)
    if up.grad:
        tape.keep("MLP: activated gate", active)
    if gate.grad:
        tape.keep("MLP: up", up)
    product = Value(active.size, max(active.itemsize, up.itemsize), gate.grad or up.grad)
    y = tape.linear(_last(a.mlp_out), product, config.hidden_size)
    if a.mlp_post_norm:
        y = tape.norm("norm after the MLP", y, rows)
    return tape.kept, _sum(x, y)


def _attention_inputs(tape: Tape, config: Config, n: Value) -> tuple[Value, Value, Value, Value]:
    """q, k, v, and the tensor that attention keeps for v: all of q, k and v where one linear makes them."""
    names, sizes, rows = config.architecture.qkv, config.qkv_sizes, tape.run.rows
    if len(names) == 3:
        q, k, v = (tape.linear(_last(name), n, size) for name, size in zip(names, sizes, strict=True))
        return q, k, v, v
    whole = tape.linear(_last(names[0]), n, sum(sizes))
    q, k, v = (Value(rows * size, whole.itemsize, whole.grad) for size in sizes)
    return q, k, v, whole


def _mlp_inputs(tape: Tape, config: Config, n: Value) -> tuple[Value, Value]:
    names, sizes = config.architecture.mlp_in, config.mlp_sizes
    if len(names) == 2:
        gate, up = (tape.linear(_last(name), n, size) for name, size in zip(names, sizes, strict=True))
        return gate, up
    whole = tape.linear(_last(names[0]), n, sum(sizes))
    return Value(whole.size // 2, whole.itemsize, whole.grad), Value(whole.size // 2, whole.itemsize, whole.grad)


def model_keeps(config: Config, run: Run, seq: int, recompute: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """What all layers and the final norm keep, and what one layer keeps when it is computed again: {what: bytes} each,
    the second empty without `recompute`. The logits are not in them."""
    x = Value(run.rows * config.hidden_size, run.weight, run.trained or recompute)
    kept: dict[str, int] = {"RoPE: cos and sin": 2 * seq * config.rotary_dim * x.itemsize}
    again: dict[str, int] = {}
    if recompute:
        kept["each layer: x"] = config.layers * x.size * x.itemsize
        again, x = layer_keeps(config, run, x)
    else:
        for times in (1, config.layers - 1):  # the first layer may keep less, the others are alike
            each, x = layer_keeps(config, run, x)
            kept |= {what: kept.get(what, 0) + times * n for what, n in each.items()}
    tape = Tape(config, run)
    n = tape.norm("final norm", x, run.rows)
    if run.trained:
        tape.keep("head: x", tape.cast(n, 2) if run.autocast else n)
    if run.autocast and run.weight == 4:
        tape.keep("head: weight in 16 bits", Value(config.vocab_size * config.hidden_size, 2, True))
    return kept | tape.kept, again


def _sum(x: Value, y: Value) -> Value:
    return Value(x.size, max(x.itemsize, y.itemsize), x.grad or y.grad)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
