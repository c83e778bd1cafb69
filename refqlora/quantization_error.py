"""How far a quantised tensor is from the original, and what bits, block size and outliers do to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .backend import Array, array_module
from .blockwise import CHUNK, TINY, as_codebook
from .checks import check, check_array, finite, number, whole
from .codebooks import FP4, integers, nearest, normal_float, small_float
from .quantization import QuantizedTensor, dequantize


@dataclass(frozen=True)
class Error:
    """How far w' is from w: the sums of (w' - w)^2 and of w^2, and the largest |w' - w|. Errors of several tensors add
    up: `a + b`."""

    squares: float = 0.0
    weight_squares: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Error) -> Error:
        a, b = self, other
        return Error(a.squares + b.squares, a.weight_squares + b.weight_squares, max(a.largest, b.largest))

    @property
    def relative(self) -> float:
        """The root mean square error, divided by the root mean square of w; 0 if w is 0."""
        return (self.squares / self.weight_squares) ** 0.5 if self.weight_squares else 0.0


def error_between(w: Array, back: Array) -> Error:
    """The error of having `back` in place of w, of the same shape, summed in float64."""
    xp = array_module(w)
    flat, back, total = w.reshape(-1), back.reshape(-1), Error()
    for start in range(0, flat.size, CHUNK):
        v = flat[start : start + CHUNK].astype(np.float64)
        e = back[start : start + CHUNK] - v
        total += Error(float(e @ e), float(v @ v), float(xp.abs(e).max()))
    return total


def quantization_error(w: Array, q: QuantizedTensor) -> Error:
    """The error of q, a quantisation of w."""
    return error_between(w, dequantize(q))


# ---- any codebook, in blocks of any size, with constants in float32 ----


def scaled_blocks(w: Array, block_size: int) -> tuple[Array, Array]:
    """w in blocks, each divided by its absmax: float32 (blocks, block_size); and absmax, float32 (blocks, 1).

    w, of any shape, is read row by row, and the last block is filled up with zeros. block_size is any whole number:
    w.size makes one block of all. Raises ValueError unless w is an array of finite numbers.
    """
    check("block_size", block_size, whole(1))
    check_array("w", w, "fV")
    flat = finite("w", w, np.float32).reshape(-1)
    rows = array_module(w).pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)
    absmax = abs(rows).max(axis=1, keepdims=True)
    return rows * (1 / absmax.clip(TINY)), absmax


def rounded(w: Array, codebook: str | np.ndarray = "nf4", block_size: int = 64) -> Array:
    """w as its codes give it back: float32 of w's shape.

    It is what `dequantize(quantize(w, double_quant=False))` is, for a codebook of 2 to 256 values and blocks of any
    size.

        >>> rounded(np.array([1.0, -0.5, 0.25])).round(3)
        array([ 1.   , -0.525,  0.246], dtype=float32)
    """
    codebook = as_codebook(codebook, (2, 256), "rounded")
    x, absmax = scaled_blocks(w, block_size)
    values = array_module(w).asarray(codebook)[nearest(x, codebook)]  # (blocks, block_size)
    return (values * absmax).reshape(-1)[: w.size].reshape(w.shape)


def error_by_bits(w: Array, block_size: int = 64) -> dict[str, dict[int, float]]:
    """The relative error of w against the bits of a code: {family of codebooks: {bits: error}}."""
    families = {
        "NormalFloat": {bits: normal_float(bits) for bits in range(2, 9)},
        "integers": {bits: integers(bits) for bits in range(2, 9)},
        "float E2M1": {4: small_float(2, 1)},
        "float of bitsandbytes": {4: FP4},
    }
    return {
        family: {bits: error_between(w, rounded(w, book, block_size)).relative for bits, book in books.items()}
        for family, books in families.items()
    }


def error_by_block_size(w: Array, sizes: Iterable[int], codebook: str | np.ndarray = "nf4") -> dict[int, float]:
    """The relative error of w against the block size: {block size: error}."""
    return {size: error_between(w, rounded(w, codebook, size)).relative for size in sizes}


def outlier_damage(
    w: Array, outlier: float, block_size: int, codebook: str | np.ndarray = "nf4", at: int = 0
) -> tuple[Error, Error]:
    """What an outlier does to the other weights: the error of those in its block, and that of all in the tensor.

    outlier: element `at` of w, read row by row, becomes this many times the root mean square of w. Its own error is in
    neither. A block of 64 is a small sample: add up the errors of outliers at several places.
    """
    check("outlier", outlier, number(0, 1e6))
    check_array("w", w, "fV")
    check("at", at, whole(0, w.size - 1))
    flat = w.reshape(-1).astype(np.float32)
    flat[at] = outlier * (flat.astype(np.float64) ** 2).mean() ** 0.5
    back = rounded(flat, codebook, block_size)
    start = at // block_size * block_size
    block = slice(start, start + block_size)
    own = error_between(np.delete(flat[block], at - start), np.delete(back[block], at - start))
    return own, error_between(np.delete(flat, at), np.delete(back, at))


def lloyd_step(w: Array, codebook: np.ndarray, block_size: int = 64) -> np.ndarray:
    """A codebook whose error on w is no larger: one step of Lloyd's algorithm (1957, published 1982).

    Each value moves to the point with the least squared error for the weights that take its code, which is their mean.
    As x = w / absmax, and the error of w counts, each x has the weight absmax^2:

        q_i = sum of absmax^2 x / sum of absmax^2        over the x whose code is i

    A value that no weight takes stays. The result, float32, is no longer exact at 0 and at the ends of [-1, 1].
    """
    x, absmax = scaled_blocks(w, block_size)
    codes = nearest(x, codebook).reshape(-1)[: w.size]
    weights = np.broadcast_to(absmax.astype(np.float64) ** 2, x.shape).reshape(-1)[: w.size]  # (n,)
    total = np.bincount(codes, weights, len(codebook))
    moved = np.bincount(codes, weights * x.reshape(-1)[: w.size], len(codebook)) / np.where(total, total, 1)
    return np.where(total > 0, moved, codebook).astype(np.float32)
