"""Blockwise absmax quantisation with any codebook: codes, and one constant for each block (Dettmers et al. 2021).

For a float32 tensor x of n elements, n a multiple of the block size, it is these lines (minimal.py has all of it):

    rows = x.reshape(-1, block_size)                # (blocks, block_size): a block may span rows of x
    absmax = abs(rows).max(axis=1)                  # (blocks,): one float32 constant a block
    codes = nearest(rows * (1 / absmax[:, None]))   # (blocks, block_size): the index of the nearest value
    back = codebook[codes] * absmax[:, None]        # (blocks, block_size)

This file does the same with tables, in pieces that fit the cache. The result equals that of bitsandbytes on a CPU, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import ml_dtypes
import numpy as np

from .backend import Array, array_module, on_gpu, pieces
from .checks import check, finite, one_of, shown
from .codebooks import CODEBOOKS, DYNAMIC, nearest

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # block size of the second level
QUANTIZABLE = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
TINY = np.float32(1e-38)  # the least divisor, as in bitsandbytes: its reciprocal is finite
CHUNK = 1 << 17  # elements worked on at a time on a CPU: temporaries of 512 KiB stay in the L2 cache


def quantize_blockwise(x: Array, codebook: np.ndarray, block_size: int, *, name: str = "tensor") -> tuple[Array, Array]:
    """Quantise x with a codebook of 2 to 256 values: codes uint8 of x's shape, absmax float32 (blocks,).

    Arithmetic and errors are those of `quantize`; a code takes a byte.
    """
    codebook = as_codebook(codebook, (2, 256), name)
    codes, absmax = to_codes(x, codebook, block_size, name, pack=False)
    return codes.reshape(x.shape), absmax


def dequantize_blockwise(
    codes: Array, absmax: Array, codebook: np.ndarray, block_size: int, dtype: np.dtype | type = np.float32
) -> Array:
    """codebook[code] * absmax in float32, then cast to `dtype`: an array of the shape of codes (uint8).

    Raises ValueError unless there is one absmax a block, and every code is in the codebook.
    """
    codebook = as_codebook(codebook, (2, 256), "dequantize_blockwise")
    blocks = count_blocks(codes.size, block_size, "dequantize_blockwise")
    if absmax.shape != (blocks,):
        raise ValueError(f"dequantize_blockwise: absmax: expected shape ({blocks},), got {absmax.shape}")
    if len(codebook) < 256 and codes.size and codes.max() >= len(codebook):
        raise ValueError(f"dequantize_blockwise: codes: expected below {len(codebook)}, got {codes.max()}")
    out = array_module(codes).empty(codes.shape, dtype)
    from_codes(codes.reshape(-1), codebook[:, None], absmax, block_size, out.reshape(-1))
    return out


def quantize_constants(
    absmax: Array, nested: str = "nearest", offset: np.float32 | None = None
) -> tuple[Array, Array, np.float32]:
    """Double quantisation: absmax float32 (blocks,) -> codes uint8 (blocks,), nested_absmax float32
    (ceil(blocks / 256),), offset.

    The offset is the mean, summed in float64 and rounded once, unless it is given (bitsandbytes sums in float32:
    the last bits may differ). nested="nearest" takes the nearest value of the dynamic map, as bitsandbytes does
    on CUDA except for ties. "bitsandbytes" copies what it does on a CPU, where a table of 65,536 bins decides:
    some 0.2 % of the codes are then one off, and a constant equal to the mean has code 131, not 127.

    A constant within 1 % of float32's maximum may come back as inf, as in bitsandbytes; NumPy then warns of overflow.

    Raises ValueError for any other `nested`.
    """
    check("nested", nested, one_of(("nearest", "bitsandbytes")))
    if offset is None:
        offset = np.float32(float(absmax.mean(dtype=np.float64)) if absmax.size else 0.0)
    second_level = quantize_blockwise if nested == "nearest" else _binned
    return *second_level(absmax - offset, DYNAMIC, NESTED_BLOCK), offset


def to_codes(x: Array, codebook: np.ndarray, block_size: int, name: str, pack: bool) -> tuple[Array, Array]:
    """x, of n elements -> codes uint8 (n,), or packed (ceil(n / 2),), and absmax float32 (blocks,)."""
    if x.dtype not in QUANTIZABLE:
        raise ValueError(f"{name}: dtype: expected one of {', '.join(map(str, QUANTIZABLE))}, got {x.dtype}")
    xp = array_module(x)
    flat = xp.ascontiguousarray(x).reshape(-1)
    n = flat.size
    absmax = xp.empty(count_blocks(n, block_size, name), np.float32)
    out = xp.empty(-(-n // 2) if pack else n, np.uint8)

    for start, stop in _chunks(n, xp):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            v = flat[start:stop].astype(np.float32)  # a copy: the blocks are scaled in it
            rows, tail, first = _rows(v, block_size, start)  # (blocks, block_size), less than a block
            a = absmax[first : first + len(rows)]  # (blocks,)
            a[:] = xp.abs(rows).max(axis=1)
            rows *= (1 / xp.maximum(a, TINY))[:, None]
            if tail.size:
                absmax[-1] = xp.maximum(xp.abs(tail).max(), TINY)
                tail /= absmax[-1]
        codes = nearest(v, codebook)
        if not pack:
            out[start:stop] = codes
            continue
        if codes.size % 2:
            codes = xp.concatenate([codes, nearest(xp.zeros(1, np.float32), codebook)])
        pairs = codes.view("<u2")  # two codes as one number: first + 256 * second
        out[start // 2 : -(-stop // 2)] = pairs << 4 | pairs >> 8  # 16 * first + second, modulo 256
    if not xp.isfinite(absmax).all():
        finite(name, x, np.float32)  # names the first element at fault
    return out, absmax


def from_codes(codes: Array, table: np.ndarray, absmax: Array, block_size: int, out: Array) -> None:
    """out = table[codes] * absmax, flat. A row of `table` holds the value of a code, or the two values of a byte."""
    xp = array_module(codes)
    width = table.shape[1]
    words = table.view((np.uint32, np.uint64)[width - 1]).reshape(-1)  # a pair is moved as one word

    for start, stop in _chunks(out.size, xp):
        v = out[start:stop] if out.dtype == np.float32 else xp.empty(stop - start, np.float32)
        piece = codes[start // width : stop // width]
        if on_gpu(xp):
            v[:] = xp.asarray(table)[piece].reshape(-1)
        else:
            np.take(words, piece, out=v.view(words.dtype), mode="clip")
        rows, tail, first = _rows(v, block_size, start)
        rows *= absmax[first : first + len(rows), None]
        if tail.size:
            tail *= absmax[-1]
        if v.dtype != out.dtype:
            out[start:stop] = v


def _rows(v: Array, block_size: int, start: int) -> tuple[Array, Array, int]:
    """Views of v's full blocks (blocks, block_size) and of the rest; the number of the block that begins at `start`."""
    full = v.size // block_size * block_size
    return v[:full].reshape(-1, block_size), v[full:], start // block_size


def _chunks(n: int, xp: ModuleType) -> Iterator[tuple[int, int]]:
    """0..n in pieces (start, stop): of CHUNK elements on a CPU, whole on a GPU."""
    return pieces(n, n if on_gpu(xp) else CHUNK, xp)


def _binned(x: Array, codebook: np.ndarray, block_size: int) -> tuple[Array, Array]:
    """bitsandbytes' quantize_blockwise on a CPU: 65,536 equal bins over [-1, 1], and a code for each.

    In a block of zeros every code is 0. A partial last block is treated like the others.
    """
    xp = array_module(x)
    rows = xp.zeros((count_blocks(x.size, block_size), block_size), np.float32)
    rows.reshape(-1)[: x.size] = x
    absmax = xp.abs(rows).max(axis=1)
    rows *= (1 / xp.maximum(absmax, np.float32(3e-39)))[:, None]  # bitsandbytes' reciprocal overflows below that
    half, top = np.float32(0.5), np.float32(65535)
    bins = ((xp.clip(rows, -1, 1) + 1) * half * top + half).astype(np.uint16)
    centres = 2 * np.arange(65536, dtype=np.float32) / top - 1
    codes = xp.asarray(nearest(centres, codebook))[bins]
    codes[absmax == 0] = 0
    return codes.reshape(-1)[: x.size], absmax


def count_blocks(size: int, block_size: int, name: str = "") -> int:
    if not isinstance(block_size, int | np.integer) or block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size: expected one of {BLOCK_SIZES}, got {shown(block_size)}")
    return -(-size // block_size)


def as_codebook(codebook: str | np.ndarray, sizes: tuple[int, int], name: str) -> np.ndarray:
    """A codebook, given by name or itself. Raises ValueError unless it has sizes[0] to sizes[1] float32 values."""
    if isinstance(codebook, str) and codebook in CODEBOOKS:
        return CODEBOOKS[codebook]
    if not isinstance(codebook, np.ndarray):
        found = repr(codebook)[:40]
    elif codebook.dtype == np.float32 and codebook.ndim == 1 and sizes[0] <= codebook.size <= sizes[1]:
        return codebook
    else:
        found = f"{codebook.dtype} of shape {codebook.shape}"
    wanted = f"{sizes[0]} to {sizes[1]}" if sizes[0] < sizes[1] else str(sizes[0])
    raise ValueError(f"{name}: codebook: expected {', '.join(CODEBOOKS)} or {wanted} values of float32, got {found}")
