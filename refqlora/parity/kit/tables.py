"""What is inferred from a kernel's results: a table of its own, other thresholds, another numbering of the codes, or
at least the place of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...codebooks import NF4
from ..cases import unpacked
from ..differences import ulps
from .mistakes import F32, TINY, in_blocks

if TYPE_CHECKING:
    from .diagnosis import Mistake, Trial

MIDPOINTS = (NF4[1:] + NF4[:-1]) / F32(2)  # (15,): code k is for x up to and including MIDPOINTS[k]


def own_table(trials: Sequence[Trial]) -> list[Mistake]:
    """The mistake that explains these calls of quantize or dequantize by a table of the kernel's own, or []."""
    called = [trial for trial in trials if trial.found]
    if called[0].function == "quantize":
        return [*_renumbered(called), *_thresholds(called)]
    return _values(called) if called[0].function == "dequantize" else []


def _values(called: Sequence[Trial]) -> list[Mistake]:
    """Read the table from weights whose absmax is 1: they are its values."""
    table = NF4.copy()
    for trial in called:
        packed, absmax, block_size, shape = trial.arguments
        n = int(np.prod(shape))
        codes = unpacked(packed)[:n]
        plain = np.repeat(absmax == 1, block_size)[:n]
        table[codes[plain]] = trial.found["weights"].reshape(-1)[plain]
    off = np.flatnonzero(table != NF4)
    if not off.size:
        return []
    entries = [f"entry {k} of the table is {table[k]:.7g}; it must be {NF4[k]:.7g}" for k in off]
    return [("; ".join(entries) if off.size <= 2 else f"the table is not NF4 but {_listed(table)}", {"table": table})]


def _renumbered(called: Sequence[Trial]) -> list[Mistake]:
    """The codes under other numbers, the filling of an odd size perhaps excepted."""
    number = np.arange(16).astype(np.uint8)
    for trial in called:
        n = trial.arguments[0].size
        number[unpacked(trial.expected["packed"])[:n]] = unpacked(trial.found["packed"])[:n]
    if np.unique(number).size < 16 or (number == np.arange(16)).all():
        return []
    cause = f"the codes are numbered otherwise: 0 to 15 became {', '.join(map(str, number))}"
    return [(cause, {"renumbered": number, "filling": filling}) for filling in (number[7], 7)]


def only_rounding(trial: Trial) -> str:
    """Said of a call of quantize in which only codes next to a threshold differ; "" of any other."""
    if trial.wrong() != ["packed"] or trial.function != "quantize":
        return ""
    x = _scaled(*trial.arguments)
    found, expected = (unpacked(side["packed"])[: x.size].astype(int) for side in (trial.found, trial.expected))
    off = found != expected
    lower = np.minimum(found, expected)[off]
    if not off.any() or (abs(found - expected) > 1).any() or (ulps(x[off], MIDPOINTS[lower]) > 4).any():
        return ""
    return "x / absmax is rounded otherwise: the codes differ only within 4 units in the last place of a threshold"


# Where the flat positions i of n elements in blocks of b may all lie.
_PLACES: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "the last byte": lambda i, n, b: i // 2 == (n - 1) // 2,
    "the last block": lambda i, n, b: i // b == (n - 1) // b,
    "the first block": lambda i, n, b: i < b,
    "the first element of a block": lambda i, n, b: i % b == 0,
    "the last element of a block": lambda i, n, b: (i % b == b - 1) | (i == n - 1),
    "the first element of a byte": lambda i, n, b: i % 2 == 0,
    "the second element of a byte": lambda i, n, b: i % 2 == 1,
}


def only_there(trials: Sequence[Trial]) -> str:
    """The one place in which these wrong calls of quantize or dequantize differ, in a sentence; "" if there is none."""
    if not trials or trials[0].function not in ("quantize", "dequantize"):
        return ""
    calls = []
    for trial in trials:
        if trial.function == "quantize":
            n, block_size = trial.arguments[0].size, trial.arguments[1]
            found, expected = (unpacked(side["packed"])[:n] for side in (trial.found, trial.expected))
            a, b = (np.maximum(abs(side["absmax"]), TINY) for side in (trial.found, trial.expected))
            off = (found != expected) | np.repeat(a != b, block_size)[:n]
        else:
            block_size = trial.arguments[2]
            off = (trial.found["weights"] != trial.expected["weights"]).reshape(-1)
        calls.append((np.flatnonzero(off), off.size, block_size))
    if all(n <= block_size for _, n, block_size in calls) or sum(off.size for off, _, _ in calls) < 10:
        return ""  # too little to speak of a place
    for place, inside in _PLACES.items():
        if all(inside(*call).all() for call in calls):
            return f"not known, but nothing is wrong except {place}"
    return ""


def _thresholds(called: Sequence[Trial]) -> list[Mistake]:
    """Read the thresholds from the largest scaled weight with each code and the least one with the next code."""
    largest, least = np.full(16, -np.inf), np.full(16, np.inf)
    for trial in called:
        x = _scaled(*trial.arguments)
        codes = unpacked(trial.found["packed"])[: x.size]
        np.maximum.at(largest, codes, x)
        np.minimum.at(least, codes, x)
    low = np.maximum.accumulate(largest)[:-1]  # (15,): threshold k is at least this
    high = np.minimum.accumulate(least[::-1])[::-1][1:]  # (15,): and less than this
    moved = (low > MIDPOINTS) | (high <= MIDPOINTS)
    if not moved.any() or not np.isfinite([low, high]).all() or (low >= high).any():
        return []
    cause = _evenly_spaced(low, high) or _entry(low, high, moved) or _listed_thresholds(low, moved)
    return [(cause, {"thresholds": np.where(moved, low, MIDPOINTS).astype(F32)})]


def _scaled(w: np.ndarray, block_size: int) -> np.ndarray:
    """The scaled weights that are encoded, float32 (n,)."""
    rows, counts = in_blocks(np.ascontiguousarray(w).reshape(-1).astype(F32), w.shape, block_size, "flat")
    divisor = np.maximum(np.abs(rows).max(axis=1), TINY)[:, None]
    full = (counts == block_size)[:, None]
    return np.where(full, rows * (F32(1) / divisor), rows / divisor).reshape(-1)[: w.size]


def _evenly_spaced(low: np.ndarray, high: np.ndarray) -> str:
    step, first = np.polyfit(np.arange(15), (low + high) / 2, 1)
    line, slack = first + step * np.arange(15), min(0.01, (high - low).max())
    if (line < low - slack).any() or (line > high + slack).any():
        return ""
    return (
        f"the thresholds are evenly spaced, {step:.4g} apart; they must be the midpoints of neighbouring values of NF4"
    )


def _entry(low: np.ndarray, high: np.ndarray, moved: np.ndarray) -> str:
    """A wrong value in the table moves the midpoints on both sides by half as much."""
    sides = np.flatnonzero(moved)
    if len(sides) != 2 or sides[1] != sides[0] + 1:
        return ""
    k = int(sides[1])
    least = max(2 * low[k - 1] - NF4[k - 1], 2 * low[k] - NF4[k + 1])
    most = min(2 * high[k - 1] - NF4[k - 1], 2 * high[k] - NF4[k + 1])
    if least > most:
        return ""
    return f"entry {k} of the table is about {(least + most) / 2:.4g}; it must be {NF4[k]:.7g}"


def _listed_thresholds(low: np.ndarray, moved: np.ndarray) -> str:
    if moved.sum() > 3:
        return f"the thresholds are not the midpoints of NF4's values but about {_listed(low)}"
    wrong = [f"about {low[k]:.4g} where {MIDPOINTS[k]:.7g} is the midpoint" for k in np.flatnonzero(moved)]
    return f"a threshold is wrong: {', '.join(wrong)}"


def _listed(values: Any) -> str:
    return ", ".join(f"{x:.4g}" for x in values)
