"""Kernels with one common mistake each, and words of the cause that the kit must find."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
from right import (
    NF4,
    TINY,
    blocks_of,
    dynamic_map,
    lora_backward,
    nearest,
    scaled_and_absmax,
)
from scipy.special import ndtri

F32 = np.float32


def pack(codes, filling=7, low_first=False):
    codes = np.append(codes, np.full(codes.size % 2, filling)).astype(np.uint8)
    return codes[1::2] << 4 | codes[0::2] if low_first else codes[0::2] << 4 | codes[1::2]


def quantizer(decide=lambda x: nearest(x, NF4), scale=scaled_and_absmax, read=np.ravel, **packing):
    def quantize(w, block_size):
        scaled, absmax = scale(read(w).astype(F32), block_size)
        return pack(decide(scaled), **packing), absmax

    return quantize


def dequantizer(table=NF4, high=lambda p: p >> 4, low=lambda p: p & 15, constants=F32):
    def dequantize(packed, absmax, block_size, shape):
        codes = np.stack([high(packed), low(packed)], axis=1).reshape(-1)[: np.prod(shape, dtype=int)]
        absmax = absmax.astype(constants).astype(F32)
        return (table[codes] * np.repeat(absmax, block_size)[: codes.size]).reshape(shape)

    return dequantize


# ---- quantise ----------------------------------------------------------------------------------------------


def ties_up(x):
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, x, side="right")


def by_distance(x):
    return np.abs(x[:, None] - NF4).argmin(axis=1)


def in_double(x):
    wide = NF4.astype(np.float64)
    return np.searchsorted((wide[1:] + wide[:-1]) / 2, x)


def division(x, size):
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    return (rows / np.maximum(absmax, TINY)[:, None]).reshape(-1)[: x.size], absmax


def reciprocal_everywhere(x, size):
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    return (rows * (1 / np.maximum(absmax, TINY))[:, None]).reshape(-1)[: x.size], absmax


def no_least_divisor(x, size):
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    scaled = rows * (1 / absmax)[:, None]
    if x.size % size:
        scaled[-1] = rows[-1] / absmax[-1]
    return scaled.reshape(-1)[: x.size], absmax


def zeros_guarded(x, size):
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    divisor = np.where(absmax == 0, F32(1), absmax)[:, None]
    scaled = rows * (1 / divisor)
    if x.size % size:
        scaled[-1] = rows[-1] / divisor[-1]
    return scaled.reshape(-1)[: x.size], absmax


def signed(x, size):
    rows = blocks_of(x, size)
    absmax = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    divisor = np.where(np.abs(absmax) < TINY, TINY, absmax)[:, None]
    scaled = rows * (1 / divisor)
    if x.size % size:
        scaled[-1] = rows[-1] / divisor[-1]
    return scaled.reshape(-1)[: x.size], absmax


def half_constants(x, size):
    scaled, absmax = scaled_and_absmax(x, size)
    return scaled, absmax.astype(np.float16).astype(F32)


def by_rows(w, block_size):
    parts = [scaled_and_absmax(row.astype(F32), block_size) for row in w.reshape(-1, w.shape[-1])]
    return pack(nearest(np.concatenate([s for s, _ in parts]), NF4)), np.concatenate([a for _, a in parts])


def without_tail(w, block_size):
    flat = w.astype(F32).reshape(-1)
    scaled, absmax = scaled_and_absmax(flat[: flat.size // block_size * block_size], block_size)
    return pack(nearest(scaled, NF4)), absmax


def in_its_own_dtype(w, block_size):
    if w.dtype == F32:
        return quantizer()(w, block_size)
    rows = np.append(w.reshape(-1), np.zeros(-w.size % block_size, w.dtype)).reshape(-1, block_size)
    absmax = np.abs(rows).max(axis=1)
    tiny = np.maximum(absmax, w.dtype.type(1e-38))[:, None]
    scaled = rows * (w.dtype.type(1) / tiny)
    if w.size % block_size:
        scaled[-1] = rows[-1] / tiny[-1]
    return pack(nearest(scaled.astype(F32).reshape(-1)[: w.size], NF4)), absmax.astype(F32)


def float64_table():
    above, below = ndtri(np.linspace(0.9677083, 0.5, 9)[:-1]), -ndtri(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0], below]))
    return (values / values[-1]).astype(F32)


def numpys_table():
    def linspace(n):
        return np.linspace(0.9677083, 0.5, n, dtype=F32)[:-1].astype(np.float64)

    values = np.sort(np.concatenate([ndtri(linspace(9)), [0], -ndtri(linspace(8))])).astype(F32)
    return values / values[-1]


FOUR_DECIMALS = np.round(NF4.astype(np.float64), 4).astype(F32)
ENTRY_3, ENTRY_12 = NF4.copy(), NF4.copy()
ENTRY_3[3], ENTRY_12[12] = -0.3, np.nextafter(NF4[12], F32(1))
LAST = np.append(NF4[:-1], F32(0.99))
EVEN_16 = np.linspace(-1, 1, 16, dtype=F32)
EVEN = np.linspace(-1, 1, 17, dtype=F32)[1:-1]
SHIFTED = (NF4[1:] + NF4[:-1]) / 2
SHIFTED[4] += F32(0.01)
INT4 = (np.arange(-8, 8) / 7).astype(F32)


def ties_up_and_swapped(w, block_size):
    return quantizer(ties_up, low_first=True)(w, block_size)


def rough_reciprocal(x, size):
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    return (rows * np.nextafter(1 / np.maximum(absmax, TINY), F32(0))[:, None]).reshape(-1)[: x.size], absmax


def clamped(x, size):
    rows = blocks_of(x, size)
    absmax = np.maximum(np.abs(rows).max(axis=1), F32(1e-8))
    return (rows / absmax[:, None]).reshape(-1)[: x.size], absmax


def flushing(w):
    x = np.ravel(w).astype(F32)
    return np.where(np.abs(x) < np.finfo(F32).tiny, F32(0), x)


def halves(codes):
    codes = np.append(codes, np.full(codes.size % 2, 7)).astype(np.uint8)
    return codes[: codes.size // 2] << 4 | codes[codes.size // 2 :]


def in_halves(w, block_size):
    scaled, absmax = scaled_and_absmax(np.ravel(w).astype(F32), block_size)
    return halves(nearest(scaled, NF4)), absmax


def stops_early(w, block_size):
    packed, absmax = quantizer()(w, block_size)
    packed[-1] = 0
    return packed, absmax


def first_only(packed, absmax, block_size, shape):
    weights = dequantizer()(packed, absmax, block_size, shape)
    weights.reshape(-1)[1::2] = 0.125
    return weights


def always_64(w, block_size):
    return quantizer()(w, 64)


def twos_complement(x):
    return nearest(x, NF4) ^ 8


def shifted(packed, absmax, block_size, shape):
    return dequantizer()(packed, np.roll(absmax, 1), block_size, shape)


# ---- constants ---------------------------------------------------------------------------------------------


def no_offset(absmax):
    scaled, nested_absmax = scaled_and_absmax(absmax, 256)
    return nearest(scaled, dynamic_map()), nested_absmax, F32(0)


def linear_int8(absmax):
    offset = F32(absmax.mean(dtype=np.float64))
    scaled, nested_absmax = scaled_and_absmax(absmax - offset, 256)
    return np.clip(np.rint(scaled * F32(127)), -128, 127).astype(np.int8).view(np.uint8), nested_absmax, offset


def mean_not_taken_off(absmax):
    scaled, nested_absmax = scaled_and_absmax(absmax, 256)
    return nearest(scaled, dynamic_map()), nested_absmax, F32(absmax.mean(dtype=np.float64))


def multiply_add(codes, nested_absmax, offset):
    product = dynamic_map()[codes].astype(np.float64) * np.repeat(nested_absmax, 256)[: codes.size]
    return (product + offset).astype(F32)


def offset_not_added(codes, nested_absmax, offset):
    return dynamic_map()[codes] * np.repeat(nested_absmax, 256)[: codes.size]


# ---- LoRA --------------------------------------------------------------------------------------------------


def forward(factor):
    return lambda x, W, A, B, scale: x @ W.T + factor(scale, len(A)) * (x @ A.T @ B.T)


def forward_untransposed(x, W, A, B, scale):
    return x @ W + scale * (x @ A.T @ B.T)  # no error only where in = out


def forward_b_untransposed(x, W, A, B, scale):
    return x @ W.T + scale * (x @ A.T @ B)  # always an error, as r is never out


def forward_misread(x, W, A, B, scale):
    return forward_untransposed(x, W.reshape(x.shape[1], -1), A, B, scale)


def forward_reshaped(x, W, A, B, scale):
    return x @ W.T + scale * (x @ A.reshape(-1, len(A)) @ B.T)


def forward_bfloat16(x, W, A, B, scale):
    x, W, A, B = (t.astype(ml_dtypes.bfloat16).astype(F32) for t in (x, W, A, B))
    return x @ W.T + scale * (x @ A.T @ B.T)


def backward(change):
    def wrong(dy, x, W, A, B, scale):
        return change(*lora_backward(dy, x, W, A, B, scale), dy, x, W, A, B, scale)

    return wrong


def dropout_undivided(x, W, A, B, scale, keep, rate):
    return x @ W.T + scale * ((x * keep) @ A.T @ B.T)


def dropout_backward_without_mask(dy, x, W, A, B, scale, keep, rate):
    mask = keep / F32(1 - rate)
    dx, _, _ = lora_backward(dy, x, W, A, B, scale)
    _, dA, dB = lora_backward(dy, x * mask, W, A, B, scale)
    return dx, dA, dB


# name: (the kernel, words of the likely cause, for each function that is wrong)
KERNELS = {
    "ties up": ({"quantize": quantizer(ties_up)}, "a tie goes up"),
    "swapped nibbles": ({"quantize": quantizer(low_first=True)}, "codes of a byte are swapped"),
    "division": ({"quantize": quantizer(scale=division)}, "x is divided by absmax"),
    "reciprocal in the tail": ({"quantize": quantizer(scale=reciprocal_everywhere)}, "partial block is multiplied"),
    "double thresholds": ({"quantize": quantizer(in_double)}, "distances decide, or thresholds in double precision"),
    "distance": ({"quantize": quantizer(by_distance)}, "distances decide, or thresholds in double precision"),
    "no least divisor": ({"quantize": quantizer(scale=no_least_divisor)}, "a block of zeros gives NaN"),
    "zeros guarded only": ({"quantize": quantizer(scale=zeros_guarded)}, "only an absmax of 0 is guarded"),
    "signed absmax": ({"quantize": quantizer(scale=signed)}, "absmax is signed"),
    "float16 absmax": ({"quantize": quantizer(scale=half_constants)}, "absmax is stored in float16"),
    "blocks by row": ({"quantize": by_rows}, "blocks begin anew in every row"),
    "no tail": ({"quantize": without_tail}, "last, partial block is left out"),
    "own dtype": ({"quantize": in_its_own_dtype}, "scaled in its own dtype"),
    "memory order": ({"quantize": quantizer(read=lambda w: w.ravel(order="K"))}, "memory is read as it lies"),
    "filled with code 0": ({"quantize": quantizer(filling=0)}, "an odd size is filled up with code 0"),
    "float64 table": ({"quantize": quantizer(lambda x: nearest(x, float64_table()))}, "made in float64 throughout"),
    "numpy's linspace": ({"quantize": quantizer(lambda x: nearest(x, numpys_table()))}, "numpy.linspace"),
    "four decimals": ({"quantize": quantizer(lambda x: nearest(x, FOUR_DECIMALS))}, "rounded to four decimals"),
    "int4": ({"quantize": quantizer(lambda x: nearest(x, INT4))}, "int4, (code - 8) / 7"),
    "one entry": (
        {"quantize": quantizer(lambda x: nearest(x, ENTRY_3))},
        "entry 3 of the table is about -0.3; it must",
    ),
    "even thresholds": ({"quantize": quantizer(lambda x: np.searchsorted(EVEN, x))}, "evenly spaced, 0.125 apart"),
    "one threshold": (
        {"quantize": quantizer(lambda x: np.searchsorted(SHIFTED, x))},
        "a threshold is wrong: about -0.2246 where -0.2346074 is the midpoint",
    ),
    "last value": ({"quantize": quantizer(lambda x: nearest(x, LAST))}, "a threshold is wrong: about 0.856"),
    "a rough reciprocal": ({"quantize": quantizer(scale=rough_reciprocal)}, "only within 4 units in the last place"),
    "a clamp": ({"quantize": quantizer(scale=clamped)}, "is divided by absmax; in a full block it must be"),
    "a clamp, too": ({"quantize": quantizer(scale=clamped)}, "absmax is 1e-8 at least"),
    "subnormal numbers": ({"quantize": quantizer(read=flushing)}, "subnormal ones, are flushed to zero"),
    "halves": ({"quantize": in_halves}, "the first and the second half of the tensor"),
    "the loop stops early": ({"quantize": stops_early}, "nothing is wrong except the last byte"),
    "back, one of two": ({"dequantize": first_only}, "nothing is wrong except the second element of a byte"),
    "blocks of 64": ({"quantize": always_64}, "blocks of 64; they must be of block_size"),
    "two's complement": ({"quantize": quantizer(twos_complement)}, "numbered otherwise: 0 to 15 became 8, 9, 10, "),
    "two mistakes": ({"quantize": ties_up_and_swapped}, "a tie goes up; it must take the lower code; and the two"),
    "back, swapped nibbles": ({"dequantize": dequantizer(high=lambda p: p & 15, low=lambda p: p >> 4)}, "are swapped"),
    "back, four decimals": ({"dequantize": dequantizer(FOUR_DECIMALS)}, "rounded to four decimals"),
    "back, one entry": ({"dequantize": dequantizer(ENTRY_3)}, "entry 3 of the table is -0.3; it must be -0.3949175"),
    "back, one bit": ({"dequantize": dequantizer(ENTRY_12)}, "entry 12 of the table is 0.4407"),
    "back, a learnt table": ({"dequantize": dequantizer(np.cbrt(EVEN_16))}, "the table is not NF4 but -1, -0.9"),
    "back, float16 absmax": ({"dequantize": dequantizer(constants=np.float16)}, "absmax is rounded to float16"),
    "back, the block before": ({"dequantize": shifted}, "that of the block before"),
    "mean not taken off": ({"quantize_constants": mean_not_taken_off}, "returned but not taken off"),
    "multiply-add": ({"dequantize_constants": multiply_add}, "a fused multiply-add"),
    "no offset": ({"quantize_constants": no_offset}, "the offset is missing"),
    "linear int8": ({"quantize_constants": linear_int8}, "linear int8"),
    "offset not added": ({"dequantize_constants": offset_not_added}, "the offset is missing: it must be added"),
    "no scale": ({"lora_forward": forward(lambda s, r: 1)}, "the scale is missing"),
    "scale twice": ({"lora_forward": forward(lambda s, r: s * s)}, "the scale is applied twice"),
    "alpha": ({"lora_forward": forward(lambda s, r: s * r)}, "scaled by alpha"),
    "W not transposed": ({"lora_forward": forward_untransposed}, "W is taken for (in, out)"),
    "B not transposed": ({"lora_forward": forward_b_untransposed}, "B is taken for (r, out)"),
    "a whole scale": ({"lora_forward": forward(lambda s, r: int(s))}, "part is a multiple of what it must be, another"),
    "W read as (in, out)": ({"lora_forward": forward_misread}, "W is taken for (in, out)"),
    "W transposed in dx": (
        {"lora_backward": lambda dy, x, W, A, B, s: (dy @ W.T + s * dy @ B @ A, *lora_backward(dy, x, W, A, B, s)[1:])},
        "W is taken for (in, out)",
    ),
    "A reshaped": ({"lora_forward": forward_reshaped}, "A is reshaped"),
    "bfloat16": ({"lora_forward": forward_bfloat16}, "computed in bfloat16"),
    "dx of W only": (
        {"lora_backward": backward(lambda dx, dA, dB, dy, x, W, A, B, s: (dy @ W, dA, dB))},
        "the adapter's part, scale dy B A, is missing",
    ),
    "twice dA": (
        {"lora_backward": backward(lambda dx, dA, dB, *_: (dx, 2 * dA, dB))},
        "dA is 2 times what it must be",
    ),
    "dx of the adapter halved": (
        {"lora_backward": backward(lambda dx, dA, dB, dy, x, W, A, B, s: ((dx + dy @ W) / 2, dA, dB))},
        "the adapter's part is 0.5 times what it must be",
    ),
    "dA and dB swapped": ({"lora_backward": backward(lambda dx, dA, dB, *_: (dx, dB, dA))}, "dA and dB are swapped"),
    "gradients without scale": (
        {"lora_backward": backward(lambda dx, dA, dB, dy, x, W, A, B, s: (dx, dA / F32(s), dB / F32(s)))},
        "the scale is missing",
    ),
    "mean": (
        {"lora_backward": backward(lambda dx, dA, dB, dy, *_: (dx, dA / len(dy), dB / len(dy)))},
        "the mean over the rows",
    ),
    "dropout undivided": ({"lora_dropout_forward": dropout_undivided}, "is not divided by 1 - rate"),
    "dropout, no mask in dx": ({"lora_dropout_backward": dropout_backward_without_mask}, "dropout is not applied"),
}
KERNELS = {name: (SimpleNamespace(**functions), cause) for name, (functions, cause) in KERNELS.items()}
