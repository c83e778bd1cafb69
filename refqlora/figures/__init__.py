"""The pictures: for each, a function that takes facts and writes a PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_bytes(path, picture.getvalue())
