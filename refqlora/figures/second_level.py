"""What the second level does to the constants, and what it costs in error for the bits that it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..codebooks import DYNAMIC, nearest
from . import INK, PALE, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSTANTS = SERIES[2]


@styled
def constants_figure(scaled: Mapping[str, np.ndarray], codebook: np.ndarray = DYNAMIC) -> Figure:
    """A histogram of constants, from -1 to 1, above the values of the map that holds them; those that are used are in
    colour.

    scaled: {title: constants, float32 (blocks,), divided by the largest of them}, one panel for each.
    """
    figure, panels = canvas(7, 2.4 * len(scaled) + 0.4, rows=len(scaled), sharex=True, squeeze=False)
    for axes, (title, constants) in zip(panels[:, 0], scaled.items(), strict=True):
        counts, *_ = axes.hist(constants, bins=np.linspace(-1, 1, 81), color=CONSTANTS)
        most = counts.max()
        used = codebook[np.unique(nearest(constants, codebook))]
        axes.vlines(codebook, -0.3 * most, -0.05 * most, color=PALE, linewidth=1)
        axes.vlines(used, -0.3 * most, -0.05 * most, color=INK, linewidth=1)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlim=(-1.02, 1.02), yticks=[], title=f"{title}: {len(used)} of {len(codebook)} codes in use")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
    panels[-1, 0].set_xlabel("constant / the largest; below, the map's values")
    return figure


@styled
def trade_figure(curves: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Error against bits a parameter, one line for each way to hold the constants, one point for each block size.

    curves: {name: [(block size, bits a parameter, relative error)]}. Blocks of 64 have a ring, and the first line's
    points their block sizes.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = canvas(7, 4.6)
    for (name, points), color in zip(curves.items(), SERIES, strict=False):
        sizes, bits, errors = zip(*points, strict=True)
        axes.plot(bits, errors, "o-", color=color, label=name)
        at = sizes.index(64)
        axes.plot(bits[at], errors[at], "o", color=color, markersize=11, markerfacecolor="none", markeredgewidth=2)
    for size, bit, error in next(iter(curves.values())):
        axes.annotate(f"{size:,}", (bit, error), (7, 5), textcoords="offset points")
    axes.set(xlabel="bits a parameter", ylabel="relative error of the weights")
    axes.set_title("What constants buy (numbers: block sizes)")
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.grid()
    axes.legend()
    return figure
