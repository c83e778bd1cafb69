"""Source, tables and pictures, as a notebook displays them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..checks import shown
from ..figures import picture as drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shown:
    """Something in the forms that a notebook may ask for: {MIME type: content}, with plain text always among them.

    details: {MIME type: what is to be known about that form}, such as an image's "alt".
    """

    def __init__(self, forms: dict[str, Any], details: dict[str, Any] | None = None) -> None:
        self.forms, self.details = forms, details or {}

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        return self.forms, self.details

    def __repr__(self) -> str:
        return self.forms["text/plain"]


def source(*things: Any, first: str | None = None, last: str | None = None, docstring: bool = True) -> Shown:
    """The code of functions, classes or modules, as it is in the package, so that what is shown is what runs.

    first, last: show only the lines from the first that contains `first` to the next one that contains `last` (all up
    to the end without it). docstring: whether the docstring of a function is shown. Raises ValueError if a line is not
    found, or what is given has no Python source.

        >>> import refqlora.functional
        >>> source(refqlora.functional.silu_backward, first="return")
        # refqlora/functional.py
            return dy * s * (1 + x * (1 - s))
    """
    if not things:
        raise ValueError("source: expected one or more functions, classes or modules, got none")
    parts = [_code(thing, first, last, docstring) for thing in things]
    text = "\n\n\n".join(parts)
    return Shown({"text/markdown": f"```python\n{text}\n```", "text/plain": text})


def _code(thing: Any, first: str | None, last: str | None, docstring: bool) -> str:
    try:
        text = inspect.getsource(thing)
    except (TypeError, OSError):
        raise ValueError(f"source: expected Python code, got {shown(thing)}") from None
    text = text.rstrip() if isinstance(thing, ModuleType) else textwrap.dedent(text).rstrip()
    if not docstring:
        text = _without_docstring(text)
    lines = text.split("\n")
    if first is not None:
        lines = lines[_line(lines, first, thing) :]
    if last is not None:
        lines = lines[: _line(lines, last, thing) + 1]
    module = inspect.getmodule(thing)
    assert module is not None
    name = module.__name__.replace(".", "/") + ("/__init__.py" if hasattr(module, "__path__") else ".py")
    return "\n".join([f"# {name}", *lines])


def _without_docstring(text: str) -> str:
    """The code without its docstrings, those of a class's methods among them."""
    lines: list[str | None] = [*text.split("\n")]
    for node in ast.walk(ast.parse(text)):
        said = node.body[0] if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
        if isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant) and isinstance(said.value.value, str):
            end = said.end_lineno or said.lineno
            end += isinstance(node, ast.ClassDef) and lines[end : end + 1] == [""]  # and the blank line after it
            lines[said.lineno - 1 : end] = [None] * (end - said.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def _line(lines: list[str], part: str, thing: Any) -> int:
    found = next((i for i, line in enumerate(lines) if part in line), None)
    if found is None:
        raise ValueError(f"{getattr(thing, '__name__', thing)}: expected a line with {part!r}")
    return found


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> Shown:
    """A table: text to the left, numbers to the right. Whole numbers have their thousands separated, others are shown
    to four significant digits; give text where a number needs another form.

        >>> table([("NF4", 16, 0.09195)], ("codebook", "values", "error"))
        codebook  values    error
        NF4           16  0.09195
    """
    rows = list(rows)
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"table: row {i}: expected {len(columns)} cells, got {len(row)}")
    grid = [[_cell(value) for value in row] for row in rows]
    number = [bool(rows) and not any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    width = [max(len(row[i]) for row in [list(columns), *grid]) for i in range(len(columns))]

    def plain(row: Sequence[str]) -> str:
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, width, number, strict=True)]
        return "  ".join(cells).rstrip()

    lines = [[cell.replace("|", "\\|") for cell in row] for row in [list(columns), *grid]]
    markdown = ["| " + " | ".join(row) + " |" for row in lines]
    markdown.insert(1, "|" + "|".join("---:" if right else "---" for right in number) + "|")
    return Shown({"text/markdown": "\n".join(markdown), "text/plain": "\n".join(map(plain, [columns, *grid]))})


def _cell(value: Any) -> str:
    if isinstance(value, str) or value is None:
        return value or ""
    try:
        if isinstance(value, int) or (hasattr(value, "dtype") and value.dtype.kind in "iu"):
            return f"{int(value):,}"
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        raise ValueError(f"table: expected text or a number in a cell, got {shown(value)}") from None


def picture(figure: Figure, alt: str) -> Shown:
    """A figure as a PNG, with the text `alt` for those who do not see it."""
    forms = {"image/png": drawn(figure, "png", dpi=100), "text/plain": alt}
    return Shown(forms, {"image/png": {"alt": alt}})  # as IPython.display.Image keeps it
