"""The definitions of a kernel's exact functions, in the fewest lines, and the mistakes that people make in them.

Each definition takes keywords that change one thing. The defaults are right; every other value is a mistake that
diagnosis.py knows by name. The definitions are independent of the engine, so that each checks the other.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import ml_dtypes
import numpy as np
from scipy.special import ndtri

from ...codebooks import DYNAMIC, FP4, INT4, NF4, dynamic_map

F32 = np.float32
TINY = F32(1e-38)  # the least divisor
HALF, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


# ---- wrong tables ------------------------------------------------------------------------------------------


def _quantiles(linspace: Any, dtype: Any) -> np.ndarray:
    p = 0.9677083
    above, below = ndtri(linspace(p, 0.5, 9)[:-1].astype(float)), -ndtri(linspace(p, 0.5, 8)[:-1].astype(float))
    values = np.sort(np.concatenate([above, [0], below]).astype(dtype))
    return (values / values[-1]).astype(F32)


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
TABLES = {
    "NF4 made in float64 throughout": _quantiles(np.linspace, np.float64),
    "NF4 made with numpy.linspace in float32": _quantiles(functools.partial(np.linspace, dtype=F32), F32),
    "NF4 rounded to four decimals": np.round(NF4.astype(np.float64), 4).astype(F32),
    "NF4 rounded to bfloat16": NF4.astype(BF16).astype(F32),
    "NF4 rounded to float16": NF4.astype(HALF).astype(F32),
    "FP4": FP4,
    "FP4 of the E2M1 format, divided by 6": np.array([*E2M1, *(-x for x in E2M1)], F32) / F32(6),
    "int4, (code - 8) / 7": INT4,
    "int4, (code - 8) / 8": np.arange(-8, 8, dtype=F32) / F32(8),
    "uint4, 2 code / 15 - 1": (np.arange(16) / 7.5 - 1).astype(F32),
}


# ---- 4 bits ------------------------------------------------------------------------------------------------


def quantize(
    w: np.ndarray,
    block_size: int,
    *,
    table: np.ndarray = NF4,
    tie: str = "lower",
    midpoints: Any = F32,
    nearest: str = "threshold",
    thresholds: np.ndarray | None = None,
    scaling: str = "reciprocal",
    tail: str = "divided",
    least: str = "1e-38",
    divisor_is: str = "not stored",
    nan: int = 0,
    absmax: str = "magnitude",
    constants: Any = F32,
    stored: Any = F32,
    blocks: str = "flat",
    order: Literal["C", "F", "K"] = "C",
    arithmetic: Any = F32,
    read_as: Any = None,
    flush: bool = False,
    low_first: bool = False,
    halves: str = "",
    renumbered: np.ndarray | None = None,
    filling: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """-> packed uint8 (ceil(n / 2),), absmax float32 (blocks,)."""
    dtype = w.dtype if arithmetic is None else np.dtype(arithmetic)
    flat = w.ravel(order) if order != "C" else np.ascontiguousarray(w).reshape(-1)
    with np.errstate(over="ignore"):
        flat = flat.astype(flat.dtype if read_as is None else read_as).astype(dtype)
    flat = flushed(flat) if flush else flat
    rows, counts = in_blocks(flat, w.shape, block_size, blocks)
    with np.errstate(all="ignore"):
        a = _absmax(rows, counts, absmax).astype(constants).astype(dtype)
        divisor = a
        if least == "1e-38":
            divisor = np.where(np.abs(a) < TINY.astype(dtype), TINY.astype(dtype), a)
        elif least in ("1", "1, for zeros"):
            divisor = np.where(a == 0, dtype.type(1), a)
        elif least[0] in "+>":  # a small number is added, or is the least
            small = dtype.type(float(least[1:]))
            divisor = a + small if least[0] == "+" else np.maximum(a, small)
        full = (counts == block_size)[:, None]
        over, times = rows / divisor[:, None], rows * (dtype.type(1) / divisor)[:, None]
        if scaling == "float64":
            scaled = rows.astype(np.float64) / divisor[:, None]
        elif scaling == "divide":
            scaled = over
        elif scaling in ("none", "multiply"):
            scaled = rows if scaling == "none" else rows * divisor[:, None]
        else:
            scaled = np.where(full | (tail == "multiplied"), times, over)
    how = (table, tie, midpoints, nearest, thresholds)
    codes = _codes(scaled.astype(np.float64 if scaling == "float64" else F32), *how, nan)
    if tail == "left out":
        codes = np.where(full, codes, 0)
    codes = codes[np.arange(block_size) < counts[:, None]].astype(np.uint8)
    if renumbered is not None:
        codes = renumbered[codes]
    if codes.size % 2:
        how = (table, "lower", F32, "threshold", thresholds)
        zero = _codes(np.zeros((1, 1)), *how, 0)[0, 0] if filling is None else filling
        codes = np.append(codes, zero).astype(np.uint8)
    if halves:
        codes = codes[_halves(codes.size, block_size if halves == "block" else codes.size)]
    first, second = (codes[1::2], codes[0::2]) if low_first else (codes[0::2], codes[1::2])
    out = (divisor if least == "1" or divisor_is == "stored" else a).astype(F32)
    if counts[-1] < block_size:
        out[-1] = 0 if tail == "left out" else TINY if np.abs(out[-1]) < TINY and least == "1e-38" else out[-1]
    with np.errstate(over="ignore"):
        return first << 4 | second, out.astype(stored).astype(F32)


def in_blocks(flat: np.ndarray, shape: tuple[int, ...], size: int, blocks: str) -> tuple[np.ndarray, np.ndarray]:
    """The blocks, padded with zeros, (blocks, size), and the number of elements in each, (blocks,)."""
    row = flat.size if blocks == "flat" else shape[-1]
    a_row = -(-row // size)
    filled = np.zeros((flat.size // row, a_row * size), flat.dtype)
    filled[:, :row] = flat.reshape(-1, row)
    counts = np.full(a_row, size)
    counts[-1] = row - (a_row - 1) * size
    return filled.reshape(-1, size), np.tile(counts, flat.size // row)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers are zeros, as on a GPU or with -ffast-math."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, x.dtype.type(0), x)


def _halves(n: int, size: int) -> np.ndarray:
    """The order (n,) of elements, n even, in which each block's second half is paired with its first."""
    i = np.arange(n)
    start = i // size * size
    half = np.minimum(size, n - start) // 2
    return start + (i - start) // 2 + (i - start) % 2 * half


def _absmax(rows: np.ndarray, counts: np.ndarray, kind: str) -> np.ndarray:
    if kind == "signed":
        return np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    if kind == "maximum":
        return rows.max(axis=1)
    return np.abs(rows).max(axis=1)


def _codes(
    scaled: np.ndarray, table: np.ndarray, tie: str, midpoints: Any, nearest: str, thresholds: Any, nan: int
) -> np.ndarray:
    by_value = np.argsort(table, kind="stable").astype(np.uint8)
    values = table[by_value]
    if nearest == "distance":
        codes = by_value[np.abs(scaled[..., None] - values).argmin(axis=-1)]
    elif nearest == "floor":  # truncated, not rounded
        codes = by_value[np.clip(np.searchsorted(values, scaled, side="right") - 1, 0, 15)]
    else:
        if thresholds is None:
            wide = values.astype(midpoints)
            thresholds = (wide[1:] + wide[:-1]) / midpoints(2)
        codes = by_value[np.searchsorted(thresholds, scaled, side="left" if tie == "lower" else "right")]
    return np.where(np.isnan(scaled), np.uint8(nan), codes)


def dequantize(
    packed: np.ndarray,
    absmax: np.ndarray,
    block_size: int,
    shape: tuple[int, ...],
    *,
    table: np.ndarray = NF4,
    low_first: bool = False,
    constants: Any = F32,
    result: Any = F32,
    blocks: str = "flat",
    index: str = "element",
    block: int = 0,
    shift: int = 0,
    halves: str = "",
    flush: bool = False,
    tail: str = "kept",
    absmax_is: str = "multiplied",
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """-> float32 of `shape`."""
    n = int(np.prod(shape))
    high, low = packed >> 4, packed & 15
    codes = np.stack([low, high] if low_first else [high, low], axis=1).reshape(-1)
    if halves:
        pairs = codes.copy()
        codes[_halves(codes.size, block_size if halves == "block" else codes.size)] = pairs
    codes = codes[:n]
    i = np.arange(n)
    if index == "byte":
        i = i // 2
    number = i // (block or block_size) + shift
    if blocks == "rows":
        number = i // shape[-1] * -(-shape[-1] // block_size) + i % shape[-1] // block_size
    with np.errstate(all="ignore"):
        scale = absmax.astype(constants).astype(F32)[np.minimum(number, absmax.size - 1)]
        if absmax_is == "unused":
            back = table[codes]
        elif absmax_is == "divided":
            back = table[codes] / scale
        else:
            back = table[codes] * scale
        back = back.astype(result).astype(F32)
    back = flushed(back) if flush else back
    if tail == "left out":
        back[n // block_size * block_size :] = 0
    return back.reshape(shape, order=order)


# ---- the constants' 8 bits ---------------------------------------------------------------------------------


def quantize_constants(
    absmax: np.ndarray,
    *,
    offset: str = "mean",
    given: Any = None,
    table: np.ndarray = DYNAMIC,
    kind: str = "nearest",
    block: int = 256,
    tie: str = "lower",
    scaling: str = "reciprocal",
    tail: str = "divided",
    subtracted: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """-> codes uint8 (blocks,), nested absmax float32 (ceil(blocks / 256),), offset float32.

    given: an offset to use instead, as a mean in float32 depends on the order of summation.
    """
    averages: dict[str, Any] = {"mean": np.mean, "median": np.median, "minimum": np.min, "maximum": np.max}
    averages["none"] = lambda x: 0.0
    mean = F32(averages[offset](absmax.astype(np.float64))) if given is None or offset != "mean" else F32(given)
    x = absmax - mean if subtracted else absmax
    size = block or x.size
    rows, counts = in_blocks(x, x.shape, size, "flat")
    a = np.abs(rows).max(axis=1)
    divisor = np.maximum(a, TINY)[:, None]
    times = ((counts == size)[:, None] | (tail == "multiplied")) & (scaling == "reciprocal")
    scaled = np.where(times, rows * (F32(1) / divisor), rows / divisor)
    if kind == "int8":
        codes = np.clip(np.rint(scaled * F32(127)), -128, 127).astype(np.int8).view(np.uint8)
    elif kind == "uint8":
        codes = np.clip(np.rint(scaled * F32(127)) + 128, 0, 255).astype(np.uint8)
    elif kind == "bins":
        bins = ((np.clip(rows * (F32(1) / divisor), -1, 1) + 1) * F32(0.5) * F32(65535) + F32(0.5)).astype(np.uint16)
        centres = 2 * np.arange(65536, dtype=F32) / F32(65535) - 1
        codes = np.searchsorted((DYNAMIC[1:] + DYNAMIC[:-1]) / F32(2), centres).astype(np.uint8)[bins]
        codes[a == 0] = 0
    else:
        middle = (table[1:] + table[:-1]) / F32(2)
        codes = np.searchsorted(middle, scaled, side="left" if tie == "lower" else "right").astype(np.uint8)
    return codes.reshape(-1)[: x.size], a, mean


def dequantize_constants(
    codes: np.ndarray,
    nested_absmax: np.ndarray,
    offset: np.float32,
    *,
    table: np.ndarray = DYNAMIC,
    with_offset: bool = True,
    sign: float = 1.0,
    block: int = 256,
    kind: str = "table",
    fused: bool = False,
    result: Any = F32,
) -> np.ndarray:
    """-> absmax float32 (blocks,)."""
    number = np.minimum(np.arange(codes.size) // block, nested_absmax.size - 1)
    values: np.ndarray
    if kind == "int8":
        values = codes.view(np.int8) / F32(127)
    elif kind == "uint8":
        values = (codes.astype(F32) - F32(128)) / F32(127)
    else:
        values = table[codes]
    wide = np.float64 if fused else F32  # the product of two floats is exact in float64
    with np.errstate(all="ignore"):
        product = values.astype(wide) * nested_absmax[number]
        return (product + (F32(sign) * offset if with_offset else F32(0))).astype(F32).astype(result).astype(F32)


UNSIGNED = dynamic_map(signed=False)
