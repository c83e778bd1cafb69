"""What merging an adapter costs: distance from the trained weights, and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import FROZEN, INK, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {  # of compare's WAYS, in the order drawn
    "adapter": "kept separate",
    "dequantised": "into Q(W), float32",
    "bfloat16": "into Q(W), bfloat16",
    "original": "into W",
    "nf4": "into 4 bits again",
    "none": "the base alone",
}


@styled
def merging_figure(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Each way of merging: the distance from the weights that were trained, and the held-out loss.

    rows: {way: {"error": the distance, in units of the adapter's change, "loss"}}, as compare's "merging".
    """
    ways = [way for way in NAMES if way in rows]
    y = range(len(ways))
    colors = [FROZEN if way == "none" else INK if way == "adapter" else TRAINED for way in ways]
    figure, (upper, lower) = canvas(7, 6, rows=2, sharey=True)
    errors, losses = ([rows[way][what] for way in ways] for what in ("error", "loss"))
    upper.barh(y, errors, 0.6, color=colors)
    upper.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    lower.hlines(y, losses[0], losses, color=colors, linewidth=3)
    lower.scatter(losses, y, s=70, color=colors, zorder=3)
    lower.axvline(losses[0], color=INK, linewidth=0.8, linestyle=":")
    for axes, values, form in ((upper, errors, "{:#.2g}"), (lower, losses, "{:.3f}")):
        for i, value in enumerate(values):
            axes.annotate(form.format(value), (value, i), (9, 0), textcoords="offset points", va="center")
        axes.margins(x=0.2)
    upper.set(xlabel="distance, in adapter's changes", yticks=y, yticklabels=[NAMES[way] for way in ways])
    upper.set_title("Distance from what was trained")
    upper.set_xlim(0)
    upper.invert_yaxis()
    lower.set_xlabel("nats a token")
    lower.set_title("Held-out loss")
    return figure
