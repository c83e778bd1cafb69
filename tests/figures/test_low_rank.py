"""The pictures of notebook 02: what is plotted is what was given."""

import numpy as np

from refqlora.figures.low_rank import low_rank_figure
from refqlora.figures.scaling import scaling_figure

LOSSES, BEST = {1: 0.5, 4: 0.1, 8: 0.02}, {1: 0.4, 4: 0.09, 8: 0.01}


def test_losses_stand_beside_the_best_possible():
    left, _ = low_rank_figure(LOSSES, BEST, [3.9, 2.0, 0.001, 0.0], [4.0, 3.0, 2.0], 4).axes
    best, losses, chosen = left.get_lines()
    np.testing.assert_array_equal(best.get_xydata(), list(BEST.items()))
    np.testing.assert_array_equal(losses.get_xydata(), list(LOSSES.items()))
    np.testing.assert_array_equal(chosen.get_xydata(), [(4, 0.1)])
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4", "8"]


def test_singular_values_below_a_thousandth_are_left_out():
    _, right = low_rank_figure(LOSSES, BEST, [3.9, 2.0, 0.001, 0.0], [4.0, 3.0, 2.0], 4).axes
    assert [bar.get_height() for bar in right.patches] == [4.0, 3.0, 2.0]
    (learnt,) = right.get_lines()
    np.testing.assert_array_equal(learnt.get_xydata(), [(1, 3.9), (2, 2.0)])
    assert learnt.get_label() == "s B A, r = 4"


def test_each_scale_has_a_panel_and_each_rank_a_line():
    curves = {"a / r": {8: {0.1: 3.0, 0.2: 2.0}, 16: {0.1: 3.1}}, "a": {8: {0.1: 4.0}, 16: {0.1: 5.0, 0.2: 1.0}}}
    panels = scaling_figure(curves).axes
    for axes, (scale, ranks) in zip(panels, curves.items(), strict=True):
        assert axes.get_title(loc="left") == scale
        for line, (rank, curve) in zip(axes.get_lines(), ranks.items(), strict=True):
            assert line.get_label() == f"r = {rank}"
            np.testing.assert_array_equal(line.get_xydata(), list(curve.items()))
