"""What the rank buys, and what it costs: held-out loss against rank and trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import INK, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def rank_figure(methods: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out loss of LoRA and QLoRA against the rank, with the weights trained above; full fine-tuning as a line.

    methods: the rows that `refqlora compare` measures, with "method" ("full", "LoRA" or "QLoRA"), "rank", "trainable"
    and "new_after", the loss on the new task in nats a token.
    """
    from matplotlib.ticker import NullLocator

    figure, axes = canvas(7, 4.6)
    weights: dict[int, int] = {}
    for method, color, marker in (("QLoRA", SERIES[1], "s-"), ("LoRA", SERIES[0], "o-")):
        rows = sorted((row for row in methods if row["method"] == method), key=lambda row: row["rank"])
        weights |= {row["rank"]: row["trainable"] for row in rows}
        axes.plot([row["rank"] for row in rows], [row["new_after"] for row in rows], marker, color=color, label=method)
    (full,) = (row for row in methods if row["method"] == "full")
    label = f"full fine-tuning: {_short(full['trainable'])} weights trained"
    axes.axhline(full["new_after"], color=INK, linestyle="--", lw=1.5, label=label)

    ranks = sorted(weights)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rank r", ylabel="held-out loss, nats a token")
    axes.set_title("A higher rank learns more, up to a point", pad=12)
    above = axes.secondary_xaxis("top")
    above.set_xlabel("weights trained", labelpad=8)
    for axis, labels in ((axes.xaxis, ranks), (above.xaxis, [_short(weights[rank]) for rank in ranks])):
        axis.set_ticks(ranks, labels)
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.legend()
    return figure


def _short(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
