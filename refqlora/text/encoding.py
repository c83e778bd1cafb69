"""Text into tokens: documents packed into blocks, and examples into sequences with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ..functional import IGNORE
from .dataset import Dataset, split
from .examples import Conversation, Document, Example
from .tokenizer import encode_batch, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def pack(documents: Sequence[Document], tokenizer: Tokenizer, block_size: int, eos_id: int) -> Dataset:
    """The documents one after another, `eos_id` after each, cut into blocks of `block_size` tokens.

    All labels count; an incomplete last block is dropped. Raises ValueError if the text is too short for one block.
    """
    _check_length(block_size)
    encodings = encode_batch(tokenizer, [document.text for document in documents])
    texts = [np.array([*encoding.ids, eos_id], np.int32) for encoding in encodings]
    stream = np.concatenate(texts or [np.zeros(0, np.int32)])
    n = (len(stream) - 1) // block_size  # the last label is one token further
    if n < 1:
        what = documents[0].name if len(documents) == 1 else f"the {len(documents)} texts"
        expected = f"{block_size + 1} tokens for a block of {block_size}"
        raise ValueError(f"{what}: expected {expected}, got {len(stream)}: give more text or a smaller maximum length")
    tokens, labels = (stream[i : i + n * block_size].reshape(n, block_size) for i in (0, 1))
    return Dataset(list(tokens), list(labels), token_bytes(tokenizer))


def pack_split(
    documents: Sequence[Document], tokenizer: Tokenizer, block_size: int, eos_id: int, fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    """`pack` into (training, held-out). Whole documents are held out if there are enough of them, else blocks."""
    if fraction * len(documents) >= 1:
        with suppress(ValueError):  # too short for a block
            training, held_out = (
                pack(part, tokenizer, block_size, eos_id) for part in split(documents, fraction, seed)
            )
            return training, held_out
    return split(pack(documents, tokenizer, block_size, eos_id), fraction, seed)


def tokenize_examples(
    examples: Sequence[Example | Conversation], tokenizer: Tokenizer, max_length: int, eos_id: int
) -> Dataset:
    """One sequence for each example, and one for each text of a conversation (most have one).

    An example is prompt, completion, `eos_id`; the labels of completion and `eos_id` count. In a conversation's text a
    token counts if any of its characters does, and what follows the last such token is dropped. A sequence of more
    than `max_length` tokens loses its beginning, so that the last completion or answer stays complete; an answer that
    is too long by itself loses its end.
    """
    _check_length(max_length)
    all_tokens, all_labels, truncated = [], [], 0
    for example in examples:
        if isinstance(example, Example):
            tokenized = [example.tokenize(tokenizer, eos_id)]
        else:
            tokenized = [text.tokenize(tokenizer) for text in example.texts]
        for ids, counts in tokenized:
            excess = max(0, len(ids) - 1 - max_length)  # the last is a label only: the model does not read it
            answer = len(ids) - counts[::-1].index(False) if False in counts else 0  # where the last one begins
            window = slice(min(excess, answer), min(excess, answer) + max_length + 1)
            labels = [token if count else IGNORE for token, count in zip(ids, counts, strict=True)]
            all_tokens.append(np.array(ids[window][:-1], np.int32))
            all_labels.append(np.array(labels[window][1:], np.int32))
            truncated += excess > 0
    return Dataset(all_tokens, all_labels, token_bytes(tokenizer), truncated)


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"length of a sequence: expected 2 or more, got {length}: a token is predicted from others")
