"""The error against the bits of a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("o", "s", "^", "D")


@styled
def error_bits_figure(normal: Mapping[str, Mapping[int, float]], real: Mapping[str, Mapping[int, float]]) -> Figure:
    """The relative error of each family of codebooks: lines for normal weights, open marks for real ones.

    normal, real: those of `error_by_bits`.
    """
    figure, axes = canvas(7, 4.6)
    for family, color, mark in zip(normal, SERIES, MARKS, strict=False):
        axes.plot(*zip(*normal[family].items(), strict=True), f"-{mark}", color=color, label=family, markersize=4)
        axes.plot(*zip(*real[family].items(), strict=True), mark, color=color, markersize=10, fillstyle="none")
    axes.plot([], [], "o", color="0.4", markersize=10, fillstyle="none", label="the same, real weights")
    axes.set(yscale="log", xlabel="bits a code", ylabel="error / weights (root mean squares)")
    axes.set_xticks(sorted({bits for errors in normal.values() for bits in errors}))
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.grid()
    axes.set_title("NormalFloat is ahead at 4 bits, and behind from 6 on")
    axes.legend()
    return figure
