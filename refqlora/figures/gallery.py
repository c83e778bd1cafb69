"""Every picture in figures/: its file, the line below it, and what draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.reading import read_json
from .backward import backward_figure
from .methods import method_bytes, methods_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]  # those that `refqlora compare` writes
MEASURED = Path(__file__).parents[1] / "assets" / "compare.json"  # the ones drawn unless others are given

GALLERY: dict[str, tuple[str, Callable[[Facts], Figure]]] = {
    "methods.svg": (
        "One linear layer in training: full fine-tuning, LoRA and QLoRA, what is frozen and what is trained, in bytes.",
        lambda facts: methods_figure(method_bytes()),
    ),
    "backward.svg": (
        "The backward pass of a decoder layer: the shapes, what is kept for it, and which parts get gradients.",
        lambda facts: backward_figure(),
    ),
}


def measured(path: Path = MEASURED) -> dict[str, Any]:
    """The facts in a compare.json. Raises ValueError or FileNotFoundError that names the file."""
    return read_json(path)


def page() -> str:
    """figures/README.md: every picture with its line."""
    parts = [
        "# The figures",
        "`refqlora figures` draws them all; each may be used with a word on where it comes from. What was measured was "
        "measured by `refqlora compare`, and is drawn from [compare.json](../refqlora/assets/compare.json) or, with "
        "`--measured`, from a run of your own.",
    ]
    parts += [f"## {Path(name).stem}\n\n![{line}]({name})\n\n{line}" for name, (line, _) in GALLERY.items()]
    return "\n\n".join(parts) + "\n"
