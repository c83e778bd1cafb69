"""Checks at the doors: what comes from outside is checked where it enters, and refused in one dialect.

NAME: expected X, got Y
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, array_module

CHUNK = 1 << 16  # elements looked at together


class Rule(NamedTuple):
    """What a value must be, in words, and whether one is."""

    expected: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """A whole number from low to high."""
    return Rule(f"a whole number from {low} to {high}", lambda value: _between(value, low, high, int | np.integer))


def number(low: float, high: float) -> Rule:
    """A number from low to high."""
    types = int | float | np.integer | np.floating
    return Rule(f"a number from {low:g} to {high:g}", lambda value: _between(value, low, high, types))


def _between(value: Any, low: float, high: float, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and bool(low <= value <= high)


def _tokens(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [value]
    return len(several) > 0 and all(TOKEN.fits(token) for token in several)


TEXT = Rule("text", lambda value: isinstance(value, str))
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
SIZE = whole(1)
POSITIVE = number(1e-30, 1e30)  # squares, in float32, are neither 0 nor infinite
TOKEN = whole(0)
TOKENS = Rule("a token or a list of tokens", _tokens)


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, beginning with `name`, unless the value fits the rule."""
    if not rule.fits(value):
        raise ValueError(f"{name}: expected {rule.expected}, got {shown(value)}")


def shown(value: Any, longest: int = 60) -> str:
    """A value as an error shows it: on one line, cut where it is long."""
    try:
        return cut(" ".join(repr(value).split()), longest)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of thousands of lists
        return f"{type(value).__name__} too large to show"


def cut(text: str, longest: int) -> str:
    """Text from a file for a terminal: of `longest` characters at most, none of which the terminal would obey."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def finite(name: str, x: Array, dtype: Any = None) -> Array:
    """x, in `dtype` if one is given, not copied where it has it. Raises ValueError, beginning with `name`, for the
    first element that is NaN or infinite, or is beyond what `dtype` holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(x.dtype if dtype is None else dtype, copy=False)
    xp, flat = array_module(y), y.ravel(order="K")  # as it lies in memory
    if all(xp.isfinite(flat[start : start + CHUNK]).all() for start in range(0, flat.size, CHUNK)):
        return y
    at = tuple(int(i) for i in np.unravel_index(int((~xp.isfinite(y.reshape(-1))).argmax()), y.shape))
    expected = f"what {y.dtype} holds" if xp.isfinite(x[at]) else "finite numbers"
    raise ValueError(f"{name}: expected {expected}, got {x[at]} at {at}")
