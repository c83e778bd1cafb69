"""Sliders below a picture that is redrawn as they move; without ipywidgets, the picture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .shown import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def slider(draw: Callable[..., Figure], alt: str, /, start: dict[str, Any], **choices: Sequence[Any]) -> None:
    """Show the figure `draw(**start)`, and below it a slider for each of `choices`, whose values are what it offers.

    The picture is an ordinary output, so that a notebook on the web shows it as well. alt: the text for those who do
    not see it. Raises ValueError if a start value is not among its choices.

        slider(block_figure, "a block and its codes", start={"outlier": 1}, outlier=(1, 2, 5, 10, 20))
    """
    from IPython.display import display

    if set(start) != set(choices):
        raise ValueError(f"start: expected values for {', '.join(choices)}, got {', '.join(start)}")
    for name, values in choices.items():
        if start.get(name) not in values:
            raise ValueError(f"{name}: expected a start among {tuple(values)}, got {start.get(name)!r}")
    handle = display(picture(draw(**start), alt), display_id=True)
    try:
        from ipywidgets import SelectionSlider, VBox
    except ImportError:  # as in a plain Python, or where the `notebooks` extra is not installed
        return
    sliders = {
        name: SelectionSlider(options=list(values), value=start[name], description=name)
        for name, values in choices.items()
    }

    def redraw(_: object) -> None:
        handle.update(picture(draw(**{name: one.value for name, one in sliders.items()}), alt))

    for one in sliders.values():
        one.observe(redraw, names="value")
    if handle is not None:  # there is no front end to show them to without a kernel
        display(VBox(list(sliders.values())))
