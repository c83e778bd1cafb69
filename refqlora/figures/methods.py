"""Full fine-tuning, LoRA and QLoRA of one linear layer: what is frozen, what is trained, and the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..quantization import quantized_nbytes
from . import FROZEN, GRADIENTS, INK, MOMENTS, TRAINED, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, RANK = 4096, 16  # of a linear layer in a model of 7 billion parameters, and of its adapter


def method_bytes(size: int = SIZE, rank: int = RANK) -> dict[str, dict[str, int]]:
    """{method: {part: bytes}} for training a linear layer of `size` x `size`. What is trained is in float32 and has a
    gradient and AdamW's two moments."""
    adapter = 4 * 2 * size * rank
    full = 4 * size * size
    trained = {"adapter": adapter, "gradients": adapter, "AdamW": 2 * adapter}
    return {
        "full fine-tuning": {"weights": full, "gradients": full, "AdamW": 2 * full},
        "LoRA": {"weights": full, **trained},
        "QLoRA": {"weights": quantized_nbytes(size * size), **trained},
    }


@styled
def methods_figure(held: Mapping[str, Mapping[str, int]], rank: int = RANK) -> Figure:
    """One linear layer in training: what is trained is orange, what is frozen blue, and the bars are the bytes.

    held: those of `method_bytes`. rank: the adapter's.
    """
    from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

    figure, panels = canvas(7.5, 5.2, columns=3)
    most = sum(held["full fine-tuning"].values())
    for axes, (method, parts) in zip(panels, held.items(), strict=True):
        axes.set(xlim=(0, 10), ylim=(-1.2, 10))
        axes.axis("off")
        axes.text(5, 9.55, method, ha="center", fontsize=15, weight="bold", color=INK)

        def arrow(start: tuple[float, float], end: tuple[float, float], axes: object = axes) -> None:
            axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, lw=1.4))  # type: ignore[attr-defined]

        full, quantized = method == "full fine-tuning", method == "QLoRA"
        x = 5.0 if full else 3.2  # of W's middle
        axes.text(5, 3.05, "x", ha="center", va="center", fontsize=14, style="italic", color=INK)
        axes.text(5, 8.75, "y", ha="center", va="center", fontsize=14, style="italic", color=INK)
        axes.add_patch(Rectangle((x - 1.6, 4.3), 3.2, 3.2, facecolor=TRAINED if full else FROZEN, edgecolor=INK))
        if quantized:
            for i in range(1, 8):  # a grid: 4-bit codes
                axes.plot([x - 1.6 + 0.4 * i] * 2, [4.3, 7.5], color="white", lw=0.8)
                axes.plot([x - 1.6, x + 1.6], [4.3 + 0.4 * i] * 2, color="white", lw=0.8)
        said = "trained" if full else "4 bits" if quantized else "frozen"
        label = axes.text(x, 5.9, f"W\n{said}", ha="center", va="center", fontsize=12, color="white", weight="bold")
        if quantized:
            label.set_bbox({"facecolor": FROZEN, "edgecolor": "none", "pad": 3})
        arrow((4.8, 3.3), (x, 4.3)) if not full else arrow((5, 3.35), (5, 4.3))
        if full:
            arrow((5, 7.5), (5, 8.5))
        else:
            for name, low, wide_below in (("A", 4.3, True), ("B", 6.0, False)):
                below, above = (1.5, 0.55) if wide_below else (0.55, 1.5)
                corners = [(7.6 - below, low), (7.6 + below, low), (7.6 + above, low + 1.5), (7.6 - above, low + 1.5)]
                axes.add_patch(Polygon(corners, facecolor=TRAINED, edgecolor=INK))
                axes.text(7.6, low + 0.75, name, ha="center", va="center", fontsize=12, color="white", weight="bold")
            axes.text(10, 3.15, f"r = {rank}", ha="right", va="center", color=INK)
            arrow((5.2, 3.3), (7.6, 4.3))
            arrow((x, 7.5), (4.75, 8.4))
            arrow((7.6, 7.5), (5.25, 8.4))
            axes.text(5, 8.1, "+", ha="center", va="center", fontsize=16, color=INK)

        left, total = 0.4, sum(parts.values())
        for part, size in parts.items():
            colors = {
                "gradients": GRADIENTS,
                "AdamW": MOMENTS,
                "adapter": TRAINED,
                "weights": TRAINED if full else FROZEN,
            }
            axes.add_patch(Rectangle((left, 1.55), 9.2 * size / most, 0.75, facecolor=colors[part], lw=0))
            left += 9.2 * size / most
        axes.text(0.4, 0.98, f"{total / 2**20:.1f} MiB", ha="left", va="center", fontsize=15, weight="bold", color=INK)
        detail = "\n".join(f"{part} {size / 2**20:.3g}" for part, size in parts.items())
        axes.text(0.4, 0.6, detail, ha="left", va="top", color=INK)
    return figure
