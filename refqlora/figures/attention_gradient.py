"""The gradient of attention's weights, before the softmax and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def attention_gradient_figure(p: np.ndarray, dp: np.ndarray, ds: np.ndarray, title: str) -> Figure:
    """Three maps of queries (rows) and keys (columns): P, its gradient dP, and the scores' gradient dS. What is above
    zero is orange, what is below blue.

    p, dp, ds: (T, S) of one head. Each panel has a scale of its own, and names its largest element.
    """
    from matplotlib.colors import LinearSegmentedColormap

    signed = LinearSegmentedColormap.from_list("signed", [SERIES[0], "white", SERIES[1]])
    figure, panels = canvas(9, 3.7, columns=3, sharey=True)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
    for axes, values, name in zip(panels, (p, dp, ds), ("P", "dP", "dS"), strict=True):
        largest = abs(values).max()
        axes.imshow(values, cmap=signed, vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set_title(f"{name}, up to {largest:.2g}")
        axes.set(xlabel="key", xticks=[0, values.shape[1] - 1], yticks=[0, len(values) - 1])
    panels[0].set_ylabel("query")
    return figure
