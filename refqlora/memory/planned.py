"""Plans of a training step that fit in memory: the size of micro-batches, and whether layers are recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ..model import Model
from .predicted import step_bytes

MANY = 64  # sequences at once, from which on the bytes are taken to grow by the same amount with each


class Plan(NamedTuple):
    """The number of sequences that go through the model at once, whether each layer is recomputed in the backward, and
    the bytes that a step then takes besides the model."""

    micro_batch: int
    recompute: bool
    nbytes: int


def plan_step(
    model: Model, length: int, batch: int, room: float, micro_batch: int | None = None, recompute: bool = False
) -> Plan:
    """The plan (see `plan`) for training the model's active adapter, or all of its weights, within `room` bytes.

    length: tokens in the longest sequence. Gradients and AdamW's moments are counted, weights are not.
    """

    @functools.cache
    def exact(micro_batch: int, recompute: bool) -> int:
        return step_bytes(model, length, batch, micro_batch, recompute)

    def need(micro_batch: int, recompute: bool) -> int:
        if micro_batch <= MANY:
            return exact(micro_batch, recompute)
        half, many = exact(MANY // 2, recompute), exact(MANY, recompute)
        return many + (micro_batch - MANY) * (many - half) // (MANY - MANY // 2)

    return plan(need, batch, room, micro_batch, recompute)


def plan(
    need: Callable[[int, bool], int], batch: int, room: float, micro_batch: int | None = None, recompute: bool = False
) -> Plan:
    """The fastest plan that needs at most `room` bytes; if there is none, the one that needs the least.

    need: (micro_batch, recompute) -> bytes. A given micro_batch is kept, and so is recompute=True. Smaller
    micro-batches are tried before recomputing, which takes a third more time.
    """
    sizes = [micro_batch or batch]
    while micro_batch is None and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    plans = []
    for again in sorted({recompute, True}):
        for size in sizes:
            plans.append(Plan(size, again, need(size, again)))
            if plans[-1].nbytes <= room:
                return plans[-1]
    return min(plans, key=lambda one: one.nbytes)


def size_text(nbytes: int) -> str:
    """Three figures in decimal units: 512 bytes, 12.3 MB, 4.56 GB."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{nbytes} bytes"
