"""`refqlora quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bnb import TYPES
from ..checkpoint import BUNDLED
from ..quantize import BLOCK_SIZES
from ..quantize_files import quantize_files
from .options import command, console, report


def add(commands: Any) -> None:
    options = command(
        commands,
        "quantize",
        run,
        "write a model's linears in 4 bits, as transformers and bitsandbytes load them",
        "Embeddings, norms and the output head stay as they are; the tokenizer comes along.",
    )
    options.add_argument("--model", type=Path, default=BUNDLED, help="directory of a model (default: the bundled base)")
    options.add_argument("--out", type=Path, required=True, help="directory to write to, new or empty")
    options.add_argument("--type", choices=TYPES, default="nf4", help="the codebook: NormalFloat or 4-bit float")
    options.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=64, help="weights that share a constant"
    )
    options.add_argument("--no-double-quant", action="store_true", help="leave the constants in float32")
    options.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def run(a: argparse.Namespace) -> None:
    facts = quantize_files(
        a.model,
        a.out,
        console(a),
        kind=a.type,
        block_size=a.block_size,
        double_quant=not a.no_double_quant,
    )
    report(a, facts)
