"""`refqlora figures`: the pictures of the README and the notebooks, redrawn."""

from __future__ import annotations

import argparse

from ..figures.methods import methods_figure
from .options import console, json_option, out_option, report, show

FIGURES = {"methods.png": methods_figure}

MORE = "They need no data."


def add(options: argparse.ArgumentParser) -> None:
    out_option(options, "figures")
    json_option(options)


def run(a: argparse.Namespace) -> None:
    a.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(a.out / name)
    show(console(a), f"wrote {a.out}/: {', '.join(FIGURES)}")
    report(a, {"out": str(a.out), "files": list(FIGURES)})
