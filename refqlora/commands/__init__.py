"""The command line: one file a command, and errors in one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from .options import Help, Parser

# Each is a file here. Its `add` gives a parser the command's options, and its `run` does the job. Only the one that is
# asked for is imported, so that --help answers at once.
COMMANDS = {
    "demo": "the main job: quantise the bundled base and teach it to write docstrings",
    "compare": "measure full fine-tuning, LoRA and QLoRA side by side, on the same task",
    "finetune": "train an adapter on your own text",
    "generate": "write what follows a prompt, or hold a conversation, with an adapter or without",
    "merge": "merge an adapter into its base, and say how far the result is from what was trained",
    "quantize": "write a model's linears in 4 bits, as transformers and bitsandbytes load them",
    "inspect": "say what is in a file or directory: tensors, quantisation, adapter, training",
    "parity": "hold this package, or your own kernel, against the real libraries",
    "pretrain": "train the bundled base anew, from scratch, on the standard library's source",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, or what the command says (parity: 1), 2 for bad input (one line on stderr),
    130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser(next((word for word in argv if not word.startswith("-")), "")).parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download's would fill the log

    def warn(message: Warning | str, *_: Any) -> None:
        print(f"refqlora {arguments.command}: warning: {message}", file=sys.stderr)

    try:
        import numpy as np  # here, as it takes a tenth of a second

        # What is not finite ends training with an error of its own.
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = warn
            return arguments.run(arguments) or 0
    except (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split()) or type(error).__name__  # a tensor's name may have a line's end in it
        print(f"refqlora {arguments.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as saved:  # training says in it what it has saved
        again = shlex.join(["refqlora", *(word for word in argv if word != "--resume"), "--resume"])
        hint = f": {saved}; to go on: {again}" if str(saved) else ""
        print(f"\nrefqlora {arguments.command}: interrupted{hint}", file=sys.stderr)
        return 130


def parser(chosen: str) -> argparse.ArgumentParser:
    """The command line, with the options of the command `chosen`."""
    top = Parser(prog="refqlora", description="LoRA and QLoRA in plain NumPy, every gradient by hand.")
    top.add_argument("--version", action="version", version=f"refqlora {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        options = commands.add_parser(name, help=text, formatter_class=Help)
        if name == chosen:
            command = import_module(f".{name}", __package__)
            options.description = f"{text[0].upper()}{text[1:]}. {command.MORE}"
            command.add(options)
            options.set_defaults(run=command.run)
    return top
