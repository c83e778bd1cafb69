"""NF4 and LoRA as one would write them down, in NumPy alone: a kernel that `refqlora parity --against` finds right."""

import numpy as np

NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
NF4 = np.array([int(word, 16) for word in NF4_BITS.split()], np.uint32).view(np.float32)
TINY = np.float32(1e-38)


def blocks_of(x, size):
    """(blocks, size), filled up with zeros."""
    return np.append(x, np.zeros(-x.size % size, np.float32)).reshape(-1, size)


def scaled_and_absmax(x, size):
    """x / absmax, flat; a full block is multiplied by the reciprocal."""
    rows = blocks_of(x, size)
    absmax = np.abs(rows).max(axis=1)
    divisor = np.maximum(absmax, TINY)[:, None]
    scaled = rows * (1 / divisor)
    if x.size % size:
        scaled[-1] = rows[-1] / divisor[-1]
    return scaled.reshape(-1)[: x.size], absmax


def nearest(x, table):
    """A tie takes the lower code."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, x).astype(np.uint8)


def quantize(w, block_size):
    scaled, absmax = scaled_and_absmax(w.astype(np.float32).reshape(-1), block_size)
    codes = nearest(np.append(scaled, np.zeros(scaled.size % 2, np.float32)), NF4)
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize(packed, absmax, block_size, shape):
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: np.prod(shape, dtype=int)]
    return (NF4[codes] * np.repeat(absmax, block_size)[: codes.size]).reshape(shape)


def dynamic_map():
    """7 decades, the smaller the fewer values: the midpoints of even parts of [0.1, 1], in float32."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step = float(np.float32(np.float32(1) - np.float32(0.1)) / np.float32(n))
        up = [float(np.float32(0.1)) + step * k for k in range(n + 1)]
        down = [1.0 - step * (n - k) for k in range(n + 1)]
        edges = np.float32([up[k] if k < (n + 1) // 2 else down[k] for k in range(n + 1)])
        middle = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
        values += [*middle, *-middle]
    return np.sort(np.float32(values))


def quantize_constants(absmax):
    offset = np.float32(absmax.mean(dtype=np.float64))
    scaled, nested_absmax = scaled_and_absmax(absmax - offset, 256)
    return nearest(scaled, dynamic_map()), nested_absmax, offset


def dequantize_constants(codes, nested_absmax, offset):
    return dynamic_map()[codes] * np.repeat(nested_absmax, 256)[: codes.size] + offset


def lora_forward(x, W, A, B, scale):
    return x @ W.T + scale * (x @ A.T @ B.T)


def lora_backward(dy, x, W, A, B, scale):
    dz = scale * (dy @ B)
    return dy @ W + dz @ A, dz.T @ x, scale * (dy.T @ (x @ A.T))


def lora_dropout_forward(x, W, A, B, scale, keep, rate):
    return x @ W.T + scale * ((x * keep / np.float32(1 - rate)) @ A.T @ B.T)


def lora_dropout_backward(dy, x, W, A, B, scale, keep, rate):
    mask = keep / np.float32(1 - rate)
    dz = scale * (dy @ B)
    return dy @ W + (dz @ A) * mask, dz.T @ (x * mask), scale * (dy.T @ ((x * mask) @ A.T))
