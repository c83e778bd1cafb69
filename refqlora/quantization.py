"""Blockwise absmax quantisation, packing to 4 bits, and double quantisation (QLoRA, arXiv 2305.14314).

For a float32 tensor x of n elements, n a multiple of the block size, it is these lines (minimal.py has all of it):

    rows = x.reshape(-1, block_size)                # (blocks, block_size): a block may span rows of x
    absmax = abs(rows).max(axis=1)                  # (blocks,): one float32 constant a block
    codes = nearest(rows * (1 / absmax[:, None]))   # (blocks, block_size): the index of the nearest value
    even, odd = codes.reshape(-1, 2).T              # (n/2,) each
    packed = even << 4 | odd                        # (n/2,): two codes a byte, the first in the high half
    back = codebook[codes] * absmax[:, None]        # (blocks, block_size)

Double quantisation stores absmax itself in 8 bits: minus its mean, in blocks of 256, by the dynamic map. This file
does the same with tables, in pieces that fit the cache. The result equals that of bitsandbytes on a CPU, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from .backend import Array, array_module
from .checks import SWITCH, as_dtype, check, check_array, finite, shown
from .codebooks import CODEBOOKS, DYNAMIC, nearest
from .reprs import facts_html

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # block size of the second level
QUANTIZABLE = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
TINY = np.float32(1e-38)  # the least divisor, as in bitsandbytes: its reciprocal is finite

CHUNK = 1 << 17  # elements worked on at a time on a CPU: temporaries of 512 KiB stay in the L2 cache


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A 4-bit tensor of n elements in ceil(n / block_size) blocks, as `quantize` makes it.

    packed           uint8 (ceil(n / 2),): element 2i in the high half of byte i, element 2i + 1 in the low
    absmax           float32 (blocks,); when double-quantised uint8 (blocks,), codes of nested_codebook
    codebook         float32 (16,), in host memory
    dtype            of the tensor that was quantised
    nested_absmax    float32 (ceil(blocks / 256),), and offset, the mean of absmax: only when double-quantised
    nested_codebook  float32 (256,), in host memory: the dynamic map, or another that a file contains

        >>> rq.quantize(np.ones((2, 64), np.float32), double_quant=False)
        QuantizedTensor((2, 64) in nf4, blocks of 64; 72 bytes, 4.5 bits a parameter)

    Raises ValueError if the fields do not fit together.
    """

    packed: Array
    absmax: Array
    codebook: np.ndarray
    shape: tuple[int, ...]
    block_size: int
    dtype: np.dtype
    nested_absmax: Array | None = None
    offset: np.float32 | None = None
    nested_codebook: np.ndarray = field(default_factory=lambda: DYNAMIC)

    def __post_init__(self) -> None:
        nested = self.nested_absmax is not None
        blocks = _blocks(self.size, self.block_size, "QuantizedTensor")
        fields = {"packed": (np.uint8, -(-self.size // 2)), "absmax": (np.uint8 if nested else np.float32, blocks)}
        fields |= {"codebook": (np.float32, 16), "nested_codebook": (np.float32, 256)}
        if nested:
            fields["nested_absmax"] = (np.float32, _blocks(blocks, NESTED_BLOCK))
        for name, (dtype, size) in fields.items():
            x = getattr(self, name)
            if x.dtype != dtype or x.shape != (size,):
                expected = f"{np.dtype(dtype)} of shape ({size},), got {x.dtype} of shape {x.shape}"
                raise ValueError(f"QuantizedTensor of shape {self.shape}: {name}: expected {expected}")
        if nested != (self.offset is not None):
            raise ValueError("QuantizedTensor: expected both nested_absmax and offset, or neither")

    @property
    def size(self) -> int:
        """Number of elements, n."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def constants_nbytes(self) -> int:
        """Bytes of the quantisation constants: absmax, and nested_absmax if there is one."""
        return self.absmax.nbytes + (0 if self.nested_absmax is None else self.nested_absmax.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of packed and the constants, without offset (one number) and the codebooks (shared by all)."""
        return self.packed.nbytes + self.constants_nbytes

    @property
    def bits_per_param(self) -> float:
        """8 nbytes / n: 4.126953125 for 4096 x 4096, double-quantised in blocks of 64. 0 if empty."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def constants(self) -> Array:
        """absmax as float32 (blocks,), with the double quantisation undone."""
        if self.nested_absmax is None:
            return self.absmax
        return dequantize_blockwise(self.absmax, self.nested_absmax, self.nested_codebook, NESTED_BLOCK) + self.offset

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """`np.asarray(q)` is `dequantize(q)`."""
        return dequantize(self, dtype or np.float32)

    @property
    def kind(self) -> str:
        """The name of its codebook among CODEBOOKS, or "own codebook"."""
        return next((name for name, book in CODEBOOKS.items() if np.array_equal(book, self.codebook)), "own codebook")

    def __repr__(self) -> str:
        nested = "" if self.nested_absmax is None else ", double-quantised"
        size = f"{self.nbytes:,} bytes, {self.bits_per_param:.5g} bits a parameter"
        return f"QuantizedTensor({self.shape} in {self.kind}, blocks of {self.block_size}{nested}; {size})"

    def _repr_html_(self) -> str:
        facts = {"shape": self.shape, "codebook": self.kind, "block size": self.block_size, "constants": "float32"}
        if self.nested_absmax is not None:
            facts["constants"] = f"8 bits, in blocks of {NESTED_BLOCK}"
        return facts_html("QuantizedTensor", facts | {"bytes": self.nbytes, "bits a parameter": self.bits_per_param})


def quantized_nbytes(size: int, block_size: int = 64, double_quant: bool = True) -> int:
    """`QuantizedTensor.nbytes` for a tensor of `size` elements, without making it."""
    blocks = _blocks(size, block_size, "quantized_nbytes")
    return -(-size // 2) + (blocks + 4 * _blocks(blocks, NESTED_BLOCK) if double_quant else 4 * blocks)


def quantize(
    w: Array,
    codebook: str | np.ndarray = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    name: str = "tensor",
    nested: str = "nearest",
) -> QuantizedTensor:
    """Quantise w, of any shape, to 4 bits. All arithmetic is in float32.

    w: float16, bfloat16, float32 or float64. codebook: "nf4", "fp4", "int4", or 16 float32 values in any order.
    block_size: how many elements share a constant, a power of two from 32 to 4096. double_quant: quantise the
    constants as well, by `quantize_constants`, which takes `nested`. name: what errors call the tensor.

        >>> q = rq.quantize(np.random.default_rng(0).standard_normal((1024, 1024), np.float32))
        >>> q.packed.shape, q.bits_per_param
        ((524288,), 4.126953125)

    The details are those of bitsandbytes' quantize_4bit on a CPU. A full block is multiplied by 1 / absmax, a
    partial last block is divided by absmax. A divisor below 1e-38 counts as 1e-38: a block of zeros comes back
    as zeros, a block of smaller weights with an error of at most 1e-38. An odd size is padded with one 0.0.
    (FP4 has two zeros: small positive weights get code 8, small negative ones and 0 get code 0. On CUDA small
    negative ones get 8.)

    Raises ValueError, naming `name`, for another dtype, block size or codebook, and for the first NaN or inf.
    """
    w = w if hasattr(w, "dtype") else np.asarray(w)
    codebook = _codebook(codebook, (16, 16), name)
    check(f"{name}: double_quant", double_quant, SWITCH)
    packed, absmax = _quantize(w, codebook, block_size, name, pack=True)
    constants = quantize_constants(absmax, nested) if double_quant else (absmax, None, None)
    return QuantizedTensor(packed, constants[0], codebook, w.shape, block_size, w.dtype, *constants[1:])


def dequantize(q: QuantizedTensor, dtype: np.dtype | type = np.float32, out: Array | None = None) -> Array:
    """codebook[code] * absmax in float32, then cast to `dtype`: an array of q.shape.

    `out`, a C-contiguous array of q.shape (ValueError if it is not), receives the result in its own dtype.

        >>> rq.dequantize(rq.quantize(np.array([1.0, -0.5, 0.25], np.float32))).round(3)
        array([ 1.   , -0.525,  0.246], dtype=float32)
    """
    if not isinstance(q, QuantizedTensor):
        raise ValueError(f"q: expected a QuantizedTensor, got {shown(q)}")
    if out is None:
        out = array_module(q.packed).empty(q.shape, as_dtype("dtype", dtype, QUANTIZABLE))
    else:
        check_array("out", out, "fV", q.shape)
        if not out.flags.c_contiguous:
            raise ValueError(f"out: expected a C-contiguous array of shape {q.shape}, got strides {out.strides}")
    flat, absmax = out.reshape(-1), q.constants()
    even = q.size // 2 * 2
    _dequantize(q.packed[: even // 2], _pairs(q.codebook.tobytes()), absmax, q.block_size, flat[:even])
    if even < q.size:
        flat[-1:] = array_module(flat).asarray(q.codebook)[q.packed[-1:] >> 4] * absmax[-1:]
    return out


def quantize_blockwise(x: Array, codebook: np.ndarray, block_size: int, *, name: str = "tensor") -> tuple[Array, Array]:
    """Quantise x with a codebook of 2 to 256 values: codes uint8 of x's shape, absmax float32 (blocks,).

    Arithmetic and errors are those of `quantize`; a code takes a byte.
    """
    codebook = _codebook(codebook, (2, 256), name)
    codes, absmax = _quantize(x, codebook, block_size, name, pack=False)
    return codes.reshape(x.shape), absmax


def dequantize_blockwise(
    codes: Array, absmax: Array, codebook: np.ndarray, block_size: int, dtype: np.dtype | type = np.float32
) -> Array:
    """codebook[code] * absmax in float32, then cast to `dtype`: an array of the shape of codes (uint8).

    Raises ValueError unless there is one absmax a block, and every code is in the codebook.
    """
    codebook = _codebook(codebook, (2, 256), "dequantize_blockwise")
    blocks = _blocks(codes.size, block_size, "dequantize_blockwise")
    if absmax.shape != (blocks,):
        raise ValueError(f"dequantize_blockwise: absmax: expected shape ({blocks},), got {absmax.shape}")
    if len(codebook) < 256 and codes.size and codes.max() >= len(codebook):
        raise ValueError(f"dequantize_blockwise: codes: expected below {len(codebook)}, got {codes.max()}")
    out = array_module(codes).empty(codes.shape, dtype)
    _dequantize(codes.reshape(-1), codebook[:, None], absmax, block_size, out.reshape(-1))
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
    if nested not in ("nearest", "bitsandbytes"):
        raise ValueError(f'nested: expected "nearest" or "bitsandbytes", got {nested!r}')
    if offset is None:
        offset = np.float32(float(absmax.mean(dtype=np.float64)) if absmax.size else 0.0)
    second_level = quantize_blockwise if nested == "nearest" else _binned
    return *second_level(absmax - offset, DYNAMIC, NESTED_BLOCK), offset


def _quantize(x: Array, codebook: np.ndarray, block_size: int, name: str, pack: bool) -> tuple[Array, Array]:
    """x, of n elements -> codes uint8 (n,), or packed (ceil(n / 2),), and absmax float32 (blocks,)."""
    if x.dtype not in QUANTIZABLE:
        raise ValueError(f"{name}: dtype: expected one of {', '.join(map(str, QUANTIZABLE))}, got {x.dtype}")
    xp = array_module(x)
    flat = xp.ascontiguousarray(x).reshape(-1)
    n = flat.size
    absmax = xp.empty(_blocks(n, block_size, name), np.float32)
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


def _dequantize(codes: Array, table: np.ndarray, absmax: Array, block_size: int, out: Array) -> None:
    """out = table[codes] * absmax, flat. A row of `table` holds the value of a code, or the two values of a byte."""
    xp = array_module(codes)
    width = table.shape[1]
    words = table.view((np.uint32, np.uint64)[width - 1]).reshape(-1)  # a pair is moved as one word

    for start, stop in _chunks(out.size, xp):
        v = out[start:stop] if out.dtype == np.float32 else xp.empty(stop - start, np.float32)
        piece = codes[start // width : stop // width]
        if xp is np:
            words.take(piece, out=v.view(words.dtype), mode="clip")
        else:
            v[:] = xp.asarray(table)[piece].reshape(-1)
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
    chunk = CHUNK if xp is np else max(n, 1)
    return ((start, min(start + chunk, n)) for start in range(0, n, chunk))


def _binned(x: Array, codebook: np.ndarray, block_size: int) -> tuple[Array, Array]:
    """bitsandbytes' quantize_blockwise on a CPU: 65,536 equal bins over [-1, 1], and a code for each.

    In a block of zeros every code is 0. A partial last block is treated like the others.
    """
    xp = array_module(x)
    rows = xp.zeros((_blocks(x.size, block_size), block_size), np.float32)
    rows.reshape(-1)[: x.size] = x
    absmax = xp.abs(rows).max(axis=1)
    rows *= (1 / xp.maximum(absmax, np.float32(3e-39)))[:, None]  # bitsandbytes' reciprocal overflows below that
    half, top = np.float32(0.5), np.float32(65535)
    bins = ((xp.clip(rows, -1, 1) + 1) * half * top + half).astype(np.uint16)
    centres = 2 * np.arange(65536, dtype=np.float32) / top - 1
    codes = xp.asarray(nearest(centres, codebook))[bins]
    codes[absmax == 0] = 0
    return codes.reshape(-1)[: x.size], absmax


@functools.lru_cache(maxsize=32)
def _pairs(codebook: bytes) -> np.ndarray:
    """(256, 2) float32: the two values that a packed byte stands for."""
    book, byte = np.frombuffer(codebook, np.float32), np.arange(256)
    return np.stack([book[byte >> 4], book[byte & 15]], axis=1)


def _blocks(size: int, block_size: int, name: str = "") -> int:
    if not isinstance(block_size, int | np.integer) or block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size: expected one of {BLOCK_SIZES}, got {block_size!r}")
    return -(-size // block_size)


def _codebook(codebook: str | np.ndarray, sizes: tuple[int, int], name: str) -> np.ndarray:
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
