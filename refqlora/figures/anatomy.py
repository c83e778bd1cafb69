"""LoRA's anatomy: a linear layer, its adapter, every shape, and what has a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import FROZEN, INK, PALE, TRAINED, blank, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = {"N": 0.9, "in": 1.6, "out": 1.3, "r": 0.4}  # lengths in the drawing
PARTS = {  # {name: (rows, columns, middle, colour)}; every matrix as it is stored
    "x": ("N", "in", (1.0, 2.55), PALE),
    "W": ("out", "in", (3.75, 3.5), FROZEN),
    "A": ("r", "in", (3.2, 1.25), TRAINED),
    "z": ("N", "r", (4.6, 1.25), PALE),
    "B": ("out", "r", (5.6, 1.25), TRAINED),
    "y": ("N", "out", (8.3, 2.55), PALE),
}
PLUS, SCALE = (7.0, 2.55), (7.0, 1.25)
PATHS = [  # corners; each ends in an arrow's head
    [(1.8, 2.55), (2.1, 2.55), (2.1, 3.5), (2.95, 3.5)],
    [(2.1, 2.55), (2.1, 1.25), (2.4, 1.25)],
    [(4.55, 3.5), (7.0, 3.5), (7.0, 2.82)],
    [(4.0, 1.25), (4.4, 1.25)],
    [(4.8, 1.25), (5.4, 1.25)],
    [(5.8, 1.25), (6.73, 1.25)],
    [(7.0, 1.52), (7.0, 2.28)],
    [(7.27, 2.55), (7.65, 2.55)],
]


@styled
def anatomy_figure() -> Figure:
    """y = x W^T + s (x A^T) B^T as a diagram: each matrix as it is stored, with its shape and in one scale. The frozen
    one is blue; the trained ones, which have a gradient, are orange."""
    from matplotlib.patches import Circle, Rectangle

    figure, axes = canvas(9, 5)
    blank(axes, 9, 5)
    for path in PATHS:
        _arrow(axes, path)
    for name, (rows, columns, (x, y), color) in PARTS.items():
        height, width = SIZES[rows], SIZES[columns]
        corner = x - width / 2, y - height / 2
        axes.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor=INK, lw=1.4))
        shape, wide = f"({rows}, {columns})", "r" not in (rows, columns)
        _say(axes, x, y, f"{name}\n{shape}" if wide else name, "white" if color == TRAINED else INK)
        if not wide:
            _say(axes, x, corner[1] - 0.28, shape)
    for (x, y), sign in ((PLUS, "+"), (SCALE, "s")):
        axes.add_patch(Circle((x, y), 0.27, facecolor="white", edgecolor=INK, lw=1.4))
        _say(axes, x, y - 0.01, sign, size=19)
    _say(axes, 4.5, 4.7, "y = x Wᵀ + s (x Aᵀ) Bᵀ,   s = α / r", size=20)
    _say(axes, 5.8, 3.78, "frozen: no gradient")
    _say(axes, 4.4, 2.2, "trained: gradients dA and dB", TRAINED)
    return figure


def _say(axes: Axes, x: float, y: float, words: str, color: str = INK, size: float = 16) -> None:
    weight = "normal" if color == INK and size < 20 else "bold"
    axes.text(x, y, words, ha="center", va="center", fontsize=size, color=color, weight=weight)


def _arrow(axes: Axes, corners: list[tuple[float, float]]) -> None:
    """A line through the corners, with a head at the last one."""
    axes.plot(*zip(*corners[:-1], strict=True), color=INK, lw=1.6, solid_joinstyle="miter")
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.6, "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", corners[-1], corners[-2], arrowprops=style)
