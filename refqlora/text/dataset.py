"""Batches of tokens with a loss mask.

A dataset is a list of sequences. Each has tokens (T,), what the model reads, and labels (T,), the token that
it must predict at each position, or -100 where the loss does not count. Plain text is cut into blocks of one
length in which every label counts; an example is one sequence in which only the completion's labels count.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from ..functional import IGNORE

T = TypeVar("T")
PAD = 0  # any token will do: padding is on the right, where causal attention does not look


@dataclass(frozen=True, eq=False)
class Dataset:
    """n sequences of tokens with their labels, of equal or different lengths.

    tokens, labels: n of each, (T_i,) int32; a label is the next token, or -100 if it does not count.
    token_bytes: see tokenizer.token_bytes. truncated: how many examples were cut to fit, before any split.
    """

    tokens: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    token_bytes: np.ndarray  # (V,)
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def counted_tokens(self) -> int:
        """How many labels count in the loss."""
        return sum(int((labels != IGNORE).sum()) for labels in self.labels)

    @property
    def counted_bytes(self) -> int:
        """The bytes of the labels that count; bits per byte = loss * counted_tokens / (ln 2 * counted_bytes)."""
        return sum(int(self.token_bytes[labels[labels != IGNORE]].sum()) for labels in self.labels)

    @property
    def checksum(self) -> int:
        """CRC-32 of the sequences in their order, to tell whether two datasets are the same."""
        checksum = 0
        for tokens, labels in zip(self.tokens, self.labels, strict=True):
            checksum = zlib.crc32(np.concatenate([[len(tokens)], tokens, labels]).astype("<i4").tobytes(), checksum)
        return checksum

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The sequences at these indices, in this order."""
        tokens, labels = [self.tokens[i] for i in indices], [self.labels[i] for i in indices]
        return Dataset(tokens, labels, self.token_bytes, self.truncated)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels), each (B, T) int64, padded on the right to the longest with 0 and -100."""
        shape = len(indices), max(len(self.tokens[i]) for i in indices)
        tokens, labels = np.full(shape, PAD, np.int64), np.full(shape, IGNORE, np.int64)
        for row, i in enumerate(indices):
            tokens[row, : len(self.tokens[i])] = self.tokens[i]
            labels[row, : len(self.labels[i])] = self.labels[i]
        return tokens, labels


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which of n sequences make up the batch of `step` (from 0), (batch_size,) int64.

    A pure function, so that a resumed run continues with the same data. Each epoch is a permutation drawn from (seed,
    epoch); a batch may reach into the next epoch.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return order[positions - epochs[0] * n]


@overload
def split(items: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]: ...
@overload
def split(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]: ...
def split(items: Sequence[Any] | Dataset, fraction: float, seed: int) -> tuple[Any, Any]:
    """(training, held-out): `fraction` of the items, but at least one, is drawn at random and held out; 0 for none.

    Raises ValueError if nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held-out fraction: expected at least 0 and less than 1, got {fraction}")
    n_held_out = max(1, round(fraction * len(items))) if fraction else 0
    if n_held_out >= len(items):
        raise ValueError(
            f"a held-out fraction of {fraction} takes {n_held_out} of {len(items)} examples or blocks of text: nothing "
            "is left to train on (a fraction of 0 holds out none)"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    parts = np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
    if isinstance(items, Dataset):
        return items.subset(parts[0]), items.subset(parts[1])
    return [items[i] for i in parts[0]], [items[i] for i in parts[1]]
