"""The figure has the right size and shows the run, whatever rows there are."""

import io
import struct
import warnings

import matplotlib.image
import numpy as np
import pytest

from refqlora.figures import picture
from refqlora.figures.loss import held_out_losses, loss_figure

SIZE = (840, 480)  # 7 x 4 inches of 120 dots


def rows(steps, held_out=0):
    losses = 3 + np.random.default_rng(0).random(steps)
    rows = [{"step": i + 1, "loss": float(loss)} for i, loss in enumerate(losses)]
    for row in rows[held_out - 1 :: held_out] if held_out else []:
        row["held_out_loss"] = 3.4
    return rows


def test_the_held_out_losses_begin_before_the_first_step():
    assert held_out_losses(rows(100, 50), 4.5) == {0: 4.5, 50: 3.4, 100: 3.4}
    assert held_out_losses(rows(120, 50), 4.5, 3.25) == {0: 4.5, 50: 3.4, 100: 3.4, 120: 3.25}
    assert held_out_losses(rows(7), 4.5, 3.25) == {0: 4.5, 7: 3.25}


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize(
    ("steps", "held_out", "legend"),
    [
        (1, {}, ["each step"]),
        (1, {0: 4.5, 1: 3.25}, ["each step", "held out"]),
        (49, {}, ["each step"]),
        (125, {}, ["each step", "mean of 5 steps"]),
        (125, {0: 4.5, 50: 3.4, 125: 3.25}, ["each step", "mean of 5 steps", "held out"]),
    ],
)
def test_a_figure_of_the_rows_there_are(steps, held_out, legend):
    data = rows(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = loss_figure(data, held_out, "title")
        content = picture(figure, "png")
    assert struct.unpack(">II", content[16:24]) == SIZE
    assert matplotlib.image.imread(io.BytesIO(content)).std() > 0.01  # there is something on it

    assert labels(figure) == legend
    axes = figure.axes[0]
    lines = axes.get_lines()
    np.testing.assert_array_equal(lines[0].get_ydata(), [row["loss"] for row in data])
    if "mean of 5 steps" in legend:
        assert lines[1].get_xdata()[0] == 3  # the mean of steps 1 to 5 stands in their middle
        assert lines[1].get_ydata()[-1] == pytest.approx(np.mean([row["loss"] for row in data[-5:]]))
    if "held out" in legend:
        np.testing.assert_array_equal(lines[-1].get_xydata(), list(held_out.items()))
    assert [text.get_text() for text in axes.texts] == (["4.50", "3.25"] if held_out else [])  # the first and the last


@pytest.mark.parametrize("title", ["on a$^$b.txt", "on $x^2$", "on \\frac", "on _a_{b}", "50 %"])
def test_a_title_is_not_a_formula(title):
    figure = loss_figure(rows(3), {}, title)
    assert figure.axes[0].get_title(loc="left") == title
    assert len(picture(figure, "png")) > 1000


def test_a_long_title_is_cut():
    figure = loss_figure(rows(3), {}, "on " + 80 * "x")
    assert figure.axes[0].get_title(loc="left") == "on " + 56 * "x" + "…"
