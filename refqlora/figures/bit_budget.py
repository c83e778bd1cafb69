"""Where the bits of a quantised parameter go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..bits import bit_budget
from . import FROZEN, INK, PALE, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 4096 * 4096  # of a linear layer in a model of 7 billion parameters
COLORS = {"codes": FROZEN, "constants": SERIES[2], "second-level constants": SERIES[3], "mean": SERIES[4]}
ONE, TWO = "NF4, one level", "NF4, two levels"


def budgets(size: int = SIZE, block_size: int = 64) -> dict[str, dict[str, float]]:
    """{how a tensor of `size` weights is held: {part: bits a parameter}}."""
    return {
        "float32": {"weights": 32.0},
        "bfloat16": {"weights": 16.0},
        ONE: bit_budget(size, block_size, double_quant=False),
        TWO: bit_budget(size, block_size),
    }


@styled
def bit_budget_figure(held: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bits a parameter of 32-bit, 16-bit and 4-bit weights, to scale; below, the constants of the 4-bit ones, enlarged.

    held: those of `budgets`, for any size and block size.
    """
    from matplotlib.patches import ConnectionPatch
    from matplotlib.ticker import MaxNLocator

    figure, (whole, zoom) = canvas(7, 5.6, rows=2, gridspec_kw={"height_ratios": [1, 1.2]})
    for axes, names in ((whole, list(held)), (zoom, [ONE, TWO])):
        for i, name in enumerate(names):
            left = 0.0
            for part, bits in held[name].items():
                axes.barh(i, bits, 0.62, left, color=COLORS.get(part, PALE), label=part)
                left += bits
            axes.text(left, i, f" {left:.4g}", va="center", weight="bold")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
    whole.set(xlim=(0, 36), ylim=(3.5, -0.5), xticks=[], title="Where the bits of a parameter go")
    whole.spines["bottom"].set_visible(False)

    one, two = sum(held[ONE].values()), sum(held[TWO].values())
    room = one - 4  # for the text on the right of a bar
    zoom.set(xlim=(4, one + 0.14 * room), ylim=(3.0, -0.5), xlabel="bits a parameter: what comes on top of 4, enlarged")
    zoom.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    zoom.text(4, 0, f"  float32 constants {one - 4:.3g}", va="center", color="white", weight="bold")
    sources = {"8-bit constants": 4 + held[TWO]["constants"] / 2, "second-level constants": two, "mean": two}
    for i, (text, x) in enumerate(sources.items()):
        part, y, start = text.removeprefix("8-bit "), 2.56 - 0.45 * i, two + 0.06 * room
        number = np.format_float_positional(held[TWO][part], 3, fractional=False)
        zoom.plot([x, x, start - 0.01 * room], [1.31, y, y], color=COLORS[part], linewidth=1.5)
        zoom.text(start, y, f"{text} {number}", va="center", color=COLORS[part], weight="bold")
    for x in (4, one):
        line = ConnectionPatch((x, 3.31), (x, -0.5), "data", "data", axesA=whole, axesB=zoom, color=INK, lw=0.8)
        figure.add_artist(line)
    return figure
