"""What the commands share: a parser whose errors are one line, the types of options, the console, the report."""

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
    """What an error says, whatever the names in it hold: a file's name first."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}…", " ".join(str(error).split()))
    return text if len(text) <= longest else f"{text[:longest]}…"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each default that the option's help does not, but neither None nor a flag's; calls a number N or X; and
    leaves an epilog of several lines as it is."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = {natural: "N", count: "N", float: "X"}.get(action.type)
        return name or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "(default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def model(command: argparse.ArgumentParser) -> None:
    from ..files.hub import BUNDLED

    command.add_argument(
        "--model",
        default=BUNDLED,
        metavar="DIR|ID",
        help="a model's directory, or its id on the Hugging Face hub: org/name or org/name@revision (default: the "
        "bundled base)",
    )


def out_option(command: argparse.ArgumentParser, default: str) -> None:
    from pathlib import Path

    command.add_argument("--out", type=Path, metavar="DIR", default=Path(default), help="directory to write to")


def seed_option(command: argparse.ArgumentParser, of: str = "everything random") -> None:
    command.add_argument("--seed", type=natural, default=0, help=f"of {of}")


def json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def common(command: argparse.ArgumentParser) -> None:
    seed_option(command)
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output directory")
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
    """Where a command tells what it does. In a pipe no line is broken, however long."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process, with exit code 1
            raise BrokenPipeError from None

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Output(quiet=a.json, width=None if on_terminal else 10_000, soft_wrap=not on_terminal)


def show(console: Console, shown: Table | Text) -> None:
    """Print a table or a text. On a console too narrow for the table each row is a paragraph, a line a column: no
    number is cut."""
    from rich.table import Table

    if not isinstance(shown, Table) or _width(shown) <= console.width:
        console.print(shown, highlight=False)
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
    console.print("\n".join(lines), highlight=False, markup=False)


def _width(table: Table) -> int:
    """What a table needs; a column that folds can do with 16."""
    width = 1
    for column in table.columns:
        longest = max(len(str(cell)) for cell in (column.header, *column.cells))
        width += 3 + (min(longest, 16) if column.overflow == "fold" else longest)
    return width


def report(a: argparse.Namespace, facts: dict[str, Any]) -> None:
    if a.json:
        print(json.dumps(facts, indent=2))
