"""The Jinja that chat templates are written in: a sandbox with transformers' functions and its generation blocks.

A template is a program that comes with a model, from whoever made it. The sandbox keeps it from the interpreter, and
bounds its time and memory: every loop, call, filter, operator and piece of output passes through `check`.
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
MAX_SIZE = 10_000_000  # characters of any value, where an element counts as ten, and of all that a template writes
MAX_BITS = 10_000  # of a whole number
SECONDS = 10.0  # that a template may take

# Filters and methods of text whose result may be as large as their arguments multiplied, a number counting as itself.
_MULTIPLY = {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "tojson"}
_MULTIPLY |= {"translate", "wordwrap", "zfill"}


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} around what the assistant says: its text alone, or marked."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return START + caller() + END if getattr(self.environment, "marking", False) else caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers gives a template to work with (utils/chat_template_utils.py), and no more.

    marking: write START and END around what a template puts between {% generation %} and {% endgeneration %}.
    Raises jinja2.TemplateError where a template takes or makes too much.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.marking = False
        self.begin()
        self.filters["tojson"] = _tojson
        for name in ("pprint", "urlize"):  # slow on what is large, and not for models
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def begin(self) -> None:
        """Set the clock and the count of what is written to zero."""
        self._deadline, self._written = time.monotonic() + SECONDS, 0

    def compiled(self, source: str) -> jinja2.Template:
        """The template, in which every loop, literal and piece of output asks the sandbox."""
        if len(source) > MAX_SOURCE:
            raise jinja2.TemplateError(f"expected at most {MAX_SOURCE:,} characters, got {len(source):,}")
        self.begin()
        return self.from_string(_Asking().visit(self.parse(source)))

    def check(self, value: Any) -> Any:
        """`value` itself, unless it is too large or the time is up."""
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
        """str.format and str.format_map, for which Jinja's sandbox has functions of its own."""
        function = super().wrap_str_format(value)
        return None if function is None else self._bounded("str.format", function, value.__self__)

    def _bounded(self, name: str, function: Callable[..., Any], *owner: Any) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # it is given the environment or the context first

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._predict(name, *owner, *args[skip:], *kwargs.values())
            return self.check(function(*args, **kwargs))

        return bounded

    def _predict(self, name: str, *args: Any) -> None:
        """Refuse what would be too large before it is made."""
        if name in _MULTIPLY:
            sizes = [abs(x) if isinstance(x, int) else _size(x) for x in args]
            too_large = math.prod(max(1, size) for size in sizes) > 10 * MAX_SIZE
        elif name == "round":  # by 10 to this power
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
    """Puts calls of the sandbox into a template where Jinja's own code would not ask it."""

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
    """The characters of a value, those within its elements included, until there are too many; an element has ten."""
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
    """Jinja's own escapes what HTML would, this does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
