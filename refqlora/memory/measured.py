"""The memory of a training step, measured while it is taken, twice over: the live arrays are walked and counted by
category, and NumPy's allocator says how many bytes of arrays there are (tracemalloc, in NumPy's own domain)."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from ..model import Model
from ..optim import AdamW
from .held import kept, training_bytes
from .setup import Setup


@dataclass(frozen=True)
class Measured:
    """What a step has taken, in bytes.

    categories: what the live arrays add up to. allocated: {moment: what the allocator holds}, before the step
    ("between steps") and when the backward begins ("kept", with the logits' gradient and all that is persistent).
    peak: the most that was held at once during the step, with all that was held before it, and with Python's own
    objects, as the allocator's peak cannot tell them apart.
    """

    categories: Mapping[str, int]
    allocated: Mapping[str, int]
    peak: int


def measure(setup: Setup, seed: int = 0) -> Measured:
    """Take a step of `setup` on random weights, twice: once with a look at what is held, once for the peak.

    Raises RuntimeError if memory is being traced already.
    """
    if tracemalloc.is_tracing():
        raise RuntimeError("measure: tracemalloc is tracing already")
    _warm_up(setup)
    categories: dict[str, int] = {}
    allocated: dict[str, int] = {}
    with _tracing():
        model = setup.real_model(seed)
        optimizer = AdamW(model.trainable())
        tokens, labels = (np.zeros((setup.batch, setup.seq), np.int64) for _ in range(2))
        gc.collect()
        allocated["between steps"] = array_bytes()

        def look(cache: dict) -> None:
            categories["activations"] = sum(array.nbytes for arrays in kept(model, cache).values() for array in arrays)
            allocated["kept"] = array_bytes()

        grads = setup.step(model, optimizer, tokens, labels, look)
        held = training_bytes(model, grads, optimizer)
        del held["total"], grads
        gc.collect()
        tracemalloc.reset_peak()
        setup.step(model, optimizer, tokens, labels)
        peak = tracemalloc.get_traced_memory()[1]
    return Measured(held | {"batch": tokens.nbytes + labels.nbytes} | categories, allocated, peak)


def array_bytes() -> int:
    """Bytes of array data that are alive, as NumPy reports them to tracemalloc, which must be tracing."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)


@contextmanager
def _tracing() -> Iterator[None]:
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _warm_up(setup: Setup) -> None:
    """A step on two tokens, for what is made once and kept: tables, imports."""
    small = replace(setup, batch=1, seq=2, micro_batch=None)
    model: Model = small.real_model()
    tokens = np.zeros((1, 2), np.int64)
    small.step(model, AdamW(model.trainable()), tokens, tokens)
