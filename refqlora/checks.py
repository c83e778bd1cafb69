"""Checks at the doors: input is checked once, where it enters, and every error reads NAME: expected X, got Y."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
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


def one_of(names: Sequence[str]) -> Rule:
    """One of these names."""
    return Rule(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _tokens(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [value]
    return len(several) > 0 and all(TOKEN.fits(token) for token in several)


TEXT = Rule("text", lambda value: isinstance(value, str))
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
SIZE = whole(1)
POSITIVE = number(1e-30, 1e30)  # float32 holds it and its reciprocal
TOKEN = whole(0)
TOKENS = Rule("a token or a list of tokens", _tokens)
NAMES = Rule("names", lambda value: isinstance(value, Collection) and all(isinstance(name, str) for name in value))
SEED = whole(0, 2**64 - 1)
PATH = Rule("a path", lambda value: isinstance(value, str | os.PathLike) and "\0" not in str(value))


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, whose message begins with `name`, unless the value fits the rule."""
    if not rule.fits(value):
        raise ValueError(f"{name}: expected {rule.expected}, got {shown(value)}")


def as_path(name: str, value: Any) -> Path:
    """The value as a Path. Raises ValueError, beginning with `name`, if it is none."""
    check(name, value, PATH)
    return Path(value)


def as_dtype(name: str, value: Any, dtypes: Sequence[Any]) -> np.dtype:
    """The dtype that a value stands for. Raises ValueError, beginning with `name`, unless it is one of `dtypes`."""
    try:
        found = None if value is None else np.dtype(value)
    except Exception:  # NumPy has many of its own
        found = None
    if found is None or found not in [np.dtype(dtype) for dtype in dtypes]:  # None equals float64
        expected = ", ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise ValueError(f"{name}: expected one of {expected}, got {shown(value)}")
    return found


def check_array(name: str, x: Any, kinds: str, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError, beginning with `name`, unless x is an array, of one of these kinds of dtype ("f": floats, "iu":
    integers), and of `shape` if one is given."""
    dtype: Any = getattr(x, "dtype", None)
    masked = isinstance(x, np.ndarray) and type(x) not in (np.ndarray, np.memmap)  # whose arithmetic is another
    is_array = isinstance(dtype, np.dtype) and dtype.type is not np.void and hasattr(x, "reshape") and not masked
    if not is_array or dtype.kind not in kinds or shape not in (None, x.shape):
        what = "floats" if "f" in kinds else "integers"
        raise ValueError(f"{name}: expected {what}{'' if shape is None else f' of shape {shape}'}, got {shown(x)}")


def check_mapping(name: str, value: Any) -> None:
    """Raise ValueError, beginning with `name`, unless the value is a mapping by names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: expected a mapping by names, got {shown(value)}")


def shown(value: Any, longest: int = 60) -> str:
    """A value as an error message shows it: on one line, cut to `longest` characters; an array by its
    dtype and shape."""
    if isinstance(getattr(value, "dtype", None), np.dtype) and getattr(value, "shape", None):
        kind = "" if type(value) is np.ndarray else f"{type(value).__name__} of "
        return f"{kind}{value.dtype} of shape {value.shape}"
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
