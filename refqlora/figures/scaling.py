"""What the adapter's scale does as the rank grows: alpha / r beside alpha / sqrt(r)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def scaling_figure(losses: Mapping[str, Mapping[int, Mapping[float, float]]]) -> Figure:
    """The loss after a number of steps against the learning rate, a line for each rank, a panel for each scale.

    losses: {the scale in words: {rank: {learning rate: loss}}}.
    """
    figure, panels = canvas(9, 4, columns=len(losses), sharey=True)
    for axes, (scale, ranks) in zip(panels, losses.items(), strict=True):
        for color, (rank, curve) in zip(SERIES, ranks.items(), strict=False):
            axes.plot(list(curve), list(curve.values()), "o-", color=color, markersize=5, label=f"r = {rank}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="learning rate", title=scale)
        axes.grid(axis="y")
    panels[0].set_ylabel("loss")
    panels[0].legend()
    return figure
