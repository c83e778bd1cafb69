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

# Each is a file here: `add` gives a parser the command's options, `run` does the job. Only the chosen one is imported,
# so that --help answers at once.
COMMANDS = {
    "demo": "the main job: quantise the bundled base and teach it to write docstrings",
    "compare": "compare full fine-tuning, LoRA and QLoRA on the same task",
    "finetune": "train an adapter on your own text",
    "generate": "continue a prompt, or hold a conversation, with or without an adapter",
    "merge": "merge an adapter into its base, and measure the error of merging",
    "quantize": "quantise a model's linears to 4 bits, in files that transformers and bitsandbytes load",
    "inspect": "show what is in a file or directory: tensors, quantisation, adapter, training",
    "parity": "compare this package, or your own kernel, with the real libraries",
    "info": "show what matters on this machine: versions, processor, memory, BLAS, GPU",
    "figures": "redraw every figure",
    "pretrain": "train the bundled base from scratch, on the standard library's source",
}

ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError)  # shown in one line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0; 1 if parity finds a difference; 2 for bad input (one line on stderr); 130
    when interrupted; 141 when nobody reads the output any more (`| head`)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), "")
    program = f"refqlora {name}" if name in COMMANDS else "refqlora"
    try:
        with _output():
            top = parser(name)
            if not argv:
                top.print_help()
                return 0
            top.prog = program  # named in the error for unknown options
            arguments = top.parse_args(argv)
            return _run(arguments, program)
    except BrokenPipeError:
        return 141  # as a shell reports a program that SIGPIPE ended
    except ERRORS as error:
        from .options import one_line

        _say(f"{program}: {one_line(error) or type(error).__name__}")
        return 2
    except KeyboardInterrupt as saved:  # its message says what training has saved
        again = shlex.join(["refqlora", *(word for word in argv if word != "--resume"), "--resume"])
        _say(f"\n{program}: interrupted" + (f": {saved}; to continue: {again}" if str(saved) else ""))
        return 130


@contextmanager
def _output() -> Iterator[None]:
    """Print ? for characters that the terminal's encoding lacks. Flush at the end, so that an error in writing is
    raised here; Python would only mention it at its exit."""
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
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes again at its exit
                raise OSError(error.errno, error.strerror, stream.name) from None


def _say(message: str) -> None:
    with suppress(OSError):  # nobody listens
        print(message, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace, program: str) -> int:
    """Run the command, with each warning on one line."""

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"{program}: warning: {message}")

    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would fill the log
    import logging

    import numpy as np  # here, as it takes a tenth of a second

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if it cannot write to the home directory
    # Training raises its own errors for numbers that are not finite.
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
    top.epilog = "refqlora COMMAND --help lists the command's options."
    for name, text in COMMANDS.items():
        options = commands.add_parser(name, help=text, formatter_class=Help)
        if name == chosen:
            command = import_module(f".{name}", __package__)
            options.description = f"{text[0].upper()}{text[1:]}. {command.MORE}"
            command.add(options)
            options.set_defaults(run=command.run)
    return top
