"""The Jinja that chat templates are written in: a sandbox with transformers' functions and generation blocks.

A template is a program by whoever made the model. The sandbox keeps it away from the interpreter and bounds its time
and memory: every loop, call, filter, operator and piece of output passes through `check`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

START, END = "\0generation\1", "\0endgeneration\1"
MAX_SOURCE = 100_000  # characters of a template: the longest of well-known models have some 30,000
MAX_SIZE = 10_000_000  # characters of any value (a list's element counts as ten), and of all output
MAX_BITS = 10_000  # of a whole number
SECONDS = 10.0  # for rendering

# Filters and methods of text whose result may be as large as the product of the sizes of their arguments.
_MULTIPLY = {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "tojson"}
_MULTIPLY |= {"translate", "wordwrap", "zfill"}


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: the text in between, marked with START and END if `marking` is on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return START + caller() + END if getattr(self.environment, "marking", False) else caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """The functions that transformers gives a template (utils/chat_template_utils.py), and no others.

    marking: write START and END around the text in {% generation %} blocks. Raises jinja2.TemplateError if a template
    takes too long or makes too large a value.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.marking = False
        self.begin()
        self.filters["tojson"] = _tojson
        for name in ("pprint", "urlize"):  # slow on large values, and of no use in a chat
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def begin(self) -> None:
        """Reset the clock and the count of characters written."""
        self._deadline, self._written = time.monotonic() + SECONDS, 0

    def compiled(self, source: str) -> jinja2.Template:
        """The template, with every loop, literal and piece of output checked by the sandbox."""
        if len(source) > MAX_SOURCE:
            raise jinja2.TemplateError(f"expected at most {MAX_SOURCE:,} characters, got {len(source):,}")
        self.begin()
        return self.from_string(_Asking().visit(self.parse(source)))

    def check(self, value: Any) -> Any:
        """Return `value`; raise if it is too large or the time is up."""
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateError(f"it takes more than {SECONDS:.0f} seconds")
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise jinja2.TemplateError(f"it computes a number of more than {MAX_BITS:,} bits")
        elif _size(value) > MAX_SIZE:
            self._too_large()
        return value

    def steps(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self.check(None)
            yield item

    def write(self, value: Any) -> str:
        text = self.check(value if isinstance(value, str) else str(value))
        self._written += len(text)
        if self._written > MAX_SIZE:
            self._too_large()
        return text

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, LoopContext):  # a recursive loop
            args = tuple(map(self.steps, args))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._predict(function.__name__, owner, *args, *kwargs.values())
        return self.check(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise jinja2.TemplateError(f"it computes a number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(b, int) and _size(a) * b > MAX_SIZE:
                    self._too_large()
        elif operator == "%" and isinstance(left, str):
            self._predict("%", left)
        return self.check(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format and str.format_map, which Jinja's sandbox replaces by its own functions."""
        function = super().wrap_str_format(value)
        return None if function is None else self._bounded("str.format", function, value.__self__)

    def _bounded(self, name: str, function: Callable[..., Any], *owner: Any) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja passes it the environment or context first

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._predict(name, *owner, *args[skip:], *kwargs.values())
            return self.check(function(*args, **kwargs))

        return bounded

    def _predict(self, name: str, *args: Any) -> None:
        """Raise before a result is computed that would be too large."""
        if name in _MULTIPLY:
            sizes = [abs(x) if isinstance(x, int) else _size(x) for x in args]
            too_large = math.prod(max(1, size) for size in sizes) > 10 * MAX_SIZE
        elif name == "round":  # it computes 10 to the power of its argument
            too_large = any(isinstance(x, int) and abs(x) > 1000 for x in args[1:])
        elif name in ("%", "format"):
            too_large = re.search(r"%[^%a-zA-Z]*(\d{5}|\*)", str(args[0])) is not None
        elif name == "str.format":
            fields = args[0].replace("{{", "").replace("}}", "")
            too_large = re.search(r"\{[^{}]*:[^{}]*(\d{5}|\{)", fields) is not None
        else:
            too_large = False
        if too_large:
            self._too_large()

    def _too_large(self) -> NoReturn:
        raise jinja2.TemplateError(f"it makes a text or list of more than {MAX_SIZE:,} characters")


class _Asking(NodeTransformer):
    """Adds calls of the sandbox to a template where Jinja's own code would not call it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _asked("steps", [node.iter], node)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_asked("write", [child], node) for child in node.nodes]
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _asked("check", [node], node)

    visit_Dict = visit_Concat = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.generic_visit(node) if node.ctx == "store" else self.visit_List(node)


def _asked(method: str, args: list[Any], node: nodes.Node) -> nodes.Expr:
    function = nodes.EnvironmentAttribute(method, lineno=node.lineno)
    return nodes.Call(function, args, [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """The characters in a value and its elements, plus ten for each element; stops above MAX_SIZE."""
    size, rest = 0, [value]
    while rest and size <= MAX_SIZE:
        x = rest.pop()
        if isinstance(x, str | bytes | range):
            size += len(x)
        elif isinstance(x, dict):
            size += 10 * len(x)
            rest += [*x, *x.values()]
        elif isinstance(x, list | tuple | set):
            size += 10 * len(x)
            rest += x
    return size


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps; Jinja's own filter escapes characters for HTML too."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
