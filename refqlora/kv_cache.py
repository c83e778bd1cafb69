"""The keys and values of the positions that a decoder has seen: what makes generation cost one position a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Array, array_module
from .config import Config


class KVCache:
    """The keys and values of the positions seen so far, so that each new token costs one position and not all.

    `arrays` holds a layer's keys and values in one array (2, B, S, K, h); `length` is the number of positions filled.
    The arrays grow by doubling as positions come, up to `capacity`. Every position is kept, under a sliding window
    too: which of them a query sees is for the attention's mask to say.
    """

    def __init__(self, config: Config, batch: int, capacity: int, dtype: Any = np.float32) -> None:
        empty = np.empty((2, batch, 0, config.kv_heads, config.head_dim), dtype)
        self.arrays: list[Array] = [empty] * config.layers
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k, v (B, T, K, h) of the new positions -> all keys and values so far, (B, S, K, h) each.

        `length` stays as it is until every layer has stored its own: then the decoder sets it. Raises ValueError beyond
        `capacity`.
        """
        stop = self.length + k.shape[1]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {stop} were asked for")
        if stop > self.arrays[layer].shape[2]:
            self.arrays[layer] = self._grown(self.arrays[layer], stop, k)
        keys, values = self.arrays[layer]
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} positions and cannot be cut to {length}")
        self.length = length

    def _grown(self, array: Array, least: int, like: Array) -> Array:
        """`array` (2, B, S, K, h) with room for `least` positions or more, where `like` is: on the CPU or the GPU."""
        two, batch, room, *head = array.shape
        grown = array_module(like).empty((two, batch, min(self.capacity, max(least, 2 * room)), *head), array.dtype)
        if self.length:
            grown[:, :, : self.length] = array[:, :, : self.length]
        return grown
