"""Every picture in figures/: its file, the line below it, and what draws it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Array
from ..checks import shown
from ..files.hub import BUNDLED
from ..files.reading import read_json
from ..quantization_error import error_by_bits
from .anatomy import anatomy_figure
from .backward import backward_figure
from .bit_budget import bit_budget_figure, budgets
from .blocks import block_errors, blocks_figure
from .codebooks import codebooks_figure, four_bit_codebooks
from .domains import domains_figure
from .error_bits import error_bits_figure
from .forgetting import forgetting_figure
from .merging import merging_figure
from .methods import method_bytes, methods_figure
from .nf4 import nf4_figure, nf4_quantiles
from .path import bundled_block, path_figure
from .rank import rank_figure
from .rounding import order_distances, orders_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]  # those that `refqlora compare` writes
MEASURED = Path(__file__).parents[1] / "assets" / "compare.json"  # the ones drawn unless others are given


@functools.cache
def linears() -> dict[str, Array]:
    """The weights of the bundled base's linear layers, by name."""
    from ..model import Model

    model = Model.from_pretrained(BUNDLED)
    return {name: model.params[name + ".weight"] for name in model.config.linears()}


def bits_figure() -> Figure:
    normal = np.random.default_rng(0).standard_normal(2**18, np.float32)
    return error_bits_figure(
        error_by_bits(normal), error_by_bits(np.concatenate([w.ravel() for w in linears().values()]))
    )


def outlier_figure() -> Figure:
    w = linears()["model.layers.3.mlp.up_proj"]
    return blocks_figure(block_errors(w, 30, [*(2**k for k in range(4, 16)), w.size]), 30)


GALLERY: dict[str, tuple[str, Callable[[Facts], Figure]]] = {
    "methods.svg": (
        "One linear layer in training: full fine-tuning, LoRA and QLoRA, what is frozen and what is trained, in bytes.",
        lambda facts: methods_figure(method_bytes()),
    ),
    "anatomy.svg": (
        "LoRA's anatomy: a frozen W, the trained A and B beside it, every shape, and the sum of both paths.",
        lambda facts: anatomy_figure(),
    ),
    "rank.svg": (
        "The rank against the held-out loss and the number of trained weights: LoRA, QLoRA and full fine-tuning.",
        lambda facts: rank_figure(facts["methods"]),
    ),
    "nf4.svg": (
        "NF4 on the normal curve: 7 areas of equal probability below an exact zero, 8 above it; their edges are the 16 "
        "values.",
        lambda facts: nf4_figure(nf4_quantiles()),
    ),
    "codebooks.svg": (
        "The values that codes of 4 bits can stand for: NF4, two floats, int4, and an even split of [-1, 1]; and which "
        "of them takes the weight 0.2121.",
        lambda facts: codebooks_figure(four_bit_codebooks(), 0.2121),
    ),
    "error_bits.svg": (
        "The error of weights in blocks of 64 against the bits of a code: lines for normal weights, open marks for the "
        "linear layers of the bundled base.",
        lambda facts: bits_figure(),
    ),
    "blocks.svg": (
        "The error of a weight matrix of the bundled base in NF4 against the block size, without an outlier and beside "
        "one of 30 root mean squares.",
        lambda facts: outlier_figure(),
    ),
    "path.svg": (
        "64 weights of the bundled base on their way through NF4, packing and double quantisation, and back.",
        lambda facts: path_figure(bundled_block()),
    ),
    "bit_budget.svg": (
        "Where the 4.127 bits of a double-quantised parameter go, beside 4.5 without, 16 and 32 (a matrix of 4096 x "
        "4096, to scale).",
        lambda facts: bit_budget_figure(budgets()),
    ),
    "backward.svg": (
        "The backward pass of a decoder layer: the shapes, what is kept for it, and which parts get gradients.",
        lambda facts: backward_figure(),
    ),
    "domains.svg": (
        "Two adapters on one quantised base: each is good at its own domain, and the base is itself when both are off.",
        lambda facts: domains_figure(facts["modularity"]),
    ),
    "forgetting.svg": (
        "What each method learns of a new task and forgets of the old one, by rank; an adapter that is off forgets "
        "nothing.",
        lambda facts: forgetting_figure(facts["methods"]),
    ),
    "merging.svg": (
        "An adapter merged in four ways: how far the weights end from those that were trained, and what it costs in "
        "loss.",
        lambda facts: merging_figure(facts["merging"]),
    ),
    "rounding.svg": (
        "The same 4,096 products added in float32 in four orders: how far 500 such sums are from float64.",
        lambda facts: orders_figure(order_distances()),
    ),
}


NUMBERS = ("trainable", "new_before", "new_after", "old_before", "old_after")  # what the pictures show of a method


def measured(path: Path = MEASURED) -> dict[str, Any]:
    """The facts in a compare.json. Raises ValueError or FileNotFoundError that names the file and the field."""
    facts = read_json(path)
    for name, kind in {"methods": list, "merging": dict, "modularity": dict}.items():
        if not isinstance(facts.get(name), kind) or not facts[name]:
            raise ValueError(f"{path}: {name}: expected what `refqlora compare` writes, got {shown(facts.get(name))}")
    for i, row in enumerate(facts["methods"]):
        for name in NUMBERS:
            if not isinstance(row, dict) or not isinstance(row.get(name), int | float):
                got = shown(row.get(name)) if isinstance(row, dict) else shown(row)
                raise ValueError(f"{path}: methods[{i}]: {name}: expected a number, got {got}")
        if row.get("method") not in ("full", "LoRA", "QLoRA") or not isinstance(row.get("rank"), int | None):
            raise ValueError(f"{path}: methods[{i}]: expected a method and its rank, got {shown(row)}")
    for name, width in (("merging", {"loss", "error"}), ("modularity", None)):
        for key, row in facts[name].items():
            good = isinstance(row, dict) and all(isinstance(x, int | float) for x in row.values())
            if not good or (width is not None and set(row) != width):
                raise ValueError(f"{path}: {name}: {key}: expected numbers by name, got {shown(row)}")
    return facts


def page() -> str:
    """figures/README.md: every picture with its line."""
    parts = [
        "# The figures",
        "`refqlora figures` draws them all; each may be used with a word on where it comes from. What was measured was "
        "measured by `refqlora compare`, and is drawn from [compare.json](../refqlora/assets/compare.json) or, with "
        "`--measured`, from a run of your own.",
    ]
    parts += [f"## {Path(name).stem}\n\n![{line}]({name})\n\n{line}" for name, (line, _) in GALLERY.items()]
    return "\n\n".join(parts) + "\n"
