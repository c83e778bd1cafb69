"""A change of known rank, learnt by adapters of several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import INK, PALE, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def low_rank_figure(
    losses: Mapping[int, float], best: Mapping[int, float], learnt: Sequence[float], true: Sequence[float], rank: int
) -> Figure:
    """On the left the loss against the rank, on the right what the adapter of rank `rank` has learnt of the change.

    losses: {rank: loss of the trained adapter}. best: {rank: the least loss that any matrix of that rank can have}.
    learnt, true: the singular values of s B A and of the change to be learnt, falling.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure, (left, right) = canvas(9, 4.2, columns=2)
    left.plot(list(best), list(best.values()), color=INK, lw=1.5, label="best possible")
    left.plot(list(losses), list(losses.values()), "o", color=TRAINED, markersize=7, label="LoRA, trained")
    left.plot([rank], [losses[rank]], "o", markersize=15, fillstyle="none", color=TRAINED, mew=2)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.xaxis.set_ticks(list(losses), [str(r) for r in losses])
    left.xaxis.set_minor_locator(NullLocator())
    left.set(xlabel="rank r", ylabel="loss", title="Loss against the rank")
    left.grid(axis="y")
    left.legend()

    shown = len(true) + 4
    right.bar(range(1, len(true) + 1), true, color=PALE, edgecolor=INK, label="the true change")
    values = [value for value in learnt if value > 1e-3 * true[0]][:shown]
    right.plot(range(1, len(values) + 1), values, "o", color=TRAINED, markersize=7, label=f"s B A, r = {rank}")
    right.set(xlim=(0.3, shown + 0.7), xlabel="number, largest first", title="Singular values")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend()
    return figure
