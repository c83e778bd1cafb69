"""The pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def loss_figure(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw the loss of each step, its running mean, and the held-out loss, from `train`'s rows, into a PNG."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    window = max(1, len(rows) // 50)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#b8cbe0", linewidth=0.8, label="each step")
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], mean, color="#1f5a94", label=f"mean of {window} steps")
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c4501b", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, steps[-1]))
    axes.set_title(title, parse_math=False)  # a file's name may hold a $
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)  # covers no curve
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
