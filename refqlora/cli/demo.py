"""`refqlora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..compare import compare
from ..demo import demo
from .options import command, common, console, count, report


def add(commands: Any) -> None:
    options = command(
        commands,
        "demo",
        run,
        "the main job: quantise the bundled base and teach it to write docstrings",
        "The text is the running Python's own standard library; nothing is downloaded.",
    )
    options.add_argument("--compare", action="store_true", help="measure full fine-tuning, LoRA and QLoRA side by side")
    options.add_argument("--out", type=Path, default=Path("refqlora-demo"), help="directory to write to")
    options.add_argument("--steps", type=count, default=300, help="training steps; with --compare, of each run")
    common(options)


def run(a: argparse.Namespace) -> None:
    if a.compare and a.resume:
        raise ValueError("--compare makes many short runs and cannot resume one")
    if a.compare:
        report(a, compare(a.out, console(a), steps=a.steps, seed=a.seed))
    else:
        report(a, demo(a.out, console(a), steps=a.steps, seed=a.seed, resume=a.resume))
