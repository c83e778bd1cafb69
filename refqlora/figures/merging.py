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
    figure, (left, right) = canvas(9.5, 4, columns=2, sharey=True)
    errors, losses = ([rows[way][what] for way in ways] for what in ("error", "loss"))
    left.barh(y, errors, 0.6, color=colors)
    left.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    right.hlines(y, losses[0], losses, color=colors, linewidth=3)
    right.scatter(losses, y, s=70, color=colors, zorder=3)
    right.axvline(losses[0], color=INK, linewidth=0.8, linestyle=":")
    for axes, values, form in ((left, errors, "{:#.2g}"), (right, losses, "{:.3f}")):
        for i, value in enumerate(values):
            axes.annotate(form.format(value), (value, i), (9, 0), textcoords="offset points", va="center")
        axes.margins(x=0.2)
    left.set(xlabel="distance, in adapter's changes", yticks=y, yticklabels=[NAMES[way] for way in ways])
    left.set_title("Distance from what was trained")
    left.set_xlim(0)
    left.invert_yaxis()
    right.set_xlabel("nats a token")
    right.set_title("Held-out loss")
    right.tick_params(left=False)
    return figure
