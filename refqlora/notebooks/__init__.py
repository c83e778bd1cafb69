"""What the walkthroughs in notebooks/ show with: the engine's source, tables, pictures, sliders, and answers checked.

    from refqlora.notebooks import check, picture, slider, source, table

Each returns something that a notebook displays, and that reads well as plain text too.
"""

from .exercises import check
from .shown import picture, source, table
from .sliders import slider

__all__ = ["check", "picture", "slider", "source", "table"]
