"""Differences between two results: in bits, or relative to a tensor's largest element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Observed = dict[str, np.ndarray]  # the libraries' results
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Outcome(NamedTuple):
    """The result of a comparison: the difference of each part, the number of elements compared, and a note.

    If every bit must agree, a difference is a number of elements; otherwise it is relative (relative_difference).
    """

    parts: dict[str, float]
    elements: int
    note: str = ""


def differing(found: Any, expected: Any) -> np.ndarray:
    """The flat positions of the elements whose bits differ, (n,) of int64; -0.0 counts as 0.0, and NaN as any NaN.

    Raises ValueError if shapes or dtypes differ.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"expected {expected.dtype} of shape {expected.shape}, got {found.dtype} {found.shape}")
    return np.flatnonzero(_bits(found) != _bits(expected))


def _bits(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype.kind in "fV":  # ml_dtypes' bfloat16 is of kind V
        x = np.where(np.isnan(x), x.dtype.type(np.nan), x + x.dtype.type(0))  # adding 0.0 turns -0.0 into 0.0
    return x.view(_WORDS[x.dtype.itemsize])


def ulps(found: Any, expected: Any) -> np.ndarray:
    """How many units in the last place apart two float32 arrays are: the number of float32 steps between each pair of
    elements, int64 of their shape; -0.0 and 0.0 are the same. NaN counts as beyond inf.

        >>> ulps(np.float32([1, 1, -1e-45]), np.float32([1, 1.0000001, 1e-45]))
        array([0, 1, 2])
    """
    a, b = (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (found, expected))
    a, b = (np.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (a, b))  # in the order of the numbers
    return abs(a - b)


def relative_difference(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest element expected; for dicts of arrays, the worst tensor's.

    It is absolute if only zeros are expected, and inf if there is a NaN. Raises ValueError if names or shapes differ.
    """
    if isinstance(expected, Mapping):
        return max(relative_differences(found, expected).values())
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, got {found.shape}")
    if not expected.size:
        return 0.0
    largest = np.abs(expected).max()
    difference = np.abs(found - expected).max() / (largest or 1)
    return float("inf" if np.isnan(difference) else difference)


def relative_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """`relative_difference` of each tensor, by its name."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            which = "missing" if name in expected else "not expected"
            raise ValueError(f"{name} is {which}: expected {len(expected)} tensors, got {len(found)}")
    return {name: relative_difference(found[name], expected[name]) for name in expected}


def in_one_line(error: BaseException, plain: tuple[type, ...] = (ValueError, OSError)) -> str:
    """An error's message on one line, after its type unless it is one of `plain`."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, plain) else f"{type(error).__name__}: {text}"
