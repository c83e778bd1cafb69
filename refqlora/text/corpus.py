"""Text for experiments without a download: the running Python's own standard library.

Three domains: the library's source files (`modules`), its functions and the first lines of their docstrings
(`docstring_examples`), and the language reference behind `help()` (`language_reference`). Each is divided into
training and held-out text by the CRC-32 of names, so that the division is the same on every machine.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import sysconfig
import textwrap
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

from .examples import Document, Example

# Tests, tables, packages that newer Pythons lack, and pydoc_data, the text of `language_reference`.
LEFT_OUT = {"distutils", "encodings", "lib2to3", "pydoc_data", "test", "turtledemo"}

# In some Python version the module on the left shares passages with the one on the right: keep both on one side.
GOES_WITH = {"_py_warnings": "warnings", "abc": "_py_abc", "dis": "ast", "wsgiref": "http"}

_TABLE_ROW = re.compile(r"""\s*["'\d\[({-].*,\s*(#.*)?""")  # a literal, or a tuple of them, and a comma


def modules(held_out: bool) -> list[Document]:
    """The standard library's .py files, sorted by dotted name; about one module in twelve is held out.

    All of a package is on the same side. Tests are left out, as are packages that newer Pythons lack, and files of
    data: at least half of their lines are rows of a table.

    Raises FileNotFoundError if this Python's library has no sources (zipped or stripped).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    library = sorted(_library(root))
    if not library:
        raise FileNotFoundError(f"{root}: no source of the standard library: this Python zips or strips them")
    return [document for document in library if _is_held_out(document.name) == held_out]


def docstring_examples(held_out: bool, every: int = 1) -> list[Example]:
    """Functions and methods of the library: signatures as prompts, first lines of docstrings as completions.

    A prompt is `def name(...):` as in the source, but dedented and without comments, and a newline; its completion is
    four spaces, the line in triple quotes, and a newline. Signatures have at most 200 characters; lines have 10 to 100
    characters of ASCII that need no escapes. Each pair appears once, and no held-out prompt is also a training prompt.
    every: of the training modules, take one in so many, for a quick look.

    Raises FileNotFoundError as `modules` does.
    """
    training = _documented_functions(modules(held_out=False)[::every])
    if not held_out:
        return training
    prompts = {example.prompt for example in training}
    examples = _documented_functions(modules(held_out=True))
    return [example for example in examples if example.prompt not in prompts]


def language_reference(held_out: bool) -> list[Document]:
    """The language reference's topics as `help()` shows them, sorted by name; about one in ten is held out.

    A topic that repeats a paragraph of a longer topic is left out, so that no paragraph of 60 characters or more is on
    both sides.

    Raises ModuleNotFoundError if this Python lacks `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this Python lacks pydoc_data, the text behind help()") from error
    kept, seen = [], set[str]()
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        paragraphs = {words for p in text.split("\n\n") if len(words := " ".join(p.split())) >= 60}
        if not paragraphs & seen:
            seen |= paragraphs
            kept.append(Document(name, text))
    return [topic for topic in sorted(kept) if (zlib.crc32(topic.name.encode()) % 10 == 1) == held_out]


def _is_held_out(module: str) -> bool:
    top = module.partition(".")[0]
    return zlib.crc32(GOES_WITH.get(top, top).encode()) % 12 == 6


def _library(root: Path) -> Iterator[Document]:
    """Every source file under `root` that belongs to the corpus, named by its module."""
    for top in sys.stdlib_module_names - LEFT_OUT:  # the directory may contain other files too
        for path in (root / f"{top}.py", *(root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if any(part in ("test", "tests") or part.endswith(("_test", "_tests")) for part in parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")  # turns \r\n into \n: the same text on every system
            except (FileNotFoundError, UnicodeDecodeError):  # built in or compiled; another encoding
                continue
            lines = [line for line in text.split("\n") if line.strip()]
            if 2 * sum(_TABLE_ROW.fullmatch(line) is not None for line in lines) < len(lines):
                yield Document(".".join(parts).removesuffix(".__init__"), text)


def _documented_functions(documents: list[Document]) -> list[Example]:
    """The examples of `docstring_examples` in these files, in the order of the source, each once."""
    return list(dict.fromkeys(example for document in documents for example in _examples(document.text)))


@functools.cache  # parsing the library takes seconds, and held-out examples need the training ones too
def _examples(source: str) -> tuple[Example, ...]:
    """The examples in one file, in its order."""
    examples = []
    lines = source.split("\n")  # as ast counts them: a form feed ends no line
    for function in _functions(ast.parse(source)):
        summary = (ast.get_docstring(function) or "").split("\n")[0].strip()
        if not 10 <= len(summary) <= 100 or not summary.isascii():
            continue
        if '"""' in summary or summary.endswith('"') or "\\" in summary:  # would need escapes
            continue
        signature = _signature(function, lines)
        if len(signature) <= 200:
            examples.append(Example(signature, f'    """{summary}"""\n'))
    return tuple(examples)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function below the node, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if not isinstance(child, ast.expr):  # expressions contain most of the nodes, but no functions
            yield from _functions(child)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """From `def` to the colon as in the source, dedented, without comments, with one newline at the end."""
    docstring = function.body[0]
    source = lines[function.lineno - 1 : docstring.lineno]
    source[-1] = source[-1].encode()[: docstring.col_offset].decode()  # ast counts columns in bytes
    text = textwrap.dedent("\n".join(source)).rstrip() + "\n"
    source = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            source[row - 1] = source[row - 1][:column]
    return "\n".join(line.rstrip() for line in source if line.strip()) + "\n"
