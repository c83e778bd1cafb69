"""`refqlora inspect`: its options; inspection.py finds the facts, inspection_tables.py shows them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from .inspection import inspect
from .inspection_tables import LONGEST, tables
from .options import console, json_option, report, show

MORE = (
    "PATH is a .safetensors file, the directory of a model, an adapter or a run, or a model's id on the Hugging Face "
    "hub. For a dense model it shows what NF4 would cost each linear, for an adapter how large its change is."
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("path", metavar="PATH", type=Path, help="a .safetensors file, a directory, or org/name")
    options.add_argument("--no-error", action="store_true", help="read headers only, without errors of NF4 and norms")
    json_option(options)


def run(a: argparse.Namespace) -> None:
    def progress(items: list[Any], title: str) -> Iterable[Any]:
        bar = Console(stderr=True)
        return track(items, title, console=bar, transient=True) if bar.is_terminal and not a.json else items

    facts = inspect(a.path, error=not a.no_error, progress=progress)
    if not a.json:
        out = console(a)
        for table in tables(facts, LONGEST if out.is_terminal else None):
            show(out, table)
    report(a, facts)
