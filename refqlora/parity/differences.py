"""How far two results are apart: in bits, or relative to a tensor's largest element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Outcome(NamedTuple):
    """What a comparison found: the difference of each part, of how many elements, and what to say with it.

    Where every bit must agree a difference is a number of elements; otherwise it is relative (relative_difference).
    """

    parts: dict[str, float]
    elements: int
    note: str = ""


def differing(found: Any, expected: Any) -> np.ndarray:
    """The flat positions of the elements whose bits differ, (n,) of int64; -0.0 counts as 0.0, and NaN as any NaN.

    Raises ValueError where shapes or dtypes differ.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"{found.dtype} of shape {found.shape} where {expected.dtype} {expected.shape} is expected")
    return np.flatnonzero(_bits(found) != _bits(expected))


def _bits(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype.kind in "fV":  # ml_dtypes' bfloat16 is of kind V
        x = np.where(np.isnan(x), x.dtype.type(np.nan), x + x.dtype.type(0))  # adding 0.0 turns -0.0 into 0.0
    return x.view(_WORDS[x.dtype.itemsize])


def relative_difference(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest element expected; of dicts of arrays, the worst tensor's.

    Where nothing but zeros is expected it is absolute. NaN differs from everything, as inf. Raises ValueError where
    names or shapes differ.
    """
    if isinstance(expected, Mapping):
        return max(relative_differences(found, expected).values())
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"shape {found.shape} where {expected.shape} is expected")
    if not expected.size:
        return 0.0
    largest = np.abs(expected).max()
    difference = np.abs(found - expected).max() / (largest or 1)
    return float("inf" if np.isnan(difference) else difference)


def relative_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """`relative_difference` of each tensor, by its name."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            which = "is missing" if name in expected else "is one too many"
            raise ValueError(f"{name} {which}: {len(found)} tensors where {len(expected)} are expected")
    return {name: relative_difference(found[name], expected[name]) for name in expected}


def in_one_line(error: BaseException, plain: tuple[type, ...] = (ValueError, OSError)) -> str:
    """What an error says, after its type unless it is one of those whose words are meant for people."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, plain) else f"{type(error).__name__}: {text}"
