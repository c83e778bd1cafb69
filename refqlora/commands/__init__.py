"""The command line: one file a command, and errors in one line."""

from __future__ import annotations

import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

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
    "info": "say what this machine has: versions, processor, memory, BLAS, GPU",
    "figures": "redraw every figure",
    "pretrain": "train the bundled base anew, from scratch, on the standard library's source",
}

ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError)  # one line says what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, or what the command says (parity: 1), 2 for bad input (one line on stderr),
    130 when interrupted, 141 when nobody reads the output any more (`| head`)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), "")
    program = f"refqlora {name}" if name in COMMANDS else "refqlora"
    try:
        with _output():
            top = parser(name)
            if not argv:
                top.print_help()
                return 0
            top.prog = program  # what is left over of the command's options is an error of the command's
            arguments = top.parse_args(argv)
            return _run(arguments, program)
    except BrokenPipeError:
        return 141  # what a shell says of a program that SIGPIPE ended
    except ERRORS as error:
        from .options import one_line

        _say(f"{program}: {one_line(error) or type(error).__name__}")
        return 2
    except KeyboardInterrupt as saved:  # training says in it what it has saved
        again = shlex.join(["refqlora", *(word for word in argv if word != "--resume"), "--resume"])
        _say(f"\n{program}: interrupted" + (f": {saved}; to go on: {again}" if str(saved) else ""))
        return 130


@contextmanager
def _output() -> Iterator[None]:
    """What a terminal's encoding lacks is shown as ?. What is printed is written out at the end, or the error raised
    that Python would otherwise only mention at its exit."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python tries once more at its exit
                raise OSError(error.errno, error.strerror, stream.name) from None


def _say(message: str) -> None:
    with suppress(OSError):  # nobody listens
        print(message, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace, program: str) -> int:
    """Run the command; its warnings are one line each."""

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"{program}: warning: {message}")

    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download's would fill the log
    import logging

    import numpy as np  # here, as it takes a tenth of a second

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written to
    # What is not finite ends training with an error of its own.
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = warn
        return arguments.run(arguments) or 0


def parser(chosen: str) -> argparse.ArgumentParser:
    """The command line, with the options of the command `chosen`."""
    from .. import __version__
    from .options import Help, Parser

    top = Parser(
        prog="refqlora", description="LoRA and QLoRA in plain NumPy, every gradient by hand.", formatter_class=Help
    )
    top.add_argument("--version", action="version", version=f"refqlora {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    top.epilog = "refqlora COMMAND --help has the command's options."
    for name, text in COMMANDS.items():
        options = commands.add_parser(name, help=text, formatter_class=Help)
        if name == chosen:
            command = import_module(f".{name}", __package__)
            options.description = f"{text[0].upper()}{text[1:]}. {command.MORE}"
            command.add(options)
            options.set_defaults(run=command.run)
    return top
