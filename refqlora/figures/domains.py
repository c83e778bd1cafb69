"""Adapters on one base, each on every domain: what a swap gains and loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import FROZEN, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"none": "adapters off\n(the base)"}  # of rows


@styled
def domains_figure(losses: Mapping[str, Mapping[str, float]]) -> Figure:
    """A row for the base and for each adapter, a column for each domain: the held-out loss, and its change from the
    base's. Orange is better than the base, blue-grey worse, and the deeper the more in this column.

    losses: {adapter, or "none" for the base: {domain: loss}}, as compare's "modularity".
    """
    from matplotlib.colors import LinearSegmentedColormap

    domains = list(losses["none"])
    adapters = ["none", *(name for name in losses if name != "none")]
    grid = np.array([[losses[name][domain] for domain in domains] for name in adapters])  # (adapters, domains)
    change = grid - grid[0]
    shade = change / np.maximum(abs(change).max(axis=0), 1e-9)  # -1 to 1
    figure, axes = canvas(7, 1.2 + 0.85 * len(adapters))
    shades = LinearSegmentedColormap.from_list("gain", [TRAINED, "white", FROZEN])
    axes.imshow(shade, cmap=shades, vmin=-1, vmax=1, aspect="auto")
    for i in range(len(adapters)):
        for j in range(len(domains)):
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="bottom" if i else "center", weight="bold", size=15)
            if i:
                axes.text(j, i + 0.05, f"{change[i, j]:+.2f}".replace("-", "\N{MINUS SIGN}"), ha="center", va="top")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(adapters)), [NAMES.get(name, name) for name in adapters])
    axes.set_xticks(np.arange(len(domains) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(adapters) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=4, alpha=1)
    axes.tick_params(which="both", length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("adapter")
    title = "Held-out loss in each domain, and its change from the base"
    figure.suptitle(title, x=0.02, ha="left", size=13, weight="bold")
    return figure
