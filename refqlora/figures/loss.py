"""The loss during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EACH, MEAN, HELD_OUT = "#c3d2e3", *SERIES[:2]


def held_out_losses(rows: Sequence[Mapping[str, Any]], before: float, after: float | None = None) -> dict[int, float]:
    """{step: held-out loss} of a run: before the first step, in the rows of `train`, and after the last step."""
    between = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    return {0: before, **between} | ({} if after is None else {rows[-1]["step"]: after})


@styled
def loss_figure(rows: Sequence[Mapping[str, Any]], held_out: Mapping[int, float], title: str) -> Figure:
    """The loss at each step of a run, its running mean, and the held-out loss.

    rows: the steps and losses, as `train` returns them. held_out: {step: held-out loss}, where step 0 is the model
    before the run; the first and the last are labelled with their values.
    """
    from matplotlib.ticker import MaxNLocator

    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    window = max(1, len(rows) // 25)
    figure, axes = canvas()
    axes.plot(steps, losses, color=EACH, linewidth=1, marker="." if len(rows) < 50 else "", label="each step")
    if window > 1:
        middle = steps[window - 1 :] - (window - 1) / 2
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(middle, mean, color=MEAN, label=f"mean of {window} steps")
    if held_out:
        points = sorted(held_out.items())
        axes.plot(*zip(*points, strict=True), "o-", color=HELD_OUT, markersize=5, label="held out")
        for step, loss in (points[0], points[-1]):
            number = axes.annotate(f"{loss:.2f}", (step, loss), (7, 5), textcoords="offset points")
            number.set(color=HELD_OUT, weight="bold")
    axes.set_xlim(0, 1.07 * steps[-1])  # room for the last point's label
    axes.set(xlabel="step", ylabel="loss, nats a token")
    title = title if len(title) <= 60 else f"{title[:59]}…"
    axes.set_title(title, pad=16, parse_math=False)  # a file's name may hold a $
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    axes.legend()
    return figure
