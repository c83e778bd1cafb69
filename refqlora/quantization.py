"""4-bit tensors: blockwise quantisation, packing, and double quantisation (QLoRA, arXiv 2305.14314).

    codes, absmax = quantize_blockwise(x, NF4, 64)  # (n,) codes of 4 bits, (blocks,): blockwise.py
    even, odd = codes.reshape(-1, 2).T              # (n/2,) each
    packed = even << 4 | odd                        # (n/2,): two codes a byte, the first in the high half

Double quantisation stores absmax itself in 8 bits: minus its mean, in blocks of 256, by the dynamic map. minimal.py has
the plain lines of it all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backend import Array, array_module
from .blockwise import (
    NESTED_BLOCK,
    QUANTIZABLE,
    as_codebook,
    count_blocks,
    dequantize_blockwise,
    from_codes,
    quantize_constants,
    to_codes,
)
from .checks import SWITCH, as_dtype, check, check_array, shown
from .codebooks import CODEBOOKS, DYNAMIC
from .reprs import facts_html


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
        blocks = count_blocks(self.size, self.block_size, "QuantizedTensor")
        fields = {"packed": (np.uint8, -(-self.size // 2)), "absmax": (np.uint8 if nested else np.float32, blocks)}
        fields |= {"codebook": (np.float32, 16), "nested_codebook": (np.float32, 256)}
        if nested:
            fields["nested_absmax"] = (np.float32, count_blocks(blocks, NESTED_BLOCK))
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
        absmax = dequantize_blockwise(self.absmax, self.nested_absmax, self.nested_codebook, NESTED_BLOCK)
        absmax += self.offset
        return absmax

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
    blocks = count_blocks(size, block_size, "quantized_nbytes")
    return -(-size // 2) + (blocks + 4 * count_blocks(blocks, NESTED_BLOCK) if double_quant else 4 * blocks)


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
    codebook = as_codebook(codebook, (16, 16), name)
    check(f"{name}: double_quant", double_quant, SWITCH)
    packed, absmax = to_codes(w, codebook, block_size, name, pack=True)
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
    from_codes(q.packed[: even // 2], _pairs(q.codebook.tobytes()), absmax, q.block_size, flat[:even])
    if even < q.size:
        flat[-1:] = array_module(flat).asarray(q.codebook)[q.packed[-1:] >> 4] * absmax[-1:]
    return out


@functools.lru_cache(maxsize=32)
def _pairs(codebook: bytes) -> np.ndarray:
    """(256, 2) float32: the two values that a packed byte stands for."""
    book, byte = np.frombuffer(codebook, np.float32), np.arange(256)
    return np.stack([book[byte >> 4], book[byte & 15]], axis=1)
