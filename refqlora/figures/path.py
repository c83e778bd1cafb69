"""The path of one block of weights through quantisation, packing and both levels, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..bits import BlockPath, block_path
from ..codebooks import DYNAMIC, NF4
from ..files.hub import BUNDLED
from ..files.reading import read_tensors
from . import FROZEN, INK, PALE, SERIES, blank, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CODES, CONSTANTS, SECOND, MEAN = FROZEN, SERIES[2], SERIES[3], SERIES[4]
LAYER = "model.layers.0.mlp.gate_proj.weight"  # of the bundled base


def bundled_block(block: int = 0) -> BlockPath:
    """The path of one block of a layer of the bundled base."""
    return block_path(dict(read_tensors(BUNDLED / "model.safetensors"))[LAYER], block)


@styled
def path_figure(path: BlockPath) -> Figure:
    """64 weights as bars; their codes; the packed bytes; their constant among its 255 neighbours; what comes back."""
    figure, rows = canvas(7, 9.6, rows=5, gridspec_kw={"height_ratios": [1, 1.5, 0.95, 1.3, 1]})
    _weights(rows[0], path)
    _codes(rows[1], path)
    _bytes(rows[2], path)
    _constant(rows[3], path)
    _back(rows[4], path)
    for axes in (rows[0], rows[1], rows[4]):
        axes.set(xlim=(-1, 64), xticks=[])
        axes.spines["bottom"].set_visible(False)
    return figure


def _weights(axes: Axes, path: BlockPath) -> None:
    largest = int(abs(path.weights).argmax())
    colors = [CONSTANTS if i == largest else CODES for i in range(len(path.weights))]
    axes.bar(range(len(path.weights)), path.weights, color=colors)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_title(f"1. {len(path.weights)} weights; the largest size is absmax, {path.absmax:.5f}")


def _codes(axes: Axes, path: BlockPath) -> None:
    for value in NF4:
        axes.axhline(value, color=PALE, linewidth=1, zorder=0)
    places = np.arange(len(path.codes))
    axes.vlines(places, path.normalised, NF4[path.codes], color=INK, linewidth=1)
    axes.plot(places, path.normalised, "o", color=INK, markersize=3, label="weight / absmax")
    axes.plot(places, NF4[path.codes], "s", color=CODES, markersize=4.5, label="the nearest of NF4's 16 values")
    axes.set_yticks([-1, 0, 1])
    scale = axes.twinx()
    scale.set(ylim=axes.get_ylim(), yticks=NF4[[0, 3, 7, 11, 15]], yticklabels=["0", "3", "7", "B", "F"])
    scale.spines["top"].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, handletextpad=0.2, columnspacing=1.2)
    axes.set_title("2. Divided by absmax, each takes a code, 0 to F")


def _bytes(axes: Axes, path: BlockPath) -> None:
    from matplotlib.patches import Rectangle

    blank(axes, 32, 4.4)
    axes.set_aspect("auto")
    for i, byte in enumerate(path.packed):
        x, y = i % 16 * 2, 2.3 - i // 16 * 2.1
        axes.add_patch(Rectangle((x + 0.08, y), 1.84, 1.8, facecolor=CODES if i == 0 else PALE, edgecolor="none"))
        axes.text(x + 1, y + 0.85, f"{byte:02X}", ha="center", va="center", family="monospace", fontsize=13)
    first, second = path.codes[:2]
    axes.set_title(f"3. Two codes make a byte: {first:X} and {second:X}, in hexadecimal, {path.packed[0]:02X}")


def _constant(axes: Axes, path: BlockPath) -> None:
    mean, largest = float(path.mean), float(path.nested_absmax)
    low, high, scaled = mean - largest, mean + largest, (path.absmax - mean) / largest
    axes.vlines(path.constants, 0, 0.5, color=CONSTANTS, linewidth=1, alpha=0.45)
    axes.vlines(path.absmax, 0, 1.0, color=CONSTANTS, linewidth=3)
    axes.vlines(mean, 0, 2.2, color=MEAN, linewidth=2)
    axes.annotate("", (high, 1.0), (mean, 1.0), arrowprops={"arrowstyle": "<->", "color": SECOND, "lw": 2})
    axes.text(mean, 2.2, f"  mean {mean:.5f},\n  one for the tensor", va="top", color=MEAN, weight="bold")
    said = f"{largest:.5f}, one for {len(path.constants)} blocks"
    axes.text((mean + high) / 2, 0.92, said, ha="center", va="top", color=SECOND, weight="bold")
    said = f"({path.absmax:.5f} - {mean:.5f}) / {largest:.5f}\n= {scaled:.4f}: "
    said += f"code {path.absmax_code}, {DYNAMIC[path.absmax_code]:.4f},\nwhich comes back as {path.absmax_back:.5f}"
    margin = 0.03 * (high - low)
    axes.text(low - margin, 2.2, said.replace("-", "−"), va="top", color=CONSTANTS, weight="bold")
    axes.set(ylim=(0, 2.25), yticks=[], xlim=(low - margin, high + margin))
    axes.spines["left"].set_visible(False)
    axes.set_title(f"4. absmax less the mean takes an 8-bit code, {path.absmax_code}")


def _back(axes: Axes, path: BlockPath) -> None:
    places = range(len(path.back))
    axes.bar(places, path.back, color=CODES)
    axes.step(np.arange(-0.5, len(path.back)), [*path.weights, path.weights[-1]], where="post", color=INK, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_title(f"5. Back: NF4's value times {path.absmax_back:.5f} (line: the weights)")
