"""Tokenizers: read from a model's directory, or trained; text into tokens and back, and each token's size in bytes.

The tokenizers library does the work. It is loaded when it is first needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files.hub import model_directory

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from .examples import Document

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer at `path`, a tokenizer.json or a model's directory or hub id, without truncation and padding.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read or contains a token >= `vocab_size`.
    """
    from tokenizers import Tokenizer

    path = Path(path) if Path(path).is_file() else model_directory(path) / "tokenizer.json"
    data = path.read_bytes()
    with _as_value_error(f"{path}: the tokenizers library cannot read it"):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    last = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and last >= vocab_size:
        raise ValueError(
            f"{path}: {tokenizer.id_to_token(last)!r:.80} is token {last}, but the model has only {vocab_size} tokens"
        )
    tokenizer.where = str(path)  # type: ignore[attr-defined]  # for later errors
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = True) -> Encoding:
    """The tokens of `text` (`.ids`), with those that the tokenizer puts around a text unless `special_tokens` is False.

    Raises ValueError that names the tokenizer's file if it fails on the text, or the text is not Unicode.
    """
    check_text(text)
    with _as_value_error(f"{_where(tokenizer)}: the tokenizer fails on {text[:60]!r}"):
        return tokenizer.encode(text, add_special_tokens=special_tokens)


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """`encode` of many texts at once, on all cores."""
    for text in texts:
        check_text(text)
    with _as_value_error(f"{_where(tokenizer)}: the tokenizer fails on a text"):
        return tokenizer.encode_batch(list(texts))


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of `tokens`, without special tokens. Raises ValueError if the tokenizer fails."""
    with _as_value_error(f"{_where(tokenizer)}: the tokenizer fails to decode tokens"):
        return tokenizer.decode(tokens)


def check_text(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which Python uses for a byte that is not UTF-8."""
    if (half := re.search("[\ud800-\udfff]", text)) is not None:
        raise ValueError(f"expected UTF-8 text, got half of a surrogate pair at character {half.start()}")


@contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """Turn the library's errors into ValueErrors: it raises bare Exceptions, and a BaseException if its Rust panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {' '.join(str(error).split()):.200}") from None


def _where(tokenizer: Tokenizer) -> str:
    return getattr(tokenizer, "where", "the tokenizer")


# How text is cut before pairs are merged; no token crosses a cut. There is a cut after each run of line ends, so that a
# line has the same tokens alone as after others.
_PIECES = (
    r"^[ \t]+|"  # the indentation of a line
    r"[^\r\n\p{L}\p{N}]?\p{L}+|"  # a word and the space or sign before it: " name", "_name", "(name"
    r"\p{N}{1,3}|"  # digits, three at most
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|"  # signs, with the end of the line: "):\n"
    r"\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"  # spaces, without the last before a word
)


def train_bpe(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer for source code and prose; the same documents give the same tokenizer.

    Token 0 is "<|endoftext|>", then come the 256 bytes, so that no text is unknown, then the most frequent merges
    (Sennrich et al. 2016, section 3.2, on bytes as in GPT-2), up to `vocab_size` if there are enough.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size: expected 257 (bytes and {END_OF_TEXT}) or more, got {vocab_size}")
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

    For byte-level BPE and for SentencePiece's spelling ("\u2581" is a space, "<0x0A>" a byte). The sum over a text's
    tokens is the text's length in bytes; SentencePiece may add a space at the beginning.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(tokenizer.decoder)
    lengths = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for token, i in vocabulary.items():
        if i in added:
            lengths[i] = 0 if added[i].special else len(token.encode())
        elif byte_level:
            lengths[i] = len(token)  # one character stands for one byte
        else:
            byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
            lengths[i] = 1 if byte else len(token.replace("\u2581", " ").encode())
    return lengths
