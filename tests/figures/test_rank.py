"""The curves of ranks are the measured rows."""

import numpy as np
import pytest

from refqlora.figures.gallery import measured
from refqlora.figures.rank import rank_figure

ROWS = [
    {"method": "full", "rank": None, "trainable": 2_828_736, "new_after": 2.7},
    {"method": "LoRA", "rank": 16, "trainable": 331_776, "new_after": 2.8},
    {"method": "LoRA", "rank": 1, "trainable": 20_736, "new_after": 2.85},
    {"method": "QLoRA", "rank": 1, "trainable": 20_736, "new_after": 2.86},
    {"method": "QLoRA", "rank": 64, "trainable": 1_327_104, "new_after": 2.81},
]


def test_each_method_is_a_line_in_the_order_of_its_ranks():
    axes = rank_figure(ROWS).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["LoRA"].get_xydata(), [(1, 2.85), (16, 2.8)])
    np.testing.assert_array_equal(lines["QLoRA"].get_xydata(), [(1, 2.86), (64, 2.81)])
    full = lines["full fine-tuning: 2.8 M weights trained"]
    assert set(full.get_ydata()) == {2.7}
    assert len(lines) == 3


def test_the_trained_weights_stand_above_their_ranks():
    axes = rank_figure(ROWS).axes[0]
    (above,) = axes.child_axes
    assert axes.get_xticks().tolist() == above.get_xticks().tolist() == [1, 16, 64]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "16", "64"]
    assert [text.get_text() for text in above.get_xticklabels()] == ["21 k", "332 k", "1.3 M"]


def test_it_draws_what_compare_measured():
    rows = measured()["methods"]
    lines = {line.get_label(): line for line in rank_figure(rows).axes[0].get_lines()}
    for method in ("LoRA", "QLoRA"):
        wanted = sorted((row["rank"], row["new_after"]) for row in rows if row["method"] == method)
        assert lines[method].get_xydata().tolist() == [list(point) for point in wanted]


@pytest.mark.parametrize("full", [0, 2])
def test_full_fine_tuning_is_there_once(full):
    with pytest.raises(ValueError, match="values to unpack"):
        rank_figure(ROWS[:1] * full + ROWS[1:])
