"""`refqlora pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..pretrain import pretrain
from .options import command, common, console, count, report


def add(commands: Any) -> None:
    options = command(
        commands,
        "pretrain",
        run,
        "train the bundled base anew, from scratch, on the standard library's source",
        "Takes about an hour on 2 cores.",
    )
    options.add_argument("--out", type=Path, default=Path("refqlora-base"), help="directory to write to")
    options.add_argument("--steps", type=count, default=6000, help="updates to make")
    options.add_argument("--batch-size", type=count, default=8, help="blocks of 256 tokens a step")
    options.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    common(options)


def run(a: argparse.Namespace) -> None:
    facts = pretrain(a.out, steps=a.steps, batch_size=a.batch_size, lr=a.lr, seed=a.seed, resume=a.resume)
    console(a).print(
        f"held-out loss {facts['held_out_loss']:.4f}, {facts['held_out_bits_per_byte']:.4f} bits a byte, in {a.out}/",
        highlight=False,
        markup=False,
    )
    report(a, facts)
