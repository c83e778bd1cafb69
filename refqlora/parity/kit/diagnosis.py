"""Why a kernel is wrong: the known mistake, or two, with which the definition gives the kernel's result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..differences import differing, relative_difference
from . import mistakes
from .mistakes import BF16, HALF, TABLES, UNSIGNED
from .tables import own_table

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
        ("a block of zeros has absmax 1; it must be 0", {"least": "1"}),
        ("an odd size is filled up with code 0; it must be with the code of 0.0, which is 7", {"filling": 0}),
        ("an odd size is filled up with code 15; it must be with the code of 0.0, which is 7", {"filling": 15}),
        ("absmax is signed: the value of the largest magnitude; it must be the magnitude", {"absmax": "signed"}),
        ("absmax is the largest value; it must be the largest magnitude", {"absmax": "maximum"}),
        ("blocks begin anew in every row; they run over the flat tensor", {"blocks": "rows"}),
        ("the tensor is read by columns; it must be row-major", {"order": "F"}),
        ("memory is read as it lies; it must be read in the order of the indices", {"order": "K"}),
        ("a 16-bit tensor is scaled in its own dtype; it must be in float32", {"arithmetic": None}),
        ("the last, partial block is left out", {"tail": "left out"}),
        *((f"absmax is rounded to {name}; it must stay float32", {"constants": t}) for name, t in _16_BITS),
        *((f"absmax is stored in {name}; it must be float32", {"stored": t}) for name, t in _16_BITS),
        *_TABLE,
        *((cause, mistake | {"filling": 7}) for cause, mistake in _TABLE),
    ],
    "dequantize": [
        ("the two codes of a byte are swapped; the first is in the high nibble", {"low_first": True}),
        ("absmax is looked up by the byte's number; it must be by the element's", {"index": "byte"}),
        ("blocks begin anew in every row; they run over the flat tensor", {"blocks": "rows"}),
        ("the last, partial block is left out", {"tail": "left out"}),
        ("absmax is not used", {"absmax_is": "unused"}),
        ("the values are divided by absmax; they must be multiplied", {"absmax_is": "divided"}),
        ("the tensor is filled by columns; it must be row-major", {"order": "F"}),
        *((f"absmax is rounded to {name}; it must stay float32", {"constants": t}) for name, t in _16_BITS),
        *((f"the result is rounded to {name}; it must be float32", {"result": t}) for name, t in _16_BITS),
        *_TABLE,
    ],
    "quantize_constants": [
        ("the offset is missing: the mean must be taken off first", {"offset": "none"}),
        ("the offset is the median; it must be the mean", {"offset": "median"}),
        ("the offset is the minimum; it must be the mean", {"offset": "minimum"}),
        ("linear int8; it must be the dynamic map", {"kind": "int8"}),
        ("linear, 128 + round(127 x); it must be the dynamic map", {"kind": "uint8"}),
        ("the dynamic map is the unsigned one; it must be the signed one", {"table": UNSIGNED}),
        ("65,536 bins decide, as in bitsandbytes on a CPU; the nearest value must be taken", {"kind": "bins"}),
        ("blocks of 64; they must be of 256", {"block": 64}),
        ("one block for all; they must be of 256", {"block": 0}),
        ("a tie goes up; it must take the lower code", {"tie": "up"}),
        ("x is divided by absmax; in a full block it must be multiplied by 1 / absmax", {"scaling": "divide"}),
    ],
    "dequantize_constants": [
        ("the offset is missing: it must be added", {"with_offset": False}),
        ("the offset is subtracted; it must be added", {"sign": -1.0}),
        ("linear int8; it must be the dynamic map", {"kind": "int8"}),
        ("linear, (code - 128) / 127; it must be the dynamic map", {"kind": "uint8"}),
        ("the dynamic map is the unsigned one; it must be the signed one", {"table": UNSIGNED}),
        ("blocks of 64; they must be of 256", {"block": 64}),
    ],
}


def explain(trials: Sequence[Trial]) -> dict[int, str]:
    """{number of a trial that differs: the likely cause}, of one exact function.

    First tries causes that explain every call at once: one mistake, a table of the kernel's own, or two mistakes. Then
    those that explain a single call, at least mostly; "" if nothing does.
    """
    wrong = [i for i, trial in enumerate(trials) if trial.wrong()]
    if not wrong:
        return {}
    by_size = sorted(wrong, key=lambda i: sum(x.size for x in trials[i].expected.values()))
    good = [i for i, trial in enumerate(trials) if trial.found and i not in wrong]
    function = trials[wrong[0]].function
    for cause, changes in itertools.chain(MISTAKES[function], own_table(trials), _pairs(function)):
        if all(_same(trials[i], changes) for i in by_size + good):
            return dict.fromkeys(wrong, cause)
    return {i: _of_one(trials[i]) for i in wrong}


def _pairs(function: str) -> Iterator[Mistake]:
    """All pairs of mistakes that can be combined."""
    for (cause, one), (other_cause, other) in itertools.combinations(MISTAKES[function], 2):
        if not one.keys() & other.keys():
            yield f"{cause}; and {other_cause}", one | other


def _of_one(trial: Trial) -> str:
    small = sum(x.size for x in trial.expected.values()) < 1_000
    for cause, changes in itertools.chain(MISTAKES[trial.function], _pairs(trial.function) if small else ()):
        if _same(trial, changes):
            return cause
    before, best, nearest = _share_off(trial, trial.expected), 1.0, ""
    for cause, changes in MISTAKES[trial.function]:
        made = _made(trial, changes)
        off = 1.0 if made is None else _share_off(trial, made)
        if off < best:
            best, nearest = off, cause
    return f"mostly this: {nearest}" if best < before / 5 else ""


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


def _share_off(trial: Trial, made: dict[str, np.ndarray]) -> float:
    """The share of all elements in which the results found differ from those made."""
    off = total = 0
    for name, x in made.items():
        found = trial.found[name]
        off += x.size if found.shape != x.shape else len(positions(name, found, x))
        total += x.size
    return off / max(total, 1)


# ---- the LoRA linear: another formula for one of its outputs -------------------------------------------------


_W = "W is taken for (in, out), so that it is not transposed; it is (out, in)"


def _scales(s: float, r: int) -> dict[str, float]:
    return {
        "the scale is missing": 1.0,
        "the scale is applied twice": s * s,
        "scaled by alpha; it must be by alpha / r, the scale given": s * r,
        "the scale is divided by r once more": s / r,
        "scaled by alpha / sqrt(r), which is rsLoRA": s * r**0.5,
        "the scale's sign is wrong": -s,
        "the adapter's part is missing": 0.0,
    }


def _masks(keep: np.ndarray | None, rate: float) -> dict[str, Any]:
    if keep is None:
        return {"": 1.0}
    keep = keep.astype(np.float64)
    return {
        "": keep / (1 - rate),
        "what dropout keeps is not divided by 1 - rate": keep,
        "what dropout keeps is multiplied by 1 - rate; it must be divided": keep * (1 - rate),
        "dropout is not applied": np.ones_like(keep),
        "dropout's mask is inverted": (1 - keep) / (1 - rate),
    }


def _forward(x: Any, W: Any, A: Any, B: Any, scale: float, keep: Any = None, rate: float = 0.0) -> Iterator[tuple]:
    """("y", cause, value) for every wrong formula."""
    right = _masks(keep, rate)[""]
    x, W, A, B = (np.asarray(t, F64) for t in (x, W, A, B))
    s, r = float(scale), len(A)
    base, z = x @ W.T, (x * right) @ A.T
    for cause, factor in _scales(s, r).items():
        yield "y", cause, base + factor * z @ B.T
    for cause, mask in _masks(keep, rate).items():
        yield "y", cause, base + s * ((x * mask) @ A.T) @ B.T
    yield "y", "the scale is applied to x W^T as well", s * (base + z @ B.T)
    yield "y", "x W^T is missing", s * z @ B.T
    yield "y", _W, x @ W.reshape(x.shape[1], -1) + s * z @ B.T
    yield "y", "A is reshaped to (in, r); it must be transposed", base + s * (x * right) @ A.reshape(-1, r) @ B.T
    yield "y", "B is reshaped to (r, out); it must be transposed", base + s * z @ B.reshape(r, -1)
    if keep is not None:
        yield "y", "dropout is applied to the input of W as well", (x * right) @ W.T + s * z @ B.T
    if W.shape[0] == W.shape[1]:
        yield "y", "A and B are transposed: x B A", base + s * (x * right) @ B @ A


def _backward(
    dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float, keep: Any = None, rate: float = 0.0
) -> Iterator[tuple]:
    right = _masks(keep, rate)[""]
    dy, x, W, A, B = (np.asarray(t, F64) for t in (dy, x, W, A, B))
    s, r, n = float(scale), len(A), len(x)
    base, part = dy @ W, (dy @ B @ A) * right
    dA, dB = (dy @ B).T @ (x * right), dy.T @ ((x * right) @ A.T)
    for cause, factor in _scales(s, r).items():
        yield "dx", cause.replace("adapter's part", "adapter's part, scale dy B A,"), base + factor * part
        yield "dA", cause, factor * dA
        yield "dB", cause, factor * dB
    for cause, mask in _masks(keep, rate).items():
        yield "dx", cause, base + s * (dy @ B @ A) * mask
        yield "dA", cause, s * (dy @ B).T @ (x * mask)
        yield "dB", cause, s * dy.T @ ((x * mask) @ A.T)
    yield "dx", "the part of W, dy W, is missing", s * part
    yield "dx", "the scale is applied to dy W as well", s * (base + part)
    yield "dx", _W, dy @ W.reshape(-1, W.shape[0]).T + s * part
    for name, right_one in (("dx", base + s * part), ("dA", s * dA), ("dB", s * dB)):
        yield name, "the mean over the rows; it must be the sum", right_one / n
        yield name, "divided by the number of outputs; dy is the gradient already", right_one / W.shape[0]
    yield "dA", "B is reshaped to (r, out), not transposed", s * (dy @ B.reshape(r, -1).T).T @ (x * right)
    if W.shape[0] == W.shape[1]:
        yield "dx", "A and B are transposed", base + s * dy @ A.T @ B.T
        yield "dA", "A is where B must be", s * (dy @ A.T).T @ (x * right)
        yield "dB", "B is where A must be", s * dy.T @ ((x * right) @ B)


FORMULAS: dict[str, Callable[..., Iterator[tuple]]] = {
    "lora_forward": _forward,
    "lora_backward": _backward,
    "lora_dropout_forward": _forward,
    "lora_dropout_backward": _backward,
}


def explain_lora(trials: Sequence[Trial], output: str) -> str:
    """The likely cause of what differs in one output of a LoRA function: a formula that gives it in every call."""
    called = [trial for trial in trials if trial.found]
    left: list[str] = []
    for i, trial in enumerate(called):
        formulas = FORMULAS[trial.function](*trial.arguments)
        found = trial.found[output]
        fitting = [c for name, c, value in formulas if name == output and agree(trial.function, output, found, value)]
        left = [cause for cause in (fitting if i == 0 else left) if cause in fitting]
    causes = [cause for cause in left if cause]
    if causes:
        return causes[0]
    worst = max(relative_difference(t.found[output], t.expected[output]) for t in called)
    if worst < 2e-3:
        return "it is computed in float16, or on a GPU in TF32: in float32 the difference is 1e-6"
    return "it is computed in bfloat16: in float32 the difference is 1e-6" if worst < 3e-2 else ""
