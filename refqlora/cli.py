"""The command line: every command's options, and errors in one line."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from .checkpoint import BUNDLED
from .compare import compare
from .data import load_tokenizer
from .demo import demo
from .finetune import finetune
from .generation import stream
from .model import Model
from .optim import SCHEDULES
from .pretrain import pretrain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    arguments = parser().parse_args(argv)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite ends training with an error of its own
            arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError) as error:
        print(f"refqlora {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last checkpoint" if "resume" in arguments else ""
        print(f"\nrefqlora {arguments.command}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="refqlora", description="LoRA and QLoRA in plain NumPy, every gradient by hand.")
    top.add_argument("--version", action="version", version=f"refqlora {version('refqlora')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_demo, _finetune, _generate, _pretrain):
        add(commands)
    return top


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Gives the defaults, but where there is none or a flag's."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, BUNDLED) else super()._get_help_string(action)


def _command(commands: Any, name: str, run: Any, text: str, more: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. {more}".strip(),
        formatter_class=_Help,
    )
    command.set_defaults(run=run)
    return command


# ---- demo ------------------------------------------------------------------------------------------------------


def _demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        _run_demo,
        "the main job: quantise the bundled base and teach it to write docstrings",
        "The text is the running Python's own standard library; nothing is downloaded.",
    )
    command.add_argument("--compare", action="store_true", help="measure full fine-tuning, LoRA and QLoRA side by side")
    command.add_argument("--out", type=Path, default=Path("refqlora-demo"), help="directory to write to")
    command.add_argument("--steps", type=_count, default=None, help="training steps (600; with --compare 300 a run)")
    _common(command)


def _run_demo(a: argparse.Namespace) -> None:
    if a.compare and a.resume:
        raise ValueError("--compare makes many short runs and cannot resume one")
    if a.compare:
        _report(a, compare(a.out, _console(a), steps=a.steps or 300, seed=a.seed))
    else:
        _report(a, demo(a.out, _console(a), steps=a.steps or 600, seed=a.seed, resume=a.resume))


# ---- finetune --------------------------------------------------------------------------------------------------


def _finetune(commands: Any) -> None:
    command = _command(
        commands,
        "finetune",
        _run_finetune,
        "train an adapter on your own text",
        "DATA is a .jsonl file with a prompt and a completion, or with messages, on each line, the loss on the "
        "completion or the assistant's words only; or a text file, or a directory of them, whose every token counts.",
    )
    command.add_argument("--data", type=Path, required=True, help="a .jsonl file, a text file or a directory of texts")
    command.add_argument("--model", type=Path, default=BUNDLED, help="directory of a Llama (default: the bundled base)")
    command.add_argument("--out", type=Path, default=Path("refqlora-adapter"), help="directory to write to")
    command.add_argument("--no-quantize", action="store_true", help="plain LoRA: leave the base in float32")
    group = command.add_argument_group("adapter")
    group.add_argument("--rank", type=_count, default=16, help="r, the rank of B A")
    group.add_argument("--alpha", type=float, default=32.0, help="the change is scaled by alpha/r")
    group.add_argument("--dropout", type=float, default=0.0, help="rate at which the adapter's input is dropped")
    group.add_argument("--targets", default="all-linear", help="all-linear, or names such as q_proj,v_proj")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    group = command.add_argument_group("training")
    group.add_argument("--steps", type=_count, default=None, help="updates to make, instead of --epochs")
    group.add_argument("--epochs", type=float, default=None, help="passes over the data (default: 3)")
    group.add_argument("--batch-size", type=_count, default=16, help="sequences a step")
    group.add_argument(
        "--micro-batch-size", type=_count, default=None, help="sequences at a time, to save memory (default: all)"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    group.add_argument("--warmup", type=_natural, default=0, help="steps in which the learning rate rises")
    group.add_argument("--weight-decay", type=float, default=0.0, help="decoupled, as in AdamW")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients to this global norm; 0: do not")
    group.add_argument(
        "--max-length", type=_count, default=None, help="tokens in a sequence (default: the model's context)"
    )
    group.add_argument("--held-out", type=float, default=0.05, help="fraction of the data kept for evaluation")
    group.add_argument("--eval-every", type=_natural, default=100, help="steps between evaluations; 0: only at the end")
    group.add_argument("--checkpoint-every", type=_count, default=50, help="steps between checkpoints")
    group.add_argument(
        "--recompute", action="store_true", help="gradient checkpointing: less memory, a third more time"
    )
    _common(command)


def _run_finetune(a: argparse.Namespace) -> None:
    if a.steps is not None and a.epochs is not None:
        raise ValueError("--steps and --epochs exclude each other")
    if a.epochs is not None and not 0 < a.epochs < math.inf:
        raise ValueError(f"--epochs must be a number above 0, not {a.epochs}")
    same = ("batch_size", "micro_batch_size", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm")
    same += ("eval_every", "checkpoint_every", "recompute", "seed")
    targets = a.targets if a.targets == "all-linear" else tuple(a.targets.split(","))
    facts = finetune(
        a.data,
        a.out,
        _console(a),
        base=a.model,
        quantize=not a.no_quantize,
        adapter={"rank": a.rank, "alpha": a.alpha, "dropout": a.dropout, "targets": targets, "rslora": a.rslora},
        training={"steps": a.steps or 1, **{option: getattr(a, option) for option in same}},
        epochs=None if a.steps is not None else (a.epochs or 3.0),
        max_length=a.max_length,
        held_out=a.held_out,
        resume=a.resume,
    )
    _report(a, facts)


# ---- generate --------------------------------------------------------------------------------------------------


def _generate(commands: Any) -> None:
    command = _command(
        commands,
        "generate",
        _run_generate,
        "write what follows a prompt, with an adapter or without",
        "The base is quantised to NF4, as the adapter met it in training, unless --no-quantize is given.",
    )
    command.add_argument("--prompt", required=True, help="the text to go on from (\\n: a line's end); - reads stdin")
    command.add_argument("--adapter", type=Path, default=None, help="directory of a PEFT adapter")
    command.add_argument("--model", type=Path, default=BUNDLED, help="directory of a Llama (default: the bundled base)")
    command.add_argument("--no-quantize", action="store_true", help="leave the base in float32")
    command.add_argument("--max-new-tokens", type=_count, default=100, help="tokens to write at the most")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    command.add_argument("--top-k", type=_natural, default=0, help="sample from this many most probable tokens; 0: all")
    command.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the fewest tokens that reach this probability"
    )
    command.add_argument("--seed", type=_natural, default=0, help="of the sampling")


def _run_generate(a: argparse.Namespace) -> None:
    model = Model.from_pretrained(a.model, quantize=None if a.no_quantize else "nf4")
    tokenizer = load_tokenizer(a.model)
    if a.adapter is not None:
        model.load_adapter(a.adapter)
    prompt = sys.stdin.read() if a.prompt == "-" else a.prompt.replace("\\n", "\n")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # Python's stand-ins for bytes that are no text
        raise ValueError("the prompt is not UTF-8 text")
    eos = model.config.eos_token_id
    options = {"max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p}
    pieces = stream(model, tokenizer, prompt, stop=eos if isinstance(eos, tuple) else (eos,), seed=a.seed, **options)
    print(prompt + next(pieces), end="", flush=True)  # nothing is printed before the options are found to be good
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


# ---- pretrain --------------------------------------------------------------------------------------------------


def _pretrain(commands: Any) -> None:
    command = _command(
        commands,
        "pretrain",
        _run_pretrain,
        "train the bundled base anew, from scratch, on the standard library's source",
        "Takes about an hour on 2 cores.",
    )
    command.add_argument("--out", type=Path, default=Path("refqlora-base"), help="directory to write to")
    command.add_argument("--steps", type=_count, default=6000, help="updates to make")
    command.add_argument("--batch-size", type=_count, default=8, help="blocks of 256 tokens a step")
    command.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    _common(command)


def _run_pretrain(a: argparse.Namespace) -> None:
    facts = pretrain(a.out, steps=a.steps, batch_size=a.batch_size, lr=a.lr, seed=a.seed, resume=a.resume)
    _console(a).print(
        f"held-out loss {facts['held_out_loss']:.4f}, {facts['held_out_bits_per_byte']:.4f} bits a byte, in {a.out}/",
        highlight=False,
        markup=False,
    )
    _report(a, facts)


# ---- what they share -------------------------------------------------------------------------------------------


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=_natural, default=0, help="of everything random")
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


_natural, _count = _at_least(0), _at_least(1)


def _console(a: argparse.Namespace) -> Console:
    return Console(quiet=a.json, width=None if sys.stdout.isatty() else 120, soft_wrap=True)


def _report(a: argparse.Namespace, facts: dict[str, Any]) -> None:
    if a.json:
        print(json.dumps(facts, indent=2))
