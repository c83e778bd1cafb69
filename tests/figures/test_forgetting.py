"""What was learnt stands to the right, what was forgotten above; the factor's curves go through its losses."""

import numpy as np
import pytest

from refqlora.figures import picture
from refqlora.figures.forgetting import OFF, factor_figure, forgetting_figure, learnt_and_forgotten

ROWS = [
    {"method": method, "rank": rank, "lr": lr, "new_before": 3.5, "new_after": new, "old_before": 2.5, "old_after": old}
    for method, rank, lr, new, old in (
        ("full", None, 2e-4, 2.75, 2.625),
        ("LoRA", 1, 1e-3, 2.875, 2.5625),
        ("LoRA", 64, 4e-3, 2.8125, 3.0),
        ("QLoRA", 16, 2e-3, 2.8125, 2.75),
    )
]


def test_each_method_s_points_are_joined():
    figure = forgetting_figure(ROWS)
    lines = figure.axes[0].get_lines()
    shown = {line.get_label(): line.get_xydata().tolist() for line in lines if line.get_marker() != "None"}
    assert shown == {
        "full fine-tuning": [[0.75, 0.125]],
        "LoRA, adapter on": [[0.625, 0.0625], [0.6875, 0.5]],
        "QLoRA, adapter on": [[0.6875, 0.25]],
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*shown, OFF]


def test_an_adapter_that_is_off_is_a_line_at_zero():
    (line,) = (line for line in forgetting_figure(ROWS).axes[0].get_lines() if line.get_linestyle() == "--")
    assert list(line.get_ydata()) == [0, 0]


@pytest.mark.parametrize(
    ("label", "said"), [("rank", ["1", "64", "16"]), ("lr", ["0.0002", "0.001", "0.004", "0.002"])]
)
def test_points_say_their_rank_or_learning_rate(label, said):
    texts = [text.get_text() for text in forgetting_figure(ROWS, label).axes[0].texts]
    assert texts == said


def test_the_signs():
    assert learnt_and_forgotten(ROWS[2]) == (0.6875, 0.5)


def test_the_factor_moves_the_points_and_not_the_curves():
    losses = {1.0: {"old": 3.0, "new": 2.0}, 0: {"old": 2.5, "new": 3.5}, 2: {"old": 3.5, "new": 2.25}}
    for factor in losses:
        figure = factor_figure(losses, factor, "writes: $x$")
        curves = [line.get_xydata() for line in figure.axes[0].get_lines() if len(line.get_xydata()) == 3]
        np.testing.assert_array_equal(curves, [[(0, 2.5), (1, 3), (2, 3.5)], [(0, 3.5), (1, 2), (2, 2.25)]])
        points = [line.get_xydata().tolist() for line in figure.axes[0].get_lines() if len(line.get_xydata()) == 1]
        assert points == [[[factor, losses[factor]["old"]]], [[factor, losses[factor]["new"]]]]
        assert figure.get_suptitle() == f"The adapter times {factor:g}"
        assert figure.axes[0].get_title(loc="left") == "writes: $x$"
        assert picture(figure, "png")


def test_what_is_said_is_cut():
    figure = factor_figure({1: {"new": 2.0}}, 1, 80 * "x")
    assert figure.axes[0].get_title(loc="left") == 63 * "x" + "…"
