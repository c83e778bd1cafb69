"""A ledger: the bytes of a training step by category, line by line, each with the formula that gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CATEGORIES = {
    "embeddings": "the embedding of the tokens, and of the positions where they are learned",
    "codes": "the linears' 4-bit codes",
    "constants": "the codes' constants: 32 bits a block, or at two levels 8 bits a block and 32 bits for 256 blocks",
    "linears": "the weights of linears that are not quantised, and all biases of linears",
    "norms": "the norms' weights",
    "head": "the output head, unless it is the embedding",
    "adapter": "A and B, and DoRA's magnitudes",
    "optimizer": "AdamW's two moments of what is trained",
    "batch": "tokens and labels",
    "gradients": "those of what is trained",
    "activations": "what the forward keeps for the backward",
    "recomputed": "a layer's activations, computed again in the backward",
    "attention": "the scores of a tile of queries, and what else attention needs for a moment",
    "logits": "the logits and their gradient",
    "dequantised": "a weight that is dequantised for a product",
    "scratch": "all else: outputs on their way to the next operation, gradients of activations",
}
PERSISTENT = ("embeddings", "codes", "constants", "linears", "norms", "head", "adapter", "optimizer", "batch")


@dataclass(frozen=True)
class Entry:
    """A line of a ledger: what is held, the formula of its bytes in the symbols of functional.py's legend (L: layers),
    the formula with its numbers, and the bytes."""

    category: str
    what: str
    formula: str
    numbers: str
    nbytes: int


@dataclass(frozen=True)
class Ledger:
    """The bytes of a training step.

    entries: what is held between steps, and the gradients and activations that a step keeps. peak: the most that is
    held at once. at_peak: {category: bytes} at that moment; they add up to `peak`.
    """

    entries: tuple[Entry, ...]
    peak: int
    at_peak: Mapping[str, int] = field(default_factory=dict)

    def bytes(self) -> dict[str, int]:
        """{category: bytes} of the entries, in the order of CATEGORIES."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for entry in self.entries:
            sums[entry.category] += entry.nbytes
        return {category: n for category, n in sums.items() if n}

    @property
    def persistent(self) -> int:
        """What is held between two steps."""
        return sum(n for category, n in self.bytes().items() if category in PERSISTENT)
