"""What the commands share: a parser whose errors are one line, the types of options, the console, the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Gives the defaults, but where there is none or a flag's."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, False) or "(default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def model(command: argparse.ArgumentParser) -> None:
    from ..files.hub import BUNDLED

    command.add_argument(
        "--model",
        default=BUNDLED,
        metavar="DIR|ID",
        help="a model's directory, or its id on the Hugging Face hub: org/name or org/name@revision (default: the "
        "bundled base)",
    )


def common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=natural, default=0, help="of everything random")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    command.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, not {text}")
        return value

    return whole_number


natural, count = _at_least(0), _at_least(1)


def console(a: argparse.Namespace) -> Console:
    from rich.console import Console

    return Console(quiet=a.json, width=None if sys.stdout.isatty() else 120, soft_wrap=True)


def report(a: argparse.Namespace, facts: dict[str, Any]) -> None:
    if a.json:
        print(json.dumps(facts, indent=2))
