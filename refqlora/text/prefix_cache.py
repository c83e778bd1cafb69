"""The keys and values of the text that a model read last, reused for a next text with the same beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Array
from ..kv_cache import KVCache

if TYPE_CHECKING:
    from ..model import Model

AT_ONCE = 256  # positions of a prompt in one forward; bounds the memory of its logits, (AT_ONCE, V)


class PrefixCache:
    """A model with the keys and values of the tokens it read last: the beginning that a text shares with them is not
    read again.

    The text is read from its beginning if the model's active adapter is another (or none, or one loaded anew), and if
    the text's length changes RoPE's frequencies (`Config.rope_regime`). An adapter changed in place is not noticed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kv = KVCache(model.config, 1, model.config.max_positions, model.dtype)
        self.tokens: list[int] = []  # whose keys and values `kv` holds
        self.made_for: tuple[Any, int] | None = None  # the adapter and the regime of RoPE that they belong to

    def logits(self, tokens: Sequence[int]) -> Array:
        """tokens (at least one) -> the logits (V,) of the next token."""
        n, regime = len(tokens), self.model.config.rope_regime
        adapter = self.model.adapters[self.model.active] if self.model.active is not None else None
        same = self.made_for is not None and self.made_for[0] is adapter and self.made_for[1] == regime(n)
        shared = shared_prefix(self.tokens, tokens[:-1]) if same else 0
        self.tokens, self.made_for = self.tokens[:shared], (adapter, regime(n))
        self.kv.truncate(shared)
        at_once = AT_ONCE if regime(min(n, shared + AT_ONCE)) == regime(n) else n  # keep all pieces in one regime
        for start in range(shared, n, at_once):
            piece = tokens[start : start + at_once]
            logits, _ = self.model.forward(np.array([piece]), kv=self.kv)  # (1, T, V)
            self.tokens += piece
        return logits[0, -1]


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of tokens or characters that both begin with."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
