"""`refqlora figures`: the pictures of the README and the notebooks, redrawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..figures.methods import methods_figure
from .options import console, json_option, report

FIGURES = {"methods.png": methods_figure}

MORE = "They are computed from what they show, and need no data."


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--out", type=Path, default=Path("figures"), help="directory to write to")
    json_option(options)


def run(a: argparse.Namespace) -> None:
    a.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(a.out / name)
    console(a).print(f"wrote {a.out}/: {', '.join(FIGURES)}", highlight=False, markup=False)
    report(a, {"out": str(a.out), "files": list(FIGURES)})
