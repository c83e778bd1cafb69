"""The command line: one file a command, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from . import demo, finetune, generate, inspect, merge, parity, pretrain, quantize
from .options import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, or what the command says (parity: 1), 2 for bad input (one line on stderr),
    130 when interrupted."""
    arguments = parser().parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download's would fill the log

    def warn(message: Warning | str, *_: Any) -> None:
        print(f"refqlora {arguments.command}: warning: {message}", file=sys.stderr)

    try:
        # What is not finite ends training with an error of its own.
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = warn
            return arguments.run(arguments) or 0
    except (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split()) or type(error).__name__  # a tensor's name may have a line's end in it
        print(f"refqlora {arguments.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last checkpoint" if "resume" in arguments else ""
        print(f"\nrefqlora {arguments.command}: interrupted{hint}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="refqlora", description="LoRA and QLoRA in plain NumPy, every gradient by hand.")
    top.add_argument("--version", action="version", version=f"refqlora {version('refqlora')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, finetune, generate, merge, quantize, inspect, parity, pretrain):
        module.add(commands)
    return top
