"""`refqlora merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from ..merging import DTYPES, merge_model
from .options import command, console, model, report


def add(commands: Any) -> None:
    options = command(
        commands,
        "merge",
        run,
        "merge an adapter into its base, and say how far the result is from what was trained",
        "By default the adapter is taken to have learnt on the base in NF4, as finetune trains it, and is merged into "
        "that base, dequantised. The errors of the other ways are printed in any case.",
    )
    options.add_argument("--adapter", type=Path, required=True, action="append", help="a PEFT adapter; may be repeated")
    options.add_argument("--out", type=Path, required=True, help="new directory to write the model to")
    model(options)
    options.add_argument("--dtype", choices=DTYPES, default=None, help="of the files (default: the base's)")
    way = options.add_mutually_exclusive_group()
    way.add_argument("--original", action="store_true", help="merge into the weights as they are, not dequantised")
    way.add_argument("--nf4", action="store_true", help="merge and quantise to 4 bits again")
    options.add_argument("--no-quantize", action="store_true", help="the adapter was trained on the dense base")
    options.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def run(a: argparse.Namespace) -> None:
    into = "nf4" if a.nf4 else "original" if a.original else None
    facts = merge_model(a.model, a.adapter, a.out, into=into, trained_on_nf4=not a.no_quantize, dtype=a.dtype)
    table = Table(title="error of merging", title_justify="left")
    ways = {"original": "original weights", "dequantised": "dequantised base", "requantised": "4 bits again"}
    for column in ("linear", "change / weight", *(f"into {way}" for way in ways.values())):
        table.add_column(column, justify="left" if column == "linear" else "right")
    rows = [*facts["kinds"].items(), ("all", facts["all"])]
    for kind, row in rows:
        table.add_section() if kind == "all" else None
        errors = ("-" if row[way] is None else f"{row[way]:.3g}" for way in ways)
        table.add_row(kind, f"{row['change']:.3g}", *errors)
    out, trained = console(a), "the NF4 base" if facts["trained_on_nf4"] else "the dense base"
    out.print(table)
    out.print(
        f"An error is how far the merged weights are from those trained ({trained} with the adapter), as a multiple of "
        "the adapter's own change: at 0.01 a hundredth of it is lost, at 1 they are as far off as the base without it.",
        highlight=False,
    )
    if facts["erased"]:
        error = facts["all"]["requantised"]
        out.print(
            f"Warning: 4 bits again lose {'the' if error > 0.9 else 'much of the'} adapter (error {error:.2g}): its "
            "change is small beside the steps between the codes. Keep it apart, or merge into 16 bits.",
            highlight=False,
        )
    where = {"original": "the original weights", "dequantised": "the dequantised base", "nf4": "4 bits again"}
    out.print(f"wrote {a.out}/: merged into {where[facts['into']]}, {facts['dtype']}", highlight=False, markup=False)
    report(a, facts)
