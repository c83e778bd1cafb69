"""Exercises: an answer is compared with what the engine computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

RTOL = 1e-6  # of the largest expected value: sums in another order differ by rounding, a mistake by far more


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and if not, what is wrong with it."""

    right: bool
    text: str

    def __repr__(self) -> str:
        return self.text


def check(answer: Any, expected: Any, *arguments: Any, rtol: float = RTOL) -> Verdict:
    """Compare an answer with what is expected: a number, an array, or a tuple or dict of them.

    Either may be a function: it is called with `arguments`, of which it gets copies. Values may differ by `rtol` times
    the largest expected one; integers, booleans and text must be equal. Several values may come as a tuple or a list.
    An answer that is still None, or a function that returns None, has not been given. What the answer's function raises
    is said, not raised.

        >>> x = np.arange(6.0).reshape(2, 3)
        >>> check(lambda x: x.T, np.transpose, x)
        Right.
        >>> check(lambda x: x, np.transpose, x)
        Not yet: the shape is (2, 3), expected (3, 2).
        >>> check(lambda x: -x, lambda x: x, x)
        Not yet: the sign is wrong.
        >>> check(None, 7)
        Not answered yet: fill it in, and run the cell and this one again.
    """
    wanted = _value(expected, arguments)
    try:
        given = _value(answer, arguments)
    except Exception as error:
        return Verdict(False, f"Not yet: it raises {type(error).__name__}: {error}")
    if given is None:
        fill = "make it return a value" if callable(answer) else "fill it in"
        return Verdict(False, f"Not answered yet: {fill}, and run the cell and this one again.")
    fault = _fault(given, wanted, "", rtol)
    return Verdict(True, "Right.") if fault is None else Verdict(False, f"Not yet: {fault}")


def _value(one: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(one, Callable):  # type: ignore[arg-type]
        return one
    return one(*(a.copy() if isinstance(a, np.ndarray) else a for a in arguments))


def _fault(given: Any, wanted: Any, name: str, rtol: float) -> str | None:
    """What is wrong with the part `name` of an answer; None if it is right."""
    if isinstance(wanted, Mapping):
        if not isinstance(given, Mapping) or set(given) != set(wanted):
            found = f", got {', '.join(map(str, given)) or 'none'}" if isinstance(given, Mapping) else ""
            return f"expected a dict with the keys {', '.join(map(str, wanted))}{found}."
        parts = [(key, given[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, tuple):
        several = isinstance(given, tuple | list)
        if not several or len(given) != len(wanted):
            got = f"{len(given)}" if several else f"one {type(given).__name__}"
            return f"expected {len(wanted)} values, got {got}."
        parts = [(f"value {i + 1}", g, w) for i, (g, w) in enumerate(zip(given, wanted, strict=True))]
    else:
        fault = _wrong_values(given, wanted, rtol)
        return fault and (f"{name}: {fault}" if name else fault)
    faults = (_fault(g, w, f"{name}, {key}" if name else str(key), rtol) for key, g, w in parts)
    return next((fault for fault in faults if fault is not None), None)


def _wrong_values(given: Any, wanted: Any, rtol: float) -> str | None:
    if isinstance(wanted, str):
        return None if given == wanted else f"got {given!r}."
    try:
        g, w = np.asarray(given), np.asarray(wanted)
        if g.shape != w.shape:
            return f"the shape is {g.shape}, expected {w.shape}."
        if g.dtype.kind not in "iubf" and g.dtype.kind != w.dtype.kind:
            return f"expected numbers, got {g.dtype if g.dtype.kind == 'c' else type(given).__name__}."
        if w.dtype.kind in "iub":
            return _unequal(given, g, w)
        g, w = g.astype(np.float64), w.astype(np.float64)
    except (TypeError, ValueError):
        return f"expected numbers, got {type(given).__name__}."
    if not np.isfinite(g).all():
        return "not every value is finite."
    largest = float(abs(w).max(initial=0.0))
    if float(abs(g - w).max(initial=0.0)) <= rtol * largest:
        return None
    if not w.ndim:
        close = ", though that is near: give it without rounding" if abs(g - w) <= 1e-2 * abs(w) else ""
        return f"it is not {float(g):.6g}{close}."
    if np.allclose(g, -w, rtol=0, atol=rtol * largest):
        return "the sign is wrong."
    factor = float((g * w).sum() / (w * w).sum()) if largest else 0.0
    if factor and np.allclose(g, factor * w, rtol=0, atol=rtol * abs(factor) * largest):
        return f"every value is {factor:.6g} times what it should be."
    return f"the largest difference is {abs(g - w).max():.3g}, where the largest value is {largest:.3g}."


def _unequal(given: Any, g: np.ndarray, w: np.ndarray) -> str | None:
    """What is wrong with values that must be equal."""
    wrong = np.argwhere(g != w)
    if not len(wrong):
        return None
    if not w.ndim:
        return f"it is not {given}."
    first = tuple(map(int, wrong[0]))
    if g.dtype.kind == "f" and not (g == np.rint(g)).all():
        return f"expected whole numbers, got {g[first]:.6g}."
    at = first[0] if len(first) == 1 else first
    return f"{len(wrong)} of {w.size} values differ, first at {at}: got {g[first]:g}, expected {w[first]:g}."
