"""The keys and values of the positions that a decoder has seen: what makes generation cost one position a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Array
from .config import Config


class KVCache:
    """The keys and values of the positions seen so far, so that each new token costs one position and not all.

    Holds two arrays (B, capacity, K, h) a layer. `length` is the number of positions filled.
    """

    def __init__(self, config: Config, batch: int, capacity: int, dtype: Any = np.float32) -> None:
        shape = (config.layers, 2, batch, capacity, config.kv_heads, config.head_dim)
        self.arrays = np.empty(shape, dtype)
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k, v (B, T, K, h) of the new positions; -> all keys and values so far, (B, S, K, h) each."""
        stop = self.length + k.shape[1]
        if stop > self.arrays.shape[3]:
            raise ValueError(f"the cache holds {self.arrays.shape[3]} positions, {stop} were asked for")
        keys, values = self.arrays[layer]
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]
