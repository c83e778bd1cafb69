"""`refqlora generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data import load_tokenizer
from ..generation import stream
from ..hub import model_directory
from ..model import Model
from .options import command, count, natural
from .options import model as model_option


def add(commands: Any) -> None:
    options = command(
        commands,
        "generate",
        run,
        "write what follows a prompt, with an adapter or without",
        "The base is quantised to NF4, as the adapter met it in training, unless --no-quantize is given.",
    )
    options.add_argument("--prompt", required=True, help="the text to go on from (\\n: a line's end); - reads stdin")
    options.add_argument("--adapter", type=Path, default=None, help="directory of a PEFT adapter")
    model_option(options)
    options.add_argument("--no-quantize", action="store_true", help="leave the base in float32")
    options.add_argument("--max-new-tokens", type=count, default=100, help="tokens to write at the most")
    options.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    options.add_argument("--top-k", type=natural, default=0, help="sample from this many most probable tokens; 0: all")
    options.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the fewest tokens that reach this probability"
    )
    options.add_argument("--seed", type=natural, default=0, help="of the sampling")


def run(a: argparse.Namespace) -> None:
    directory = model_directory(a.model)
    model = Model.from_pretrained(directory, quantize=None if a.no_quantize else "nf4")
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
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
