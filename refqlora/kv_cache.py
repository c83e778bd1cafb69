"""The KV cache: keys and values of the positions seen so far, so that each new token costs one position and not all."""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Array, array_module
from .config import Config


class KVCache:
    """`arrays[i]` holds the keys and values of layer i, (2, B, S, K, h), of which `length` positions are filled.

    The arrays double when they are full, up to `capacity` positions. Every position is kept, even with a sliding
    window: the attention's mask decides which of them a query sees.
    """

    def __init__(self, config: Config, batch: int, capacity: int, dtype: Any = np.float32) -> None:
        empty = np.empty((2, batch, 0, config.kv_heads, config.head_dim), dtype)
        self.arrays: list[Array] = [empty] * config.layers
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k, v (B, T, K, h) of the new positions -> all keys and values so far, (B, S, K, h) each.

        The decoder updates `length` when every layer has stored its own. Raises ValueError beyond `capacity`.
        """
        stop = self.length + k.shape[1]
        if stop > self.capacity:
            raise ValueError(f"kv: expected at most {self.capacity} positions, got {stop}")
        if stop > self.arrays[layer].shape[2]:
            self.arrays[layer] = self._grown(self.arrays[layer], stop, k)
        keys, values = self.arrays[layer]
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length

    def _grown(self, array: Array, least: int, like: Array) -> Array:
        """`array` (2, B, S, K, h) with room for at least `least` positions, on the device of `like`."""
        two, batch, room, *head = array.shape
        grown = array_module(like).empty((two, batch, min(self.capacity, max(least, 2 * room)), *head), array.dtype)
        if self.length:
            grown[:, :, : self.length] = array[:, :, : self.length]
        return grown
