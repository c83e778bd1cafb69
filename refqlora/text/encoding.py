"""Text into tokens: documents packed into blocks, and examples into sequences with a loss mask."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from tokenizers import Tokenizer

from ..functional import IGNORE
from .chat import Marked
from .dataset import Dataset, split
from .examples import Conversation, Document, Example
from .tokenizer import token_bytes


def pack(documents: list[Document], tokenizer: Tokenizer, block_size: int, eos_id: int) -> Dataset:
    """The documents one after another, `eos_id` after each, cut into blocks of `block_size` tokens.

    All labels count; what is left over at the end is dropped. Raises ValueError if the text is too short.
    """
    encodings = tokenizer.encode_batch([document.text for document in documents])
    texts = [np.array([*encoding.ids, eos_id], np.int32) for encoding in encodings]
    stream = np.concatenate(texts or [np.zeros(0, np.int32)])
    n = (len(stream) - 1) // block_size  # the last label is one token further
    if n < 1:
        raise ValueError(f"the text has {len(stream)} tokens; a block of {block_size} needs {block_size + 1}")
    tokens, labels = (stream[i : i + n * block_size].reshape(n, block_size) for i in (0, 1))
    return Dataset(tokens, labels, token_bytes(tokenizer))


def pack_split(
    documents: list[Document], tokenizer: Tokenizer, block_size: int, eos_id: int, fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    """`pack` into (training, held-out): whole documents are held out if there are enough, else blocks."""
    if fraction * len(documents) >= 1:
        with suppress(ValueError):  # too short for a block
            parts = split(documents, fraction, seed)
            return tuple(pack(part, tokenizer, block_size, eos_id) for part in parts)
    return split(pack(documents, tokenizer, block_size, eos_id), fraction, seed)


def tokenize_examples(
    examples: list[Example | Conversation], tokenizer: Tokenizer, max_length: int, eos_id: int
) -> Dataset:
    """One sequence an example, and one a text of a conversation, most often one too.

    An example is prompt, completion, `eos_id`; the labels of completion and `eos_id` count. Prompt and completion are
    tokenized each alone, so that the model meets the prompt as it will when it generates; special tokens that the
    tokenizer puts before a text come before the prompt only. A conversation's text is tokenized whole, with the
    special tokens that are in it and no others; a token counts if any of its characters does, and what follows the
    last that counts is dropped. More than `max_length` tokens lose their beginning, so that the last completion or
    answer stays whole; one too long by itself loses its end. ValueError if there is no example.
    """
    if not examples:
        raise ValueError("no example to tokenize")
    all_tokens, all_labels, truncated = [], [], 0
    for example in examples:
        for part in [example] if isinstance(example, Example) else example.texts:
            ids, counts = part.tokenize(tokenizer) if isinstance(part, Marked) else _tokenize(part, tokenizer, eos_id)
            excess = max(0, len(ids) - 1 - max_length)  # the last is a label only: the model does not read it
            answer = len(ids) - counts[::-1].index(False) if False in counts else 0  # where the last one begins
            window = slice(min(excess, answer), min(excess, answer) + max_length + 1)
            labels = [token if count else IGNORE for token, count in zip(ids, counts, strict=True)]
            all_tokens.append(np.array(ids[window][:-1], np.int32))
            all_labels.append(np.array(labels[window][1:], np.int32))
            truncated += excess > 0
    return Dataset(all_tokens, all_labels, token_bytes(tokenizer), truncated)


def _tokenize(example: Example, tokenizer: Tokenizer, eos_id: int) -> tuple[list[int], list[bool]]:
    """The tokens, and which of them count; the last does."""
    prompt = tokenizer.encode(example.prompt).ids
    completion = [*tokenizer.encode(example.completion, add_special_tokens=not prompt).ids, eos_id]
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)
