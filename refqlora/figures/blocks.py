"""Blocks: the error against their size, and what an outlier does to the rest of its block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..backend import Array
from ..codebooks import NF4
from ..quantization_error import Error, error_between, error_by_block_size, outlier_damage, rounded
from . import FROZEN, INK, PALE, SERIES, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES = 16  # an outlier is planted at so many places, one at a time


def block_errors(w: Array, outlier: float, sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """The relative error of w in NF4 against the block size: `plain`, as it is; and with one outlier, of `outlier`
    times the root mean square of w, the error of all `other` weights, and of those in its `own` block."""
    own, other = {}, {}
    for size in sizes:
        damage = [outlier_damage(w, outlier, size, at=at) for at in range(0, w.size, -(-w.size // PLACES))]
        own[size] = sum((block for block, _ in damage), Error()).relative
        other[size] = sum((tensor for _, tensor in damage), Error()).relative
    return {"plain": error_by_block_size(w, sizes), "other": other, "own": own}


@styled
def blocks_figure(errors: Mapping[str, Mapping[int, float]], outlier: float) -> Figure:
    """The error against the block size, without an outlier and with one. errors: those of `block_errors`."""
    figure, axes = canvas(7, 4.4)
    labels = {
        "own": f"with one outlier of {outlier:g}: its own block",
        "other": f"with one outlier of {outlier:g}: the whole matrix",
        "plain": "without an outlier",
    }
    for (name, label), color, mark in zip(labels.items(), (TRAINED, SERIES[3], SERIES[0]), "s^o", strict=True):
        axes.plot(*zip(*errors[name].items(), strict=True), f"-{mark}", color=color, label=label, markersize=6)
    sizes = list(errors["plain"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[::2], [f"{size:,}" if size < 2**10 else f"{size // 2**10:,}k" for size in sizes[::2]])
    axes.minorticks_off()
    axes.set_yscale("log")
    ticks = [0.08, 0.1, 0.2, 0.5, 1]
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.axvline(64, 0.0, 0.16, color=INK, linestyle=":", linewidth=1.5)
    axes.text(70, 0.076, "QLoRA's 64")
    axes.set_ylim(0.07, 1)
    axes.set(xlabel="weights in a block", ylabel="error of the other weights")
    axes.grid(axis="y")
    axes.set_title("An outlier spoils its own block, and no other")
    axes.legend()
    return figure


@styled
def one_block_figure(block: np.ndarray, codebook: np.ndarray = NF4) -> Figure:
    """A block of weights, in units of their root mean square, the first of which may be an outlier: the values that its
    codes can stand for as lines, each weight as a dot, and what it is rounded to as a ring."""
    most = 4.2  # what is beyond is named, not drawn
    back = rounded(block, codebook, block.size)
    error = error_between(block[1:], back[1:]).relative
    figure, axes = canvas(7, 3.8)
    axes.hlines(codebook * abs(block).max(), -1, block.size, color=PALE, linewidth=1.5, zorder=0)
    axes.vlines(range(block.size), block, back, color=FROZEN, linewidth=1)
    axes.plot(block, ".", color=SERIES[0], label="weight")
    axes.plot(back, "o", color=TRAINED, fillstyle="none", markersize=6, markeredgewidth=1.2, label="as its code has it")
    axes.set(xlabel="place in the block", ylabel="weight", xlim=(-1, block.size), ylim=(-most, most))
    if abs(block[0]) > most:
        side, arrow = np.sign(block[0]), {"arrowstyle": "->", "color": INK}
        axes.annotate(f"the outlier, {block[0]:.3g}", (0, most * side), (2, 3.1 * side), arrowprops=arrow)
    axes.set_title(f"Largest weight {abs(block).max():.3g}: the others' error is {100 * error:.1f} %", pad=26)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    return figure
