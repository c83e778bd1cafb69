"""The pictures, one function each: facts in, a matplotlib Figure out. One style for all; nothing here measures.

Colours mean the same everywhere: what is frozen is blue, what is trained orange. They are told apart by people who are
colour-blind, and the background is white, so that a picture can be read on a dark page too.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from ..files.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, FROZEN, TRAINED = "#22303f", "#8fa6bf", "#d9662b"
GRADIENTS, MOMENTS = "#eeaa86", "#f8dccb"  # lighter than what is trained, as they come with it
PALE = "#dde5ee"  # what stays in the background
SERIES = ("#1f5a94", "#d9662b", "#2a9d76", "#8b5fa8", "#b8860b", "#6b7a8a")  # lines beside one another, in this order

STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 12,  # readable at half of 7 inches
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "refqlora",  # names in the file that do not change from one drawing to the next
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that draws a figure, made to do so in the common style. pyplot's settings stay as they are."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **options: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return in_style


def canvas(width: float = 7, height: float = 4, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches, and its axes: one, or an array of them.

    options: those of `Figure.subplots`, such as `sharey=True`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def blank(axes: Axes, width: float, height: float) -> None:
    """Make axes a sheet for a diagram: no frame, units from (0, 0) to (width, height), equal in both directions."""
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")


def picture(figure: Figure, kind: str, dpi: int = 120) -> bytes:
    """The figure as the bytes of a "png" (128 colours, which keeps it small) or an "svg". The same figure has the same
    bytes, on one machine."""
    import matplotlib

    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else {"Software": None})
    if kind == "svg":
        return target.getvalue()
    from PIL import Image

    small = io.BytesIO()
    Image.open(target).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return small.getvalue()


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure to a file whose name ends in .png or .svg, atomically."""
    write_bytes(path, picture(figure, path.suffix[1:]))
