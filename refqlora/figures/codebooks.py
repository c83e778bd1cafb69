"""Codebooks beside one another, and how often the codes of one are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..codebooks import FP4, INT4, NF4, small_float
from . import INK, PALE, SERIES, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def four_bit_codebooks() -> dict[str, np.ndarray]:
    """{name: the 16 values of its codes, float32}."""
    return {
        "NF4": NF4,
        "float E2M1": small_float(2, 1),
        "float of bitsandbytes": FP4,
        "int4": INT4,
        "an even split": np.linspace(-1, 1, 16, dtype=np.float32),
    }


@styled
def codebooks_figure(books: Mapping[str, np.ndarray], weight: float) -> Figure:
    """The values of each codebook in a row, from -1 to 1. The one that takes `weight` is marked, and written out."""
    figure, axes = canvas(7, 0.72 * len(books) + 1.2)
    for row, (name, book) in enumerate(books.items()):
        shown = np.unique(book[abs(book) <= 1])
        taken = shown[abs(shown - weight).argmin()]
        axes.plot([-1, 1], [-row, -row], color=PALE, linewidth=1.5, zorder=0)
        axes.vlines(shown, -row - 0.2, -row + 0.2, color=SERIES[0], linewidth=2)
        axes.vlines([taken], -row - 0.26, -row + 0.26, color=TRAINED, linewidth=3.5)
        label = axes.text(taken, -row + 0.31, f"{taken:.4f}", ha="center", va="bottom", color=TRAINED, weight="bold")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        axes.text(-1.06, -row, f"{name}\n{len(shown)} values", ha="right", va="center", fontsize=12, linespacing=1.1)
    axes.plot([weight, weight], [-len(books) + 0.5, 0.75], ":", color=INK, linewidth=1.2, zorder=0)
    axes.text(weight, 0.78, f"the weight {weight}", ha="center", va="bottom", fontsize=12)
    axes.set_title("What 4 bits can stand for", pad=14)
    axes.set(xlim=(-1.02, 1.02), ylim=(-len(books) + 0.5, 0.85), yticks=[], xticks=[-1, -0.5, 0, 0.5, 1])
    axes.spines["left"].set_visible(False)
    return figure


@styled
def occupation_figure(shares: Mapping[str, np.ndarray]) -> Figure:
    """How often each code is used. shares: {label: (codes,)}, each summing to 1."""
    figure, axes = canvas(7, 3.6)
    codes = len(next(iter(shares.values())))
    width = 0.8 / len(shares)
    for i, ((label, share), color) in enumerate(zip(shares.items(), SERIES, strict=False)):
        axes.bar(np.arange(codes) + (i - (len(shares) - 1) / 2) * width, 100 * share, width, color=color, label=label)
    axes.axhline(100 / codes, color=INK, linestyle="--", linewidth=1.2, label=f"equally often: {100 / codes:.3g} %")
    axes.set(xlabel="code", ylabel="% of the weights", xticks=range(codes))
    axes.set_title(f"How often each of the {codes} codes is used")
    axes.set_ylim(0, 130 * max(share.max() for share in shares.values()))
    axes.legend(loc="upper center", ncols=len(shares) + 1, fontsize=12, columnspacing=1, handlelength=1.2)
    return figure
