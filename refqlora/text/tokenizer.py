"""Tokenizers: read from a model's directory, trained anew, and how many bytes each of their tokens stands for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..files.hub import model_directory
from .examples import Document

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in `path`, tokenizer.json or the model (directory or hub's id) it is of; no truncation or padding.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read or has a token of `vocab_size` or more.
    """
    path = Path(path) if Path(path).is_file() else model_directory(path) / "tokenizer.json"
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no other
        raise ValueError(f"{path}: not a file of the tokenizers library: {error}") from None
    last = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and last >= vocab_size:
        raise ValueError(f"{path}: {tokenizer.id_to_token(last)!r} is token {last}, past the model's {vocab_size}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# How text is cut before pairs are merged: no token reaches across. A cut follows each run of line ends, so
# that a line is tokenized alone as it is after others.
_PIECES = (
    r"^[ \t]+|"  # the indentation of a line, whole
    r"[^\r\n\p{L}\p{N}]?\p{L}+|"  # a word and the space or sign before it: " name", "_name", "(name"
    r"\p{N}{1,3}|"  # digits, three at most
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|"  # signs, with the end of the line: "):\n"
    r"\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"  # spaces, the last of which goes with the word
)


def train_bpe(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer for source code and prose; the same documents give the same tokenizer.

    Token 0 is "<|endoftext|>", then come the 256 bytes, so that there is no unknown text, then the most
    frequent merges (Sennrich et al. 2016, section 3.2, on bytes as in GPT-2), as long as there is one.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size: expected 257 (bytes and {END_OF_TEXT}) or more, found {vocab_size}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of UTF-8 text that each token stands for, (V,) int64; 0 for special tokens.

    For byte-level BPE and for SentencePiece's spelling ("\u2581" is a space, "<0x0A>" a byte). The sum over a
    text's tokens is the text's length in bytes; SentencePiece may add a space at the beginning.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(tokenizer.decoder)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, i in vocabulary.items():
        if i in added:
            lengths[i] = 0 if added[i].special else len(token.encode())
        elif byte_level:
            lengths[i] = len(token)  # one character stands for one byte
        else:
            byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
            lengths[i] = 1 if byte else len(token.replace("\u2581", " ").encode())
    return lengths
