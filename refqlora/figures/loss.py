"""The loss during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import write_png

EACH, MEAN, HELD_OUT = "#c3d2e3", "#1f5a94", "#c4501b"


def held_out_losses(rows: Sequence[Mapping[str, Any]], before: float, after: float | None = None) -> dict[int, float]:
    """{step: held-out loss} of a run: before the first step, in the rows of `train`, and after the last step."""
    between = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    return {0: before, **between} | ({} if after is None else {rows[-1]["step"]: after})


def loss_figure(path: Path, rows: Sequence[Mapping[str, Any]], held_out: Mapping[int, float], title: str) -> None:
    """Draw a run into a PNG of 840 x 480 pixels, written atomically.

    rows: the steps and losses, as `train` returns them; their running mean is drawn too. held_out: {step: held-out
    loss}, where step 0 is the model before the run; the first and the last are labelled with their values.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    window = max(1, len(rows) // 25)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=EACH, linewidth=1, marker="." if len(rows) < 50 else "", label="each step")
    if window > 1:
        middle = steps[window - 1 :] - (window - 1) / 2
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(middle, mean, color=MEAN, linewidth=2.5, label=f"mean of {window} steps")
    if held_out:
        points = sorted(held_out.items())
        axes.plot(*zip(*points, strict=True), "o-", color=HELD_OUT, linewidth=2, markersize=5, label="held out")
        for step, loss in (points[0], points[-1]):
            number = axes.annotate(f"{loss:.2f}", (step, loss), (7, 5), textcoords="offset points")
            number.set(color=HELD_OUT, fontsize=12, weight="bold")
    axes.set_xlim(0, 1.07 * steps[-1])  # room for the last point's label
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("loss, nats a token", fontsize=12)
    title = title if len(title) <= 60 else f"{title[:59]}…"
    axes.set_title(
        title, loc="left", pad=16, fontsize=13, weight="bold", parse_math=False
    )  # a file's name may hold a $
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=11)
    write_png(path, figure)
