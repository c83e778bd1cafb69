"""Checks at the doors: input is checked once, where it enters, and every error reads NAME: expected X, got Y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, array_module

CHUNK = 1 << 16  # elements checked at a time


class Rule(NamedTuple):
    """What a value must be, in words, and a function that tests it."""

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
POSITIVE = number(1e-30, 1e30)  # float32 holds it and its reciprocal
TOKEN = whole(0)
TOKENS = Rule("a token or a list of tokens", _tokens)


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, whose message begins with `name`, unless the value fits the rule."""
    if not rule.fits(value):
        raise ValueError(f"{name}: expected {rule.expected}, got {shown(value)}")


def shown(value: Any, longest: int = 60) -> str:
    """A value as an error message shows it: on one line, cut to `longest` characters."""
    try:
        return cut(" ".join(repr(value).split()), longest)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of thousands of lists
        return f"{type(value).__name__} too large to show"


def cut(text: str, longest: int) -> str:
    """Text from a file, safe to print: cut to `longest` characters, then control characters escaped."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def finite(name: str, x: Array, dtype: Any = None) -> Array:
    """x cast to `dtype`, if given; x itself if nothing needs casting. Raises ValueError, whose message begins with
    `name`, for the first element that is NaN, infinite or too large for `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(x.dtype if dtype is None else dtype, copy=False)
    xp, flat = array_module(y), y.ravel(order="K")  # in memory order
    if all(xp.isfinite(flat[start : start + CHUNK]).all() for start in range(0, flat.size, CHUNK)):
        return y
    at = tuple(int(i) for i in np.unravel_index(int((~xp.isfinite(y.reshape(-1))).argmax()), y.shape))
    expected = f"a number that {y.dtype} holds" if xp.isfinite(x[at]) else "finite numbers"
    raise ValueError(f"{name}: expected {expected}, got {x[at]} at {at}")
