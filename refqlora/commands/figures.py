"""`refqlora figures`: the pictures of the README and the notebooks, redrawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..figures import write_figure
from ..figures.gallery import GALLERY, MEASURED, measured, page
from ..files.writing import write_bytes
from .options import console, json_option, out_option, report, show

MORE = (
    "What was measured is drawn from the compare.json that `refqlora compare` writes: the one that comes with the "
    "package, or yours."
)


def add(options: argparse.ArgumentParser) -> None:
    out_option(options, "figures")
    options.add_argument(
        "--measured", type=Path, metavar="FILE", help="compare.json of a run of your own (default: refqlora's)"
    )
    json_option(options)


def run(a: argparse.Namespace) -> None:
    facts = measured(a.measured or MEASURED)
    drawn = {name: draw(facts) for name, (_, draw) in GALLERY.items()}  # all before the first is written
    a.out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_figure(a.out / name, figure)
    write_bytes(a.out / "README.md", page().encode())
    show(console(a), f"wrote {a.out}/: {', '.join(GALLERY)}, README.md")
    report(a, {"out": str(a.out), "files": list(GALLERY)})
