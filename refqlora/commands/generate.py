"""`refqlora generate`: continue a prompt, or hold a conversation (chat.py)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..adapters import warn_if_untrained
from ..files.reading import read_json
from ..model import Model
from ..text.generation import generation_options, stream
from ..text.sampling import Sampling
from .chat import Chat, converse
from .options import count, model_option, natural, seed_option

QUANTISED = "refqlora generate: note: the model is quantised to NF4; --no-quantize leaves it as it is\n"

MORE = (
    "The base is quantised to NF4, as finetune trains adapters on it; --no-quantize leaves it as it is. --prompt is "
    "continued as it stands. With --chat, each line is a message, written by the tokenizer's chat template, or if it "
    'has none as "user: ..." and "assistant: ...", as in finetune. Sampling follows the model\'s '
    "generation_config.json, or takes the most probable token if there is none; options overrule the file."
)


def add(options: argparse.ArgumentParser) -> None:
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", default=None, help="the text to continue (\\n ends a line); - reads stdin")
    what.add_argument(
        "--chat", action="store_true", help="hold a conversation, at the terminal or piped; /help lists its commands"
    )
    options.add_argument("--system", default=None, help="with --chat: the system message at its beginning")
    options.add_argument(
        "--adapter",
        action="append",
        default=None,
        metavar="[NAME=]DIR",
        help="directory of a PEFT adapter; NAME is by default the directory's. With several adapters, --prompt shows "
        "what each one writes; --chat begins with the last and switches with /adapter NAME",
    )
    model_option(options)
    options.add_argument("--no-quantize", action="store_true", help="leave the base in float32")
    options.add_argument(
        "--max-new-tokens",
        type=count,
        default=None,
        help="tokens to write at most (default: 100; with --chat, as many as the context holds)",
    )
    options.add_argument(
        "--stop",
        action="append",
        default=None,
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    seed_option(options)
    group = options.add_argument_group("sampling, as in transformers and in this order")
    group.add_argument(
        "--repetition-penalty", type=float, default=None, help="above 1: tokens of the text so far are less probable"
    )
    group.add_argument(
        "--temperature", type=float, default=None, help="0: take the most probable token and skip the rest"
    )
    group.add_argument("--top-k", type=natural, default=None, help="keep this many most probable tokens; 0: all")
    group.add_argument("--top-p", type=float, default=None, help="keep the fewest tokens that reach this probability")
    group.add_argument(
        "--min-p", type=float, default=None, help="keep tokens at least X times as probable as the most probable one"
    )


def run(a: argparse.Namespace) -> None:
    if a.system is not None and not a.chat:
        raise ValueError("--system needs --chat")
    adapters = adapter_names(a.adapter or [])
    model = Model.from_pretrained(a.model, quantize=None if a.no_quantize else "nf4", adapters=adapters)
    for adapter, directory in adapters.items():
        warn_if_untrained(model.adapters[adapter], str(directory))
    options = _options(a, model)
    notice = "" if a.no_quantize or _is_quantised(model.directory) else QUANTISED
    if a.chat:
        chat = Chat(model, a.system, options)
        print(notice, end="", file=sys.stderr)
        converse(chat)
        return
    prompt = sys.stdin.read() if a.prompt == "-" else _unescaped(a.prompt)
    active: list[str | None] = [*model.adapters]
    for name in active or [None]:
        model.set_adapter(name)
        pieces = stream(model, prompt, **options)
        first = next(pieces)  # raises for bad options
        print(notice, end="", file=sys.stderr)
        notice = ""
        heading = f"== {name} ==\n" if len(active) > 1 else ""
        print(heading + prompt + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def _is_quantised(directory: Path | None) -> bool:
    return directory is not None and read_json(directory / "config.json").get("quantization_config") is not None


def _options(a: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The options of `stream`: those given, or else the model's own."""
    assert model.directory is not None
    given = {name: getattr(a, name) for name in ("max_new_tokens", *(field.name for field in fields(Sampling)))}
    options = {
        "max_new_tokens": model.config.max_positions if a.chat else 100,
        "stop": model.config.ends,
        **generation_options(model.directory),
        **{option: value for option, value in given.items() if value is not None},
        "stop_strings": [_unescaped(text) for text in a.stop or []],
        "seed": a.seed,
    }
    special = {token.content: i for i, token in model.tokenizer.get_added_tokens_decoder().items()}  # not in any text
    options["stop"] = (*options["stop"], *(special[text] for text in options["stop_strings"] if text in special))
    return options


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def adapter_names(given: list[str]) -> dict[str, Path]:
    """[NAME=]DIR arguments -> {name: directory}. Without NAME it is the directory's, made distinct with -2, -3."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not equals or "/" in name or Path(text).exists():  # a directory's name may contain =
            path = Path(text)
            own = name = path.resolve().name
            n = 1
            while name in adapters or name == "off":
                n += 1
                name = f"{own}-{n}"
        else:
            path = Path(directory)
            if name in adapters or name in ("", "off") or name != name.strip():
                raise ValueError(f"--adapter {text}: {name!r} is not a valid name, or appears twice")
        adapters[name] = path
    return adapters
