"""Bars are the distances, points the losses, in the order of the list."""

import numpy as np

from refqlora.commands.compare import WAYS
from refqlora.figures.merging import NAMES, merging_figure

ROWS = {
    "none": {"loss": 3.5, "error": 1.0},
    "original": {"loss": 2.75, "error": 1.5},
    "nf4": {"loss": 2.875, "error": 0.75},
    "adapter": {"loss": 2.8125, "error": 0.0},
    "dequantised": {"loss": 2.8125, "error": 0.0},
    "bfloat16": {"loss": 2.8125, "error": 0.025},
}


def test_every_way_has_a_name():
    assert set(NAMES) == {"adapter", "none", *WAYS}


def test_the_distances_and_the_losses():
    upper, lower = merging_figure(ROWS).axes
    assert [label.get_text() for label in upper.get_yticklabels()] == list(NAMES.values())
    assert [bar.get_width() for bar in upper.patches] == [ROWS[way]["error"] for way in NAMES]
    np.testing.assert_array_equal(
        lower.collections[-1].get_offsets(), [(ROWS[way]["loss"], i) for i, way in enumerate(NAMES)]
    )
    assert [text.get_text() for text in upper.texts] == ["0.0", "0.0", "0.025", "1.5", "0.75", "1.0"]
    assert [text.get_text() for text in lower.texts] == ["2.812", "2.812", "2.812", "2.750", "2.875", "3.500"]


def test_only_the_ways_that_were_measured():
    upper, _ = merging_figure({way: ROWS[way] for way in ("adapter", "nf4", "none")}).axes
    assert [bar.get_width() for bar in upper.patches] == [0, 0.75, 1]
