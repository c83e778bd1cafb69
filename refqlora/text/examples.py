"""Training text as people have it, from files: documents of text, and examples of prompt and completion or messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from .chat import ROLES, ChatTemplate, Marked


class Document(NamedTuple):
    """A text and the name it goes by: a file's path, a module."""

    name: str
    text: str


class Example(NamedTuple):
    """A text to begin with and the text that is to follow it; only the completion counts in the loss."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages as a chat template writes them, most often in one text; the marked parts count in the loss."""

    texts: tuple[Marked, ...]


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


def read_jsonl(path: str | Path, template: ChatTemplate) -> list[Example | Conversation]:
    """One example a line, blank lines aside.

    {"prompt": str, "completion": str} or {"messages": [{"role": str, "content": str}, ...]}, and no other
    keys; `template` writes the messages. Raises ValueError with file and line number for any other line, an empty
    completion, an unknown role, a conversation in which the assistant says nothing or that the template refuses.
    """
    examples = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                examples.append(_parse_example(line.decode("utf-8"), template))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: expected an example on each line, found none")
    return examples


def _parse_example(line: str, template: ChatTemplate) -> Example | Conversation:
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
    return Conversation(template.examples(value["messages"]))


def _expect_fields(value: object, where: str, **types: type) -> None:
    """Raise ValueError unless `value` is a dict of exactly these keys and types of value."""
    found = {key: type(x) for key, x in value.items()} if isinstance(value, dict) else type(value)
    if found != types:
        expected, found = (re.sub("<class '(.*?)'>", r"\1", str(fields)) for fields in (types, found))
        raise ValueError(f"{where}: expected {expected}, found {found}")
    if any(isinstance(x, str) and re.search("[\ud800-\udfff]", x) for x in value.values()):
        raise ValueError(f"{where}: expected text, found half of a surrogate pair")
