"""What fine-tuning learns of a new task, and what it forgets of the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import INK, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"full": (INK, "D"), "LoRA": (SERIES[0], "o"), "QLoRA": (SERIES[1], "s")}  # colour and marker
OFF = "adapter off: nothing learnt or forgotten"


@styled
def forgetting_figure(rows: Sequence[Mapping[str, Any]], label: str = "rank") -> Figure:
    """How far the new task's held-out loss fell, to the right, and how far the old one's rose, upwards: a point a row.

    rows: those of compare's "methods", or others with method, new_before, new_after, old_before and old_after.
    label: the key whose value stands beside each point, such as "rank" or "lr"; a method's points are joined in the
    order of the rows. With its adapter off a model is the base, to the bit: the dashed line.
    """
    figure, axes = canvas(7, 5)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        x, y = zip(*(learnt_and_forgotten(row) for row in own), strict=True)
        color, marker = LOOKS[method]
        name = "full fine-tuning" if method == "full" else f"{method}, adapter on"
        axes.plot(x, y, marker=marker, color=color, markersize=7, linewidth=1.2, label=name)
        for row, at in zip(own, zip(x, y, strict=True), strict=True):
            if row.get(label) is not None:
                offset = (-7, 5) if method == "LoRA" else (7, -12)
                text = axes.annotate(f"{row[label]:g}", at, offset, textcoords="offset points", color=color)
                text.set_ha("right" if method == "LoRA" else "left")
    axes.axhline(0, color=INK, linewidth=1.2, linestyle="--", label=OFF)
    axes.margins(0.12)
    axes.set_xlabel("learnt: fall of the new task's loss, nats a token")
    axes.set_ylabel("forgotten: rise of the old one's")
    said = {"rank": "by rank", "lr": "by learning rate"}.get(label, f"by {label}")
    axes.set_title(f"Learnt and forgotten, {said}")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def learnt_and_forgotten(row: Mapping[str, Any]) -> tuple[float, float]:
    """How far the held-out loss of the new task fell, and that of the old one rose."""
    return row["new_before"] - row["new_after"], row["old_after"] - row["old_before"]


@styled
def factor_figure(losses: Mapping[float, Mapping[str, float]], factor: float, said: str = "") -> Figure:
    """Each task's loss by the factor of the adapter's change, and the losses at one of the factors.

    losses: {factor: {task: loss}}. said: a line below the title, such as what the model writes at this factor.
    """
    figure, axes = canvas(7, 4.4)
    factors = sorted(losses)
    for task, color in zip(losses[factor], SERIES, strict=False):
        y = [losses[f][task] for f in factors]
        axes.plot(factors, y, "o-", color=color, markersize=4)
        at = factor, losses[factor][task]
        axes.plot(*at, "o", color=color, markersize=10)
        lower = at[1] == min(losses[factor].values())  # its number stands below the point, so that two do not meet
        offset = (0, -20) if lower else (0, 9)
        number = axes.annotate(f"{at[1]:.2f}", at, offset, textcoords="offset points", ha="center")
        number.set(color=color, weight="bold")
        axes.annotate(task, (factors[-1], y[-1]), (8, 0), textcoords="offset points", color=color, va="center")
    axes.axvline(factor, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="factor of the adapter's change: 0 is the base, 1 as trained", ylabel="held-out loss")
    figure.suptitle(f"The adapter times {factor:g}", x=0.02, ha="left", size=13, weight="bold")
    said = said if len(said) <= 64 else f"{said[:63]}…"
    axes.set_title(said, size=11, weight="normal", family="monospace", parse_math=False, x=-0.08)
    axes.margins(y=0.2)
    axes.grid(axis="y")
    return figure
