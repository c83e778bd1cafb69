"""Text and JSON lines into batches of tokens with a loss mask.

A dataset is a list of sequences. Each has tokens (T,), what the model reads, and labels (T,), the token that
it must predict at each position, or -100 where the loss does not count. Plain text is cut into blocks of one
length in which every label counts; an example is one sequence in which only the completion's labels count.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .functional import IGNORE
from .hub import model_directory

PAD = 0  # any token will do: it stands right of all that counts, where causal attention cannot see it
ROLES = ("system", "user", "assistant")
END_OF_TEXT = "<|endoftext|>"


class Document(NamedTuple):
    """A text and the name it goes by: a file's path, a module."""

    name: str
    text: str


class Example(NamedTuple):
    """A text to begin with and the text that is to follow it; only the completion counts in the loss."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """(role, content) in order, the role one of `ROLES`; only what the assistant says counts in the loss."""

    messages: tuple[tuple[str, str], ...]


# ---- files -----------------------------------------------------------------------------------------------


def read_texts(path: str | Path) -> list[Document]:
    """A UTF-8 text file, or all files in and below a directory, sorted by path; hidden ones are skipped.

    Raises FileNotFoundError if there is no file, ValueError for a file that is empty or not UTF-8.
    """
    path = Path(path)
    if path.is_file():
        return [Document(path.name, _read_text(path))]
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise FileNotFoundError(f"{path}: neither a file nor a directory with files that are not hidden")
    return [Document(name.as_posix(), _read_text(path / name)) for name in names]


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte offset {error.start}: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_jsonl(path: str | Path) -> list[Example | Conversation]:
    """One example a line, blank lines aside.

    {"prompt": str, "completion": str} or {"messages": [{"role": str, "content": str}, ...]}, and no other
    keys. Raises ValueError with file and line number for any other line, an empty completion, an unknown role
    and a conversation in which the assistant says nothing.
    """
    examples = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                examples.append(_parse_example(line.decode("utf-8")))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: expected an example on each line, found none")
    return examples


def _parse_example(line: str) -> Example | Conversation:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, found broken JSON: {error}") from None
    if not (isinstance(value, dict) and "messages" in value):
        _expect_fields(value, "the line", prompt=str, completion=str)
        if not value["completion"]:
            raise ValueError("expected a completion, found an empty one")
        return Example(**value)

    _expect_fields(value, "the line", messages=list)
    for i, message in enumerate(value["messages"]):
        _expect_fields(message, f"messages[{i}]", role=str, content=str)
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{i}]: expected a role of {ROLES}, found {message['role']!r}")
    messages = tuple((message["role"], message["content"]) for message in value["messages"])
    if not any(role == "assistant" and content for role, content in messages):
        raise ValueError("expected something said by the assistant, found nothing")
    return Conversation(messages)


def _expect_fields(value: object, where: str, **types: type) -> None:
    """Raise ValueError unless `value` is a dict of exactly these keys and types of value."""
    found = {key: type(x) for key, x in value.items()} if isinstance(value, dict) else type(value)
    if found != types:
        expected, found = (re.sub("<class '(.*?)'>", r"\1", str(fields)) for fields in (types, found))
        raise ValueError(f"{where}: expected {expected}, found {found}")
    if any(isinstance(x, str) and re.search("[\ud800-\udfff]", x) for x in value.values()):
        raise ValueError(f"{where}: expected text, found half of a surrogate pair")


# ---- tokenizers ------------------------------------------------------------------------------------------


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


# ---- datasets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dataset:
    """n sequences of tokens with their labels, of one length or of many.

    tokens, labels: n of each, (T_i,) int32; a label is the next token, or -100 where none counts.
    token_bytes: see the function. truncated: how many examples were cut to fit, before any split.
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
        """The bytes they stand for; bits per byte = loss * counted_tokens / (ln 2 * counted_bytes)."""
        return sum(int(self.token_bytes[labels[labels != IGNORE]].sum()) for labels in self.labels)

    @property
    def checksum(self) -> int:
        """CRC-32 of the sequences in their order, to tell whether two datasets are the same."""
        checksum = 0
        for tokens, labels in zip(self.tokens, self.labels, strict=True):
            checksum = zlib.crc32(np.concatenate([[len(tokens)], tokens, labels]).astype("<i4"), checksum)
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

    A pure function: a run resumed at a step goes on with the same data. Each epoch is a permutation drawn from (seed,
    epoch); a batch that reaches the end of one goes on into the next.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return order[positions - epochs[0] * n]


def split(items: list | Dataset, fraction: float, seed: int) -> tuple[list | Dataset, list | Dataset]:
    """(training, held-out): `fraction` of the items, rounded, but at least one, is drawn and held out.

    Raises ValueError if nothing would be left to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")
    n_held_out = max(1, round(fraction * len(items)))
    if n_held_out >= len(items):
        raise ValueError(f"nothing left to train on: {n_held_out} of {len(items)} would be held out")
    order = np.random.default_rng(seed).permutation(len(items))
    parts = np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
    if isinstance(items, Dataset):
        return tuple(items.subset(part) for part in parts)
    return tuple([items[i] for i in part] for part in parts)


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
    """One sequence an example: prompt, completion, `eos_id`; the labels of completion and `eos_id` count.

    Prompt and completion are tokenized each alone, so that the model meets the prompt as it will when it
    generates; special tokens that the tokenizer puts before a text come before the prompt only. A message is
    written "role: content\\n": "assistant:" ends the prompt, " content" is the completion; messages after the
    assistant's last are dropped. More than `max_length` tokens lose their beginning, so that the last
    completion stays whole; a completion too long by itself loses its end. ValueError if there is no example.
    """
    if not examples:
        raise ValueError("no example to tokenize")
    all_tokens, all_labels, truncated = [], [], 0
    for example in examples:
        ids, labels = [], []
        for text, counts in _parts(example):
            part = tokenizer.encode(text, add_special_tokens=not ids).ids + [eos_id] * counts
            ids += part
            labels += part if counts else [IGNORE] * len(part)
        excess = max(0, len(ids) - 1 - max_length)  # the last is a label only: the model does not read it
        start = min(excess, len(ids) - len(part))
        window = slice(start, start + max_length + 1)
        all_tokens.append(np.array(ids[window][:-1], np.int32))
        all_labels.append(np.array(labels[window][1:], np.int32))
        truncated += excess > 0
    return Dataset(all_tokens, all_labels, token_bytes(tokenizer), truncated)


def _parts(example: Example | Conversation) -> list[tuple[str, bool]]:
    """The texts to tokenize each alone, with whether they count; the last does."""
    if isinstance(example, Example):
        return [(example.prompt, False), (example.completion, True)]
    parts, context = [], ""
    for role, content in example.messages:
        if role == "assistant" and content:
            parts += [(context + "assistant:", False), (" " + content, True)]
            context = "\n"
        else:
            context += f"{role}: {content}\n"
    return parts
