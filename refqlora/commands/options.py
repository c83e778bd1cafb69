"""What the commands share: a parser whose errors are one line, options and their types, the console, tables."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def one_line(error: BaseException | str, longest: int = 1000) -> str:
    """An error's message on one line, its file's name first; long names are cut."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}…", " ".join(str(error).split()))
    return text if len(text) <= longest else f"{text[:longest]}…"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to help texts that do not mention them (except None and a flag's), calls a number N or X, and keeps
    the lines of an epilog."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = {natural: "N", count: "N", float: "X"}.get(action.type)
        return name or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "(default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def model_option(command: argparse.ArgumentParser) -> None:
    from ..files.hub import BUNDLED

    command.add_argument(
        "--model",
        default=BUNDLED,
        metavar="DIR|ID",
        help="a model's directory, or its id on the Hugging Face hub, org/name or org/name@revision (default: the "
        "bundled base)",
    )


def out_option(command: argparse.ArgumentParser, default: str) -> None:
    from pathlib import Path

    command.add_argument("--out", type=Path, metavar="DIR", default=Path(default), help="directory to write to")


def seed_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=natural, default=0, help="seed of all random numbers")


def json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")


def common(command: argparse.ArgumentParser) -> None:
    seed_option(command)
    command.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output directory")
    json_option(command)


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text!r:.80}")
        return value

    return whole_number


natural, count = _at_least(0), _at_least(1)


def console(a: argparse.Namespace) -> Console:
    """The console that a command prints to, as plain text. In a pipe, long lines are not broken."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with code 1
            raise BrokenPipeError from None

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Output(quiet=a.json, width=None if on_terminal else 10_000, soft_wrap=not on_terminal)


def number_table(title: str, first: str, *numbers: str) -> Table:
    """An empty table: a first column of words, and columns of numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def show(console: Console, shown: Table | Text | str) -> None:
    """Print a table or a text as it is, without markup. If the console is too narrow for the table, each row becomes a
    paragraph with a line for each column, so that no number is cut."""
    from rich.table import Table

    if not isinstance(shown, Table) or _width(shown) <= console.width:
        console.print(shown, highlight=False, markup=False)
        return
    lines = [str(shown.title)] if shown.title else []
    headers = [str(column.header) for column in shown.columns]
    for row in zip(*(column.cells for column in shown.columns), strict=True):
        if shown.show_header:
            lines += [f"  {header:{max(map(len, headers))}}  {cell}" for header, cell in zip(headers, row, strict=True)]
            lines.append("")
        else:
            lines.append("  ".join(map(str, row)))
    lines += [str(shown.caption)] if shown.caption else []
    show(console, "\n".join(lines))


def _width(table: Table) -> int:
    """The width that a table needs; a column that folds needs 16 at most."""
    width = 1
    for column in table.columns:
        longest = max(len(str(cell)) for cell in (column.header, *column.cells))
        width += 3 + (min(longest, 16) if column.overflow == "fold" else longest)
    return width


def report(a: argparse.Namespace, facts: dict[str, Any]) -> None:
    if a.json:
        print(json.dumps(facts, indent=2))
