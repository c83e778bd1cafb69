"""Checks at the doors: what comes from outside is checked where it enters, and refused in one dialect.

NAME: expected X, got Y
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


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
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of thousands of lists
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= longest else text[: longest - 3] + "..."
