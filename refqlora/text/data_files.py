"""Training text from people's files: whole texts, and examples in JSON in the usual spellings."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dataset import Dataset, split
from .encoding import pack_split, tokenize_examples
from .examples import Conversation, Document, Example
from .tokenizer import check_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .chat import ChatTemplate, Message

# The spellings of examples: required keys, optional keys. The first one that fits is used.
KINDS = (
    (("messages",), ()),
    (("conversations",), ("system",)),  # ShareGPT's
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input", "system")),  # Alpaca's (Taori et al. 2023)
    (("text",), ()),
)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; all others are the template's


def read_data(
    path: str | Path, template: ChatTemplate, say: Callable[[str], object] = lambda line: None
) -> list[Document] | list[Example | Conversation]:
    """The texts at `path`, or the examples in a .jsonl or .json file.

    Texts: a UTF-8 file, or all files in and below a directory, sorted by path, without those that are hidden, empty or
    not text. Examples: a JSON object on each line, or an array of them:

        {"prompt": ..., "completion": ...}                  a text, and its continuation
        {"messages": [{"role": ..., "content": ...}, ...]}  a conversation, written by `template`
        {"conversations": [{"from": "human", "value": ...}, ...]}  the same, as ShareGPT spells it
        {"instruction": ..., "input": ..., "output": ...}   one question and answer, as Alpaca spells it
        {"text": ...}                                       a document

    Content may be text or a list of parts of type "text". The template decides which roles exist. `say` is called with
    a line on what was recognised, what was skipped, and which keys are ignored.

    Raises FileNotFoundError if there is no file, and ValueError that names the file and the line (or the number in the
    array) of an example that cannot be used: its completion is empty, the assistant says nothing, or the template
    refuses it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _read_examples(path, template, say)
    return _read_texts(path, say)


def read_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eos_id: int,
    max_length: int,
    held_out: float,
    seed: int,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Dataset, Dataset]:
    """(training, held-out) from `read_data`: examples, or texts cut into blocks of `max_length` tokens.

    held_out: the fraction that is held out, 0 for none. Raises what `read_data`, `split`, `pack` and
    `tokenize_examples` raise.
    """
    return datasets(read_data(path, template, say), tokenizer, eos_id, max_length, held_out, seed)


def datasets(
    found: list[Document] | list[Example | Conversation],
    tokenizer: Tokenizer,
    eos_id: int,
    max_length: int,
    held_out: float,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """`read_dataset` of what `read_data` has found."""
    if documents := [item for item in found if isinstance(item, Document)]:
        return pack_split(documents, tokenizer, max_length, eos_id, held_out, seed)
    training, rest = split([item for item in found if not isinstance(item, Document)], held_out, seed)
    return (
        tokenize_examples(training, tokenizer, max_length, eos_id),
        tokenize_examples(rest, tokenizer, max_length, eos_id),
    )


# ---- texts -------------------------------------------------------------------------------------------------


def _read_texts(path: Path, say: Callable[[str], object]) -> list[Document]:
    if path.is_file():
        return [Document(path.name, _read_text(path))]
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise FileNotFoundError(f"{path}: expected a file, or a directory with files that are not hidden")
    documents, skipped = [], []
    for name in names:
        try:
            if name.suffix == ".jsonl":
                raise ValueError(f"{path / name}: expected text, got examples: give the file itself")
            documents.append(Document(name.as_posix(), _read_text(path / name)))
        except ValueError as error:
            skipped.append(error)
    if not documents:
        raise skipped[0]
    if skipped:
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        say(f"read {len(documents)} of {len(names)} files; skipped {skipped[0]}{more}")
    return documents


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte offset {error.start}: {error.reason}") from None
    if "\0" in text:
        raise ValueError(f"{path}: not text: it contains zero bytes")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


# ---- examples ----------------------------------------------------------------------------------------------


def _read_examples(
    path: Path, template: ChatTemplate, say: Callable[[str], object]
) -> list[Document] | list[Example | Conversation]:
    found: list[Any] = []
    kinds: Counter[tuple[str, ...]] = Counter()
    ignored: set[str] = set()
    for where, value in _values(path):
        try:
            keys, example = _example(value, where, template, ignored)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        kinds[keys] += 1
        if not isinstance(example, Document) or example.text.strip():  # tables may have empty rows
            found.append(example)
    if not found:
        raise ValueError(f"{path}: expected an example on each line, or an array of them, got none")
    if len({isinstance(example, Document) for example in found}) > 1:
        raise ValueError(f"{path}: expected either examples or documents (text), got both")
    said = " and ".join(f"{n:,} with {', '.join(keys)}" for keys, n in kinds.items())
    say(f"{path.name}: {said}" + (f"; ignored: {', '.join(sorted(ignored))}"[:200] if ignored else ""))
    return found


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of each line of a file, or of each element if the file is an array."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.lstrip().startswith(b"["):
        yield from ((f"{path}[{i}]", value) for i, value in enumerate(_parse(data, str(path))))
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected a JSON object on each line, or an array of them, got broken JSON: {error}"
        ) from None


def _example(
    value: Any, where: str, template: ChatTemplate, ignored: set[str]
) -> tuple[tuple[str, ...], Document | Example | Conversation]:
    """The keys that were used, and the document, example or conversation; other keys are added to `ignored`."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    given = {key: x for key, x in value.items() if x is not None}  # tables fill missing columns with null
    kind = next((kind for kind in KINDS if given.keys() >= set(kind[0])), None)
    if kind is None:
        kinds = " or ".join(", ".join(needed) for needed, _ in KINDS)
        raise ValueError(f"expected the keys {kinds}, got {', '.join(given) or 'none':.100}")
    needed, optional = kind
    keys = (*needed, *(key for key in optional if key in given))
    ignored |= given.keys() - set(keys)
    x = {key: _text(given[key], key) for key in keys if key not in ("messages", "conversations")}
    if "completion" in x:
        if not x["completion"]:
            raise ValueError("expected a completion, got an empty one")
        return keys, Example(**x)
    if "text" in x:
        return keys, Document(where, x["text"])

    messages: list[Message] = [{"role": "system", "content": x["system"]}] if "system" in x else []
    if "output" in x:
        question = "\n\n".join(filter(None, (x["instruction"], x.get("input"))))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": x["output"]}]
    elif not isinstance(given[keys[0]], list):
        raise ValueError(f"{keys[0]}: expected a list, got {type(given[keys[0]]).__name__}")
    else:
        messages += [_message(m, f"{keys[0]}[{i}]", template, ignored) for i, m in enumerate(given[keys[0]])]
    return keys, Conversation(template.examples(messages))


def _message(value: Any, where: str, template: ChatTemplate, ignored: set[str]) -> Message:
    """A message as templates expect it: role, content as text, and the other keys that this template reads."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with role and content, got {type(value).__name__}")
    message = dict(value)
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: expected a role, got {', '.join(map(str, value)) or 'nothing':.100}")
    message["role"] = ROLES.get(message["role"], message["role"])
    unread = {key for key in message.keys() - {"role", "content"} if not template.reads(key)}
    ignored |= {f"{key} of messages" for key in unread}
    if message.get("content") is None and message.get("tool_calls") and "tool_calls" not in unread:
        message["content"] = ""
    message["content"] = _text(message.get("content"), f"{where}.content")
    return {key: x for key, x in message.items() if key not in unread}


def _text(value: Any, where: str) -> str:
    """`value`, a text or a list of parts of text, as one text."""
    for i, part in enumerate(value if isinstance(value, list) else ()):
        if not (isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}[{i}]: expected a part of type text, got {kind!s:.40}")
    if isinstance(value, list):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {type(value).__name__}")
    try:
        check_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return value
