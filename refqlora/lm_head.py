"""The output head, logits = x W^T, tile by tile: W has a row for every token, and is often held in 16 bits.

Cast at once, the W of V = 128,256 and D = 4096 would take 2.1 GB in float32 at every step. A W that needs no cast goes
through the same tiles, as the last bits of a product may depend on its shape.
"""

from __future__ import annotations

import numpy as np

from .backend import Array, array_module
from .lora import Weight, dense
from .quantization import QuantizedTensor

TILE = 1 << 24  # elements of W in a product: 64 MiB in float32


def head_forward(x: Array, weight: Weight) -> tuple[Array, tuple]:
    """logits = x W^T. x (..., D), weight (V, D) -> logits (..., V), in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    logits = array_module(x).empty((len(rows), weight.shape[0]), x.dtype)  # (N, V)
    for tile in _tiles(weight):
        logits[:, tile] = rows @ _rows(weight, tile, x.dtype).T  # (N, rows of the tile)
    return logits.reshape(*x.shape[:-1], -1), (x, weight)


def head_backward(dlogits: Array, cache: tuple, train_weight: bool = False) -> tuple[Array, dict[str, Array]]:
    """dlogits (..., V) -> dx (..., D), and {"weight": dW (V, D)} with `train_weight`, {} without.

    logits = x W^T        dx = dlogits W, dW = dlogits^T x
    """
    x, weight = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dlogits.reshape(-1, dlogits.shape[-1])  # (N, D), (N, V)
    dx = array_module(x).zeros(rows.shape, x.dtype)  # (N, D)
    for tile in _tiles(weight):
        dx += drows[:, tile] @ _rows(weight, tile, x.dtype)  # (N, D): a sum over the tiles
    return dx.reshape(x.shape), {"weight": drows.T @ rows} if train_weight else {}


def _tiles(weight: Weight) -> list[slice]:
    """Slices of W's rows: one of all rows if W is quantised, as its blocks may span rows."""
    n, columns = weight.shape
    step = n if isinstance(weight, QuantizedTensor) else max(1, TILE // columns)
    return [slice(start, start + step) for start in range(0, n, step)]


def _rows(weight: Weight, tile: slice, dtype: np.dtype) -> Array:
    """The tile's rows (rows, D) of W, in `dtype`."""
    return dense(weight if isinstance(weight, QuantizedTensor) else weight[tile], dtype)
