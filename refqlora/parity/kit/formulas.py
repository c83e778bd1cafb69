"""Why a LoRA linear is wrong: another formula for one of its outputs, or a factor on the adapter's part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..differences import relative_difference
from .diagnosis import F64, Trial, agree

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
    """The likely cause of what differs in one output of a LoRA function: a formula that gives it in every call, or a
    factor on it or on the adapter's part."""
    called = [trial for trial in trials if trial.found]
    left: list[str] = []
    bases = []  # of each call: the output without the adapter's part
    for i, trial in enumerate(called):
        formulas = [(c, v) for name, c, v in FORMULAS[trial.function](*trial.arguments) if name == output]
        found = trial.found[output]
        fitting = [cause for cause, value in formulas if agree(trial.function, output, found, value)]
        left = [cause for cause in (fitting if i == 0 else left) if cause in fitting]
        bases.append(next(value for cause, value in formulas if cause.startswith("the adapter's part")))
    causes = [cause for cause in left if cause]
    if causes:
        return causes[0]
    zeros = [np.zeros(())] * len(called)
    cause = _factor(called, output, zeros, output) or _factor(called, output, bases, "the adapter's part")
    if cause:
        return cause
    worst = max(relative_difference(t.found[output], t.expected[output]) for t in called)
    if worst < 2e-3:
        return "it is computed in float16, or on a GPU in TF32: in float32 the difference is 1e-6"
    return "it is computed in bfloat16: in float32 the difference is 1e-6" if worst < 3e-2 else ""


def _factor(called: Sequence[Trial], output: str, bases: Sequence[np.ndarray], what: str) -> str:
    """Said if the rest of the output, without a base that is right, is a multiple of what it must be; else ""."""
    factors: dict[str, float] = {}
    for trial, base in zip(called, bases, strict=True):
        found, expected = (side[output].astype(F64) - base for side in (trial.found, trial.expected))
        nothing = agree(trial.function, output, trial.expected[output], base + 0 * expected)  # but rounding is left
        factor = 0.0 if nothing else float((found * expected).sum() / (expected**2).sum())
        if not agree(trial.function, output, trial.found[output], base + factor * expected):
            return ""
        if not nothing:
            factors[trial.case] = round(factor, 6)
    values = list(factors.values())
    if np.ptp(values) < 1e-4 * abs(values[0]):
        return f"{what} is {values[0]:.4g} times what it must be"
    case = max(factors, key=lambda case: abs(factors[case] - 1))
    return f"{what} is a multiple of what it must be, another in each call: {factors[case]:.4g} times in {case}"


# ---- calls that failed: matrices taken for another shape ------------------------------------------------------

_ORIENTATIONS: dict[str, Callable[..., tuple]] = {
    _W: lambda W, A, B: (W.T, A, B),
    "A is taken for (in, r), so that it is not transposed; it is (r, in)": lambda W, A, B: (W, A.T, B),
    "B is taken for (r, out), so that it is not transposed; it is (out, r)": lambda W, A, B: (W, A, B.T),
    "A and B are taken for (in, r) and (r, out); they are (r, in) and (out, r)": lambda W, A, B: (W, A.T, B.T),
    "A and B are taken for each other: first A (r, in), then B (out, r)": lambda W, A, B: (W, B, A),
}


def orientation(function: Any, trial: Trial) -> str:
    """Why a LoRA function failed: with its matrices turned this way it computes y or dx rightly."""
    if not trial.function.startswith("lora"):
        return ""
    start = 2 if trial.function.endswith("backward") else 1
    before, matrices, after = trial.arguments[:start], trial.arguments[start : start + 3], trial.arguments[start + 3 :]
    for cause, turned in _ORIENTATIONS.items():
        with contextlib.suppress(Exception, SystemExit), np.errstate(all="ignore"):
            found = function(*before, *(x.copy() for x in turned(*matrices)), *after)
            first = found[0] if isinstance(found, tuple | list) else found  # y or dx: neither depends on the others
            if agree(trial.function, "", np.asarray(first), next(iter(trial.expected.values()))):
                return cause
    return ""
