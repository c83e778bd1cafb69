"""Which module an array belongs to, NumPy or CuPy, and what this process may use. No other file knows of devices."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # a numpy.ndarray or a cupy.ndarray: the engine runs on either


def array_module(x: Array) -> ModuleType:
    """The module, numpy or cupy, whose functions work on `x`. CuPy is never imported: whoever made `x` has done so."""
    if hasattr(x, "array_module"):  # a hollow array, whose bytes are only counted: memory/hollow.py
        return x.array_module
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def on_gpu(xp: ModuleType) -> bool:
    """Whether the arrays of this module live on a GPU, where large pieces are fast and small ones are not."""
    return xp.__name__ == "cupy"


def pieces(n: int, size: int, xp: ModuleType) -> Iterator[tuple[int, int]]:
    """0..n in pieces (start, stop) of `size`, the last one shorter. Of hollow arrays the first two stand for all: each
    holds the same bytes, and what one leaves in its variables lies beside the next."""
    if xp.__name__ == "hollow":
        n = min(n, 2 * size)
    return ((start, min(start + size, n)) for start in range(0, n, max(size, 1)))


def uniform(rng: np.random.Generator, like: Array) -> Array:
    """Uniform random numbers from 0 to below 1, float32, of the shape of `like` and on its device; the same on each."""
    xp = array_module(like)
    if xp.__name__ == "hollow":
        return xp.empty(like.shape, np.float32)
    return xp.asarray(rng.random(like.shape, np.float32))


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for reuse instead of handing them back to the system; elsewhere do nothing.

    A training step allocates and frees the same large arrays again and again, and each fresh page costs a page fault.
    The process's memory then stays at its peak, so this is for the command line and for scripts, not for import.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)
