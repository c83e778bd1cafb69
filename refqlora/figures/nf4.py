"""NF4 on the normal curve, and how far real weights follow that curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr, ndtri

from ..codebooks import normal_float, outermost_probability
from . import INK, PALE, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BELOW, ABOVE = SERIES[0], SERIES[2]  # the two halves
SHADES = {-1: (BELOW, "#7fa3c7"), 1: (ABOVE, "#8fd0b9")}


def nf4_quantiles() -> dict[str, np.ndarray]:
    """NF4's 16 values as quantiles of N(0, 1): `values`, `quantiles` in standard deviations, and the `areas` between
    neighbours under the normal curve, with the two that are left at the ends: (17,)."""
    values = normal_float(4).astype(np.float64)
    quantiles = values * ndtri(outermost_probability(4))
    return {"values": values, "quantiles": quantiles, "areas": np.diff(ndtr(quantiles), prepend=0, append=1)}


def curve(x: np.ndarray) -> np.ndarray:
    """The density of N(0, 1)."""
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@styled
def nf4_figure(parts: Mapping[str, np.ndarray]) -> Figure:
    """The normal curve, cut at NF4's values: equal areas on each side of the exact zero, and the values below.

    parts: those of `nf4_quantiles`.
    """
    values, z, areas = parts["values"], parts["quantiles"], parts["areas"]
    figure, axes = canvas(7, 4.2)
    edges = np.array([-3.2, *z, 3.2])
    for i in range(len(edges) - 1):
        x = np.linspace(edges[i], edges[i + 1], 60)
        side = 1 if x.mean() > 0 else -1
        outside = i in (0, len(edges) - 2)
        axes.fill_between(x, curve(x), color=PALE if outside else SHADES[side][i % 2], linewidth=0)
    x = np.linspace(-3.2, 3.2, 400)
    axes.plot(x, curve(x), color=INK, linewidth=1.5)
    for value, at in zip(values, z, strict=True):
        color = INK if value == 0 else BELOW if value < 0 else ABOVE
        axes.plot([at, at], [-0.055, curve(at)], color=color, linewidth=2.5 if value == 0 else 1.2)
    for i in range(len(z)):
        axes.text(z[i], -0.085 - 0.028 * (i % 2), str(i), ha="center", va="center", fontsize=12)
    axes.text(-3.2, -0.1, "code", va="center", fontsize=12)
    below, above = areas[1:8], areas[8:-1]
    for x0, color, count, area in ((-2.35, BELOW, len(below), below.mean()), (2.35, ABOVE, len(above), above.mean())):
        words = f"{count} equal areas\nof {100 * area:.2f} %"
        axes.text(x0, 0.3, words, ha="center", color=color, weight="bold", fontsize=12)
    for x0 in (-2.75, 2.75):
        axes.text(x0, 0.03, f"{100 * areas[0]:.1f} %", ha="center", fontsize=12)
    axes.set_title("NF4: the 16 values are quantiles of the normal curve", pad=12)
    axes.set(xlim=(-3.3, 3.3), ylim=(-0.13, 0.42), yticks=[], xlabel="value of NF4")
    marks = np.array([-1, -0.5, 0, 0.5, 1])
    axes.set_xticks(marks * z[-1], ["-1", "-0.5", "0", "0.5", "1"])
    axes.spines["left"].set_visible(False)
    axes.text(0, 0.405, "an exact zero", ha="center", va="bottom", fontsize=12)
    return figure


@styled
def weights_figure(groups: Mapping[str, np.ndarray]) -> Figure:
    """Histograms of weights in standard deviations, beside the normal curve: as they are, and on a logarithmic scale.

    groups: {label: weights}, already divided by what serves as their standard deviation.
    """
    figure, panels = canvas(8, 3.6, columns=2)
    edges = np.linspace(-8, 8, 161)
    middle = (edges[:-1] + edges[1:]) / 2
    for axes, scale in zip(panels, ("linear", "log"), strict=True):
        axes.plot(middle, curve(middle), "--", color=INK, linewidth=1.5, label="N(0, 1)")
        for (label, x), color in zip(groups.items(), SERIES, strict=False):
            density = np.histogram(x, edges)[0] / (x.size * np.diff(edges))
            shown = np.where(density > 0, density, np.nan) if scale == "log" else density
            axes.plot(middle, shown, color=color, label=label, linewidth=1.6)
        axes.set(yscale=scale, xlabel="standard deviations")
    panels[0].set(xlim=(-4, 4), ylabel="density")
    panels[1].set(xlim=(-8, 8), ylim=(1e-7, 1))
    panels[0].set_title("The bell")
    panels[1].set_title("Its tails, enlarged")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
