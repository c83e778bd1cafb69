"""A decoder layer, forward and backward: the shapes, what is kept for the backward, and which parts get gradients."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import FROZEN, INK, PALE, SERIES, TRAINED, blank, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches.
WIDTH, TALL = 5.8, 6.5  # of each half of the layer
FOOT, PITCH, HEIGHT = 0.55, 0.97, 0.44  # of the lowest operation, between two, and of each
BOX, ADAPTER, RADIUS = (0.5, 1.9), 0.6, 0.25  # left and width of an operation; of its adapter; of the sum
UP, DOWN, NOTES = 1.3, 1.65, 2.55  # where the arrows and the notes are


class Step(NamedTuple):
    """One operation of a layer, with sizes by the legend in functional.py."""

    name: str
    parts: tuple[str, ...]  # what the layer's cache calls it
    output: str  # the shapes of what it gives, and of the gradient that comes back
    backward: str
    kept: str = ""  # for the backward
    per_token: str = ""  # how many numbers that is, for each of the B*T tokens
    trained: str = ""  # the shapes of the adapters' gradients
    weight: bool = False  # whether it has a frozen one


KEPT = SERIES[0]
STREAM = "(B, T, D)"  # of the residual stream
NORM = r"$dx = (d\hat{x} - \hat{x}\ \mathrm{mean}(d\hat{x} \odot \hat{x}))\,/\,\mathrm{rms}$"
LINEAR = r"$dx = dy\,W + dz\,A$"

ATTENTION = (
    Step("RMSNorm", ("input_layernorm",), STREAM, NORM, "x, 1/rms", "D + 1", weight=True),
    Step(
        "q, k, v",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "(B, T, H, h), 2 × (B, T, K, h)",
        r"$dn$: the sum of three $dy\,W + dz\,A$",
        "n, z",
        "D + 3r",
        "dA 3 × (r, D), dB (Hh, r), 2 × (Kh, r)",
        weight=True,
    ),
    Step("RoPE", (), "(B, T, H, h), 2 × (B, T, K, h)", r"$dq$ and $dk$ rotated back"),
    Step(
        "attention",
        ("attention",),
        "(B, T, H, h)",
        r"$dS = P \odot (dP - \mathrm{rowsum}(dP \odot P))$",
        "q, k, v, y, log-sum-exp",
        "2Hh + 2Kh + H",
    ),
    Step("output", ("self_attn.o_proj",), STREAM, LINEAR, "z", "r", "dA (r, Hh), dB (D, r)", weight=True),
)
MLP = (
    Step("RMSNorm", ("post_attention_layernorm",), STREAM, NORM, "x, 1/rms", "D + 1", weight=True),
    Step(
        "gate, up",
        ("mlp.gate_proj", "mlp.up_proj"),
        "2 × (B, T, F)",
        r"$dn$: the sum of two $dy\,W + dz\,A$",
        "n, z",
        "D + 2r",
        "dA 2 × (r, D), dB 2 × (F, r)",
        weight=True,
    ),
    Step(
        "SwiGLU",
        ("activation",),
        "(B, T, F)",
        r"$dg = dy \odot u \odot \mathrm{silu}'(g)$, $du = dy \odot \mathrm{silu}(g)$",
        "gate g, up u",
        "2F",
    ),
    Step("down", ("mlp.down_proj",), STREAM, LINEAR, "its input, z", "F + r", "dA (r, F), dB (D, r)", weight=True),
)


@styled
def backward_figure() -> Figure:
    """A Llama's layer: its MLP above its attention. Solid arrows go up, forward; dashed ones come down, backward, each
    with a gradient of the same shape. Frozen weights are blue, adapters orange."""
    figure, panels = canvas(WIDTH, 2 * TALL, rows=2)
    halves = ("A decoder layer: the MLP", MLP, "to the next layer"), ("Below it: attention", ATTENTION, "to the MLP")
    for axes, (title, steps, after) in zip(panels, halves, strict=True):
        blank(axes, WIDTH, TALL)
        axes.text(0, TALL, title, va="top", fontsize=15, weight="bold")
        y = FOOT
        _arrows(axes, 0.05, y, STREAM)
        for step in steps:
            _box(axes, y, step)
            _arrows(axes, y + HEIGHT, y + PITCH, step.output)
            y += PITCH
        _residual(axes, y, after)
    _legend(panels[0])
    for text in (*panels[0].texts, *panels[1].texts):
        text.set_in_layout(False)  # they fit the sheets, which would else be made smaller
    return figure


def _box(axes: Axes, y: float, step: Step) -> None:
    """An operation with its foot at y, and what there is to say about its backward."""
    from matplotlib.patches import Rectangle

    def box(left: float, width: float, fill: str, text: str, **options: Any) -> None:
        axes.add_patch(Rectangle((left, y), width, HEIGHT, facecolor=fill, edgecolor=INK, lw=1.2))
        axes.text(left + width / 2, y + HEIGHT / 2, text, ha="center", va="center", weight="bold", **options)

    left, width = BOX
    adapter = ADAPTER if step.trained else 0
    box(left, width - adapter, FROZEN if step.weight else "white", step.name, fontsize=13)
    lines = [(step.backward, INK)]
    if step.kept:
        kept = f"keeps {step.per_token}: {step.kept}"
        lines += [(line, KEPT) for line in textwrap.wrap(kept, 36, break_on_hyphens=False)]
    if step.trained:
        box(left + width - adapter, adapter, TRAINED, "A, B", color="white")
        lines.append((step.trained, TRAINED))
    for i, (line, color) in enumerate(lines):
        height = y + HEIGHT / 2 + 0.225 * ((len(lines) - 1) / 2 - i)
        axes.text(NOTES, height, line, va="center", color=color)


def _arrows(axes: Axes, low: float, high: float, shape: str) -> None:
    """Up and down between two operations, with the shape that both have."""
    _line(axes, [(UP, low), (UP, high)])
    _line(axes, [(DOWN, high), (DOWN, low)], dashed=True)
    axes.text(DOWN + 0.12, (low + high) / 2, shape, va="center")


def _line(axes: Axes, points: Sequence[tuple[float, float]], dashed: bool = False) -> None:
    """A line through the points, with an arrow at its end."""
    style = (0, (3, 1.5)) if dashed else "-"
    axes.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.5, ls=style)
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "ls": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow)


def _residual(axes: Axes, y: float, after: str) -> None:
    """The path around the operations, which is added at the height y, and what comes after it."""
    from matplotlib.patches import Circle

    middle, top, foot = (UP + DOWN) / 2, y + 0.17, FOOT - 0.33
    axes.add_patch(Circle((middle, top), RADIUS, facecolor=PALE, edgecolor=INK, lw=1.2, zorder=3))
    axes.text(middle, top - 0.01, "+", ha="center", va="center", fontsize=17, weight="bold", zorder=4)
    _line(axes, [(UP, foot), (0.1, foot), (0.1, top), (middle - RADIUS, top)])
    inner, above = 0.27, foot + 0.14
    _line(axes, [(middle, top - 0.14), (inner, top - 0.14), (inner, above), (DOWN, above)], dashed=True)
    axes.text(NOTES, top, "backward: the same gradient to both", va="center")
    _arrows(axes, top + 0.17, top + 0.55, f"{STREAM}, {after}")


def _legend(axes: Axes) -> None:
    """What colours and lines mean, above the MLP, which has one operation less."""
    from matplotlib.patches import Rectangle

    left, right, foot = 0.1, NOTES, FOOT + (len(MLP) + 1.35) * PITCH
    for x, color, text in ((left, FROZEN, "frozen: no gradient"), (right, TRAINED, "trained: gradients dA, dB")):
        axes.add_patch(Rectangle((x, foot - 0.1), 0.35, 0.2, facecolor=color, edgecolor=INK, lw=1))
        axes.text(x + 0.45, foot, text, va="center")
    for x, dashed, text in ((left, False, "forward"), (right, True, "backward, in the same shapes")):
        _line(axes, [(x, foot - 0.27), (x + 0.35, foot - 0.27)], dashed)
        axes.text(x + 0.45, foot - 0.27, text, va="center")
    axes.text(
        left, foot + 0.27, "keeps, for the backward: numbers a token (z: the input times A)", color=KEPT, va="center"
    )
