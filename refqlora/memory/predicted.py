"""The memory of a training step, predicted: the engine takes the step with hollow arrays, and every byte is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ..lora import Weight
from ..model import Model
from ..optim import AdamW
from ..quantization import QuantizedTensor
from .held import kept, training_bytes, weight_category
from .hollow import Made, Record, hollow, recording
from .ledger import CATEGORIES, Entry, Ledger
from .setup import Setup, hollow_like, take_step

Kept = dict[str, list[int]]  # {what: the numbers of its buffers, one a layer}
_FUNCTIONS = {  # the category of what these functions allocate
    "dequantize": "dequantised",
    "attention_forward": "attention",
    "attention_backward": "attention",
    "head_forward": "logits",
    "head_backward": "logits",
    "cross_entropy": "logits",
}


def step_bytes(model: Model, length: int, batch: int, micro_batch: int, recompute: bool = False) -> int:
    """The most that a training step of `model` holds besides the model itself: activations, gradients, AdamW's moments,
    tokens and labels. length: tokens a sequence; micro_batch of a batch's sequences go through the model at once."""
    with recording() as record:
        copy = hollow_like(model)
        own = record.live
        shape = min(batch, 2 * micro_batch), length  # a third micro-batch is like the second
        tokens, labels = hollow(shape, np.int64, 0), hollow(shape, np.int64, 0)
        take_step(copy, AdamW(copy.trainable()), tokens, labels, micro_batch, recompute)
        return record.peak - own - 2 * tokens.nbytes + 16 * batch * length


def predict(setup: Setup) -> Ledger:
    """The bytes of one step of `setup`, by category, and the most that are held at once. Nothing is allocated.

        >>> from refqlora.memory.setup import Setup
        >>> sizes = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32)
        >>> ledger = predict(Setup(rq.Config(**sizes, head_dim=128), "qlora", seq=512))
        >>> ledger.bytes()["codes"]
        3238002688

    Exact for NumPy on a CPU: what is held between steps to the byte, the peak but for Python's own objects.
    """
    numbers: Kept = {}
    moments: dict[str, int] = {}

    def look(cache: dict) -> None:  # only the buffers' numbers are noted: what holds a buffer keeps it alive
        for what, buffers in kept(model, cache).items():
            numbers[what] = [buffer.number for buffer in buffers]
        moments["backward"] = len(record.events)

    with recording() as record:
        model = setup.hollow_model()
        optimizer = AdamW(model.trainable())
        tokens, labels = (hollow((setup.batch, setup.seq), np.int64, 0) for _ in range(2))
        moments["step"], record.peak = len(record.events), record.live
        grads = setup.step(model, optimizer, tokens, labels, look)
        peak = record.peak
        held = training_bytes(model, grads, optimizer)
        roles = {number: "activations" for each in numbers.values() for number in each}
        roles |= {g.buffer.number: "gradients" for g in grads.values()}
    return Ledger(tuple(_entries(setup, model, numbers, record)), peak, _at_peak(record, roles, moments, held))


def _at_peak(record: Record, roles: dict[int, str], moments: dict[str, int], held: dict[str, int]) -> dict[str, int]:
    """{category: bytes} at the moment when most is held."""
    live, most, at, alive = 0, -1, 0, dict[int, int]()
    for i, (_, nbytes) in enumerate(record.events):
        live += nbytes
        if i >= moments["step"] and live > most:
            most, at = live, i
    made_at: dict[int, int] = {}
    for i, (number, nbytes) in enumerate(record.events[: at + 1]):
        if nbytes > 0:
            alive[number], made_at[number] = nbytes, i
        else:
            alive.pop(number, None)
    sums = dict.fromkeys(CATEGORIES, 0)
    for category, nbytes in held.items():
        if category not in ("gradients", "total"):
            sums[category] += nbytes
    for number, nbytes in alive.items():
        if made_at[number] >= moments["step"]:
            again = made_at[number] > moments["backward"]
            sums[category_of(record.buffers[number], again, roles.get(number))] += nbytes
    sums["batch"] = most - sum(sums.values())  # what is left: made before the step, and not part of the model
    return {category: n for category, n in sums.items() if n}


def category_of(made: Made, in_backward: bool, role: str | None) -> str:
    """The category of a buffer that a step has made."""
    if role is not None:
        return role
    for name in made.functions:
        if name in _FUNCTIONS:
            return _FUNCTIONS[name]
    if made.functions[0] in ("softcap_forward", "softcap_backward"):  # attention's was found above
        return "logits"
    return "recomputed" if in_backward and made.functions[-1] == "layer_forward" else "scratch"


# ---- the lines of the ledger: each formula gives its bytes -----------------------------------------------------


def _entries(setup: Setup, model: Model, kept_numbers: Kept, record: Record) -> Iterator[Entry]:
    yield from _weight_entries(setup, model)
    trained, size = sum(p.size for p in model.trainable().values()), setup.dtype.itemsize
    symbol = "P" if setup.method == "full" else "Σ r (in + out)"  # P: all parameters
    if setup.method != "full":
        yield Entry("adapter", "A and B of each linear", f"{size} · {symbol}", f"{size} · {trained:,}", size * trained)
    yield Entry("optimizer", "m and v", f"2 · {size} · {symbol}", f"2 · {size} · {trained:,}", 2 * size * trained)
    yield Entry("gradients", "of each", f"{size} · {symbol}", f"{size} · {trained:,}", size * trained)
    rows = setup.batch * setup.seq
    yield Entry("batch", "tokens and labels", "2 · 8 · B T", f"2 · 8 · {rows:,}", 16 * rows)
    for what, numbers in kept_numbers.items():
        alike: dict[tuple[tuple[int, ...], int], int] = {}
        for number in numbers:
            made = record.buffers[number]
            key = made.shape, made.dtype.itemsize
            alike[key] = alike.get(key, 0) + 1
        for (shape, itemsize), count in alike.items():
            yield _entry(setup, "activations", what, shape, itemsize, count)


def _entry(setup: Setup, category: str, what: str, shape: tuple[int, ...], itemsize: int, count: int) -> Entry:
    """`count` arrays of one shape; "L" in the formula if there is one for each layer."""
    rows = category == "activations"
    n = math.prod(shape)
    times = "L · " if count == setup.config.layers > 1 else f"{count} · " if count > 1 else ""
    numbers = f"{count} · " if count > 1 else ""
    sizes = " ".join(f"{x:,} ·" for x in shape).removesuffix(" ·")
    formula, numbers = f"{times}{itemsize} · {symbols(setup, shape, rows)}", f"{numbers}{itemsize} · {sizes}"
    return Entry(category, what, formula, numbers, count * itemsize * n)


def _weight_entries(setup: Setup, model: Model) -> Iterator[Entry]:
    """The entries of the base's weights, those of equal name and shape in all layers together."""
    config = setup.config
    alike: dict[tuple[str, tuple[int, ...]], list[tuple[str, Weight]]] = {}
    for name, weight in model.params.items():
        head, _, rest = name.removeprefix(config.architecture.layers).partition(".")
        alike.setdefault((rest if head.isdecimal() else name, weight.shape), []).append((name, weight))
    for (short, shape), pairs in alike.items():
        (name, weight), count = pairs[0], len(pairs)
        if not isinstance(weight, QuantizedTensor):
            yield _entry(setup, weight_category(config, name), short, shape, weight.dtype.itemsize, count)
            continue
        n, blocks, layers = weight.size, weight.absmax.size, f"{count} · " if count > 1 else ""
        times, sizes = "L · " if count > 1 else "", symbols(setup, shape, rows=False)
        yield Entry("codes", short, f"{times}{sizes} / 2", f"{layers}{n:,} / 2", count * weight.packed.nbytes)
        formula, numbers = "4 ⌈n/64⌉", f"4 · {blocks:,}"
        if weight.nested_absmax is not None:
            formula, numbers = "(⌈n/64⌉ + 4 ⌈n/(64·256)⌉)", f"({blocks:,} + 4 · {weight.nested_absmax.size:,})"
        yield Entry("constants", short, times + formula, layers + numbers, count * weight.constants_nbytes)


def symbols(setup: Setup, shape: Sequence[int], rows: bool = True) -> str:
    """A shape in the symbols of functional.py's legend, where a number has one: "B T D". rows: it may begin with the
    batch and the time."""
    config, known = setup.config, dict[int, str]()
    q, k, _ = config.qkv_sizes
    if setup.method != "full":
        known[setup.lora.rank] = "r"
    known |= {q + 2 * k: "(H + 2 K) h", 2 * config.intermediate_size: "2 F", k: "K h", q: "H h"}
    known |= {config.intermediate_size: "F", config.vocab_size: "V", config.hidden_size: "D"}
    batch = min(setup.batch, setup.micro_batch or setup.batch)
    for first, said in (((batch, setup.seq), "B T"), ((batch * setup.seq,), "B T"), ((setup.seq,), "T")):
        rest = tuple(shape[len(first) :])
        if rows and tuple(shape[: len(first)]) == first:
            heads = {config.kv_heads: "K h", config.heads: "H h"}
            if len(rest) == 2 and rest[1] == config.head_dim and rest[0] in heads:
                return f"{said} {heads[rest[0]]}"
            return " ".join([said, *(known.get(n, f"{n:,}") for n in rest if n != 1)])
    return " ".join(known.get(n, f"{n:,}") for n in shape) or "1"
