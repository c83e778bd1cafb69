"""Why a kernel is wrong: the known mistake, or two, with which the definition gives the kernel's result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..differences import differing, relative_difference
from . import mistakes
from .mistakes import BF16, HALF, TABLES, UNSIGNED
from .tables import only_rounding, only_there, own_table

F64 = np.float64
LORA_BOUND = 1e-5  # relative to the largest element


@dataclass
class Trial:
    """One call of a kernel's function: its arguments, the expected results, and the results found or the fault."""

    function: str
    case: str
    arguments: tuple
    expected: dict[str, np.ndarray]
    found: dict[str, np.ndarray] = field(default_factory=dict)
    fault: str = ""
    cause: str = ""  # of the fault

    def wrong(self) -> list[str]:
        """The outputs that differ."""
        if not self.found:
            return []
        return [name for name, x in self.expected.items() if not agree(self.function, name, self.found[name], x)]


def agree(function: str, name: str, found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether they agree: to the bit, but for the LoRA linear and the offset, a mean, up to rounding in float32."""
    if found.shape != expected.shape:
        return False
    if function.startswith("lora") or name == "offset":
        return relative_difference(found, expected) <= (1e-6 if name == "offset" else LORA_BOUND)
    return not len(positions(name, found, expected))


def positions(name: str, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The flat positions that differ. An absmax of 0 and one of 1e-38, the least divisor, count as equal."""
    if name in ("absmax", "nested_absmax"):
        found, expected = (np.where(a == 0, mistakes.TINY, a) for a in (found, expected))
    return differing(found, expected)


# ---- exact functions: the definition with one keyword changed, or two ---------------------------------------

Mistake = tuple[str, dict[str, Any]]

_TABLE: list[Mistake] = [(f"the table is {name}", {"table": table}) for name, table in TABLES.items()]
_EXACT = "distances decide, or thresholds in double precision; the midpoints rounded to float32 must"
_NAN = "a block of zeros gives NaN; a divisor below 1e-38 must count as 1e-38"
_16_BITS = (("float16", HALF), ("bfloat16", BF16))
_FLUSHED = "numbers below 1.2e-38, subnormal ones, are flushed to zero; they must be kept"
_FLUSHING = "the whole process flushes subnormal numbers to zero: is a library linked with -ffast-math?"
_HALVES: list[Mistake] = [
    (f"a byte holds elements of the first and the second half of {what}; it must hold two neighbours", {"halves": kind})
    for kind, what in (("block", "a block"), ("tensor", "the tensor"))
]
_SMALL: list[Mistake] = [
    (cause.replace("EPS", small), {"least": f"{sign}{small}", "divisor_is": stored})
    for small in ("1e-12", "1e-10", "1e-8", "1e-6", "1e-5")
    for cause, sign, stored in (
        ("EPS is added to the divisor; it must be absmax, or 1e-38 if that is more", "+", "not stored"),
        ("EPS is added to absmax; it must be the largest magnitude itself", "+", "stored"),
        ("the divisor is EPS at least; the least must be 1e-38", ">", "not stored"),
        ("absmax is EPS at least; it must be the largest magnitude itself", ">", "stored"),
    )
]

MISTAKES: dict[str, list[Mistake]] = {
    "quantize": [
        ("a tie goes up; it must take the lower code", {"tie": "up"}),
        ("a code holds from its value up; the nearest value must be taken", {"nearest": "floor"}),
        ("x is divided by absmax; in a full block it must be multiplied by 1 / absmax", {"scaling": "divide"}),
        ("the last, partial block is multiplied by 1 / absmax; it must be divided by absmax", {"tail": "multiplied"}),
        ("the two codes of a byte are swapped; the first belongs in the high nibble", {"low_first": True}),
        (_EXACT, {"midpoints": F64}),
        (_EXACT, {"nearest": "distance"}),
        ("x is scaled in double precision; it must be in float32", {"scaling": "float64"}),
        (_NAN, {"least": "none"}),
        (_NAN, {"least": "none", "nan": 15}),
        ("only an absmax of 0 is guarded; a divisor below 1e-38 must count as 1e-38", {"least": "1, for zeros"}),
        (_FLUSHED, {"flush": True}),
        ("a block of zeros has absmax 1; it must be 0", {"least": "1"}),
        ("an odd size is filled up with code 0; it must be with the code of 0.0, which is 7", {"filling": 0}),
        ("an odd size is filled up with code 15; it must be with the code of 0.0, which is 7", {"filling": 15}),
        ("absmax is signed: the value of the largest magnitude; it must be the magnitude", {"absmax": "signed"}),
        ("absmax is the largest value; it must be the largest magnitude", {"absmax": "maximum"}),
        ("blocks begin anew in every row; they run over the flat tensor", {"blocks": "rows"}),
        ("the tensor is read by columns; it must be row-major", {"order": "F"}),
        ("memory is read as it lies; it must be read in the order of the indices", {"order": "K"}),
        ("x is not scaled; it must be, by 1 / absmax", {"scaling": "none"}),
        ("x is multiplied by absmax; it must be by 1 / absmax", {"scaling": "multiply"}),
        ("a 16-bit tensor is scaled in its own dtype; it must be in float32", {"arithmetic": None}),
        *((f"x is rounded to {name} first; it must stay as it is", {"read_as": t}) for name, t in _16_BITS),
        ("the last, partial block is left out", {"tail": "left out"}),
        *((f"absmax is rounded to {name}; it must stay float32", {"constants": t}) for name, t in _16_BITS),
        *((f"absmax is stored in {name}; it must be float32", {"stored": t}) for name, t in _16_BITS),
        *_HALVES,
        *_SMALL,
        *_TABLE,
        *((cause, mistake | {"filling": 7}) for cause, mistake in _TABLE),
    ],
    "dequantize": [
        ("the two codes of a byte are swapped; the first is in the high nibble", {"low_first": True}),
        ("blocks of 64; they must be of block_size", {"block": 64}),
        ("absmax is looked up by the byte's number; it must be by the element's", {"index": "byte"}),
        ("absmax is that of the next block", {"shift": 1}),
        ("absmax is that of the block before", {"shift": -1}),
        ("blocks begin anew in every row; they run over the flat tensor", {"blocks": "rows"}),
        ("the last, partial block is left out", {"tail": "left out"}),
        ("absmax is not used", {"absmax_is": "unused"}),
        ("the values are divided by absmax; they must be multiplied", {"absmax_is": "divided"}),
        ("the tensor is filled by columns; it must be row-major", {"order": "F"}),
        (_FLUSHED, {"flush": True}),
        *_HALVES,
        *((f"absmax is rounded to {name}; it must stay float32", {"constants": t}) for name, t in _16_BITS),
        *((f"the result is rounded to {name}; it must be float32", {"result": t}) for name, t in _16_BITS),
        *_TABLE,
    ],
    "quantize_constants": [
        ("the offset is missing: the mean must be taken off first", {"offset": "none"}),
        ("the offset is the median; it must be the mean", {"offset": "median"}),
        ("the offset is the minimum; it must be the mean", {"offset": "minimum"}),
        ("the offset is the maximum; it must be the mean", {"offset": "maximum"}),
        ("the mean is returned but not taken off; it must be, before absmax is quantised", {"subtracted": False}),
        ("linear int8; it must be the dynamic map", {"kind": "int8"}),
        ("linear, 128 + round(127 x); it must be the dynamic map", {"kind": "uint8"}),
        ("the dynamic map is the unsigned one; it must be the signed one", {"table": UNSIGNED}),
        ("65,536 bins decide, as in bitsandbytes on a CPU; the nearest value must be taken", {"kind": "bins"}),
        ("blocks of 64; they must be of 256", {"block": 64}),
        ("one block for all; they must be of 256", {"block": 0}),
        ("a tie goes up; it must take the lower code", {"tie": "up"}),
        ("x is divided by absmax; in a full block it must be multiplied by 1 / absmax", {"scaling": "divide"}),
        ("the last, partial block is multiplied by 1 / absmax; it must be divided by absmax", {"tail": "multiplied"}),
    ],
    "dequantize_constants": [
        ("the offset is missing: it must be added", {"with_offset": False}),
        ("the offset is subtracted; it must be added", {"sign": -1.0}),
        ("linear int8; it must be the dynamic map", {"kind": "int8"}),
        ("linear, (code - 128) / 127; it must be the dynamic map", {"kind": "uint8"}),
        ("the dynamic map is the unsigned one; it must be the signed one", {"table": UNSIGNED}),
        ("blocks of 64; they must be of 256", {"block": 64}),
        ("the product is not rounded before the offset is added (a fused multiply-add); it must be", {"fused": True}),
        *((f"the result is rounded to {name}; it must be float32", {"result": t}) for name, t in _16_BITS),
    ],
}


def explain(trials: Sequence[Trial]) -> dict[int, str]:
    """{number of a trial that differs: the likely cause}, of one exact function.

    First tries causes that explain every call at once: one mistake, a table of the kernel's own, or two mistakes. Then
    those that explain some of the calls, at least mostly; then the place of what is wrong. "" if nothing fits.
    """
    different = [i for i, trial in enumerate(trials) if trial.wrong()]
    good = [i for i, trial in enumerate(trials) if trial.found and i not in different]
    # Where the definition itself, computed here, differs from the vectors as the kernel does, it is not the kernel.
    causes = {i: _FLUSHING for i in different if _same(trials[i], {})}
    wrong = [i for i in different if i not in causes]
    if not wrong:
        return causes
    by_size = sorted(wrong, key=lambda i: sum(x.size for x in trials[i].expected.values()))
    known = MISTAKES[trials[wrong[0]].function]
    for cause, changes in itertools.chain(known, own_table(trials), _pairs(known)):
        if all(_same(trials[i], changes) for i in by_size + good):
            return causes | dict.fromkeys(wrong, cause)
    rounding = {i: only_rounding(trials[i]) for i in wrong}
    return causes | (rounding if all(rounding.values()) else _some(trials, wrong, known))


def _pairs(known: list[Mistake]) -> Iterator[Mistake]:
    """All pairs of mistakes that can be combined."""
    for (cause, one), (other_cause, other) in itertools.combinations(known, 2):
        if not one.keys() & other.keys():
            yield f"{cause}; and {other_cause}", one | other


def _some(trials: Sequence[Trial], wrong: Sequence[int], known: list[Mistake]) -> dict[int, str]:
    """For each wrong call, the mistake that explains it and the most others; or that explains most of it."""
    off = {cause: {i: _share_off(trials[i], _made(trials[i], changes)) for i in wrong} for cause, changes in known}
    explained = {cause: [i for i in wrong if not shares[i]] for cause, shares in off.items()}
    for cause, calls in explained.items():  # a block of zeros alone is explained by nearly everything
        if all(_plain(trials[i]) for i in calls):
            explained[cause] = []
    causes = {}
    for i in wrong:
        fitting = [cause for cause, calls in explained.items() if i in calls]
        nearest = min(off, key=lambda cause: off[cause][i])
        if fitting:
            causes[i] = max(fitting, key=lambda cause: len(explained[cause]))
        elif rounding := only_rounding(trials[i]):
            causes[i] = rounding
        elif off[nearest][i] < _share_off(trials[i], trials[i].expected) / 5 and not _plain(trials[i]):
            causes[i] = f"mostly this: {nearest}"
        else:
            causes[i] = ""
    unknown = [i for i in wrong if not causes[i]]
    return causes | dict.fromkeys(unknown, only_there([trials[i] for i in unknown]))


def _plain(trial: Trial) -> bool:
    """Whether so few values are expected that a mistake cannot be told from another."""
    return np.unique(next(iter(trial.expected.values()))).size < 4


def _made(trial: Trial, changes: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The definition's result with these changes; None if it cannot be computed."""
    if trial.function == "quantize_constants" and "offset" in trial.found:  # a mean may differ in its last bits
        close = agree("", "offset", trial.found["offset"], trial.expected["offset"])
        changes = {"given": trial.found["offset"], **changes} if close else changes
    try:
        made = getattr(mistakes, trial.function)(*trial.arguments, **changes)
    except (IndexError, ValueError):
        return None
    made = made if isinstance(made, tuple) else (made,)
    return {name: np.asarray(x) for name, x in zip(trial.expected, made, strict=True)}


def _same(trial: Trial, changes: dict[str, Any]) -> bool:
    made = _made(trial, changes)
    return made is not None and all(agree(trial.function, name, trial.found[name], x) for name, x in made.items())


def _share_off(trial: Trial, made: dict[str, np.ndarray] | None) -> float:
    """The share of all elements in which the results found differ from those made; 1 if none could be."""
    if made is None:
        return 1.0
    off = total = 0
    for name, x in made.items():
        found = trial.found[name]
        off += x.size if found.shape != x.shape else len(positions(name, found, x))
        total += x.size
    return off / max(total, 1)
