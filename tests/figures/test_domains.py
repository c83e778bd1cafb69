"""The matrix has every loss, its change from the base, and a shade by that change."""

import numpy as np

from refqlora.figures.domains import domains_figure

LOSSES = {
    "docstrings": {"docstrings": 2.75, "reference": 3.625},
    "none": {"docstrings": 3.5, "reference": 3.5},
    "reference": {"docstrings": 3.75, "reference": 3.0},
}


def test_the_cells():
    (axes,) = domains_figure(LOSSES).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["docstrings", "reference"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "adapters off\n(the base)", "docstrings", "reference",
    ]  # fmt: skip
    shown = {}
    for text in axes.texts:
        x, y = text.get_position()
        shown.setdefault((round(y), x), []).append(text.get_text())
    assert shown == {
        (0, 0): ["3.50"], (0, 1): ["3.50"],
        (1, 0): ["2.75", "−0.75"], (1, 1): ["3.62", "+0.12"],
        (2, 0): ["3.75", "+0.25"], (2, 1): ["3.00", "−0.50"],
    }  # fmt: skip


def test_the_shades():
    """Orange below the base's loss, white at it, blue-grey above."""
    (image,) = domains_figure(LOSSES).axes[0].images
    np.testing.assert_allclose(image.get_array(), [[0, 0], [-1, 0.25], [1 / 3, -1]])
    shades = image.to_rgba(image.get_array())
    np.testing.assert_allclose(shades[0, 0], [1, 1, 1, 1], atol=0.01)
    assert shades[1, 0, 0] > shades[1, 0, 2]  # red above blue
    assert shades[2, 0, 0] < shades[2, 0, 2]
    np.testing.assert_array_equal(shades[1, 0], shades[2, 1])  # the largest change of each column is the deepest


def test_a_base_alone():
    assert domains_figure({"none": {"a": 1.0}}).axes[0].images[0].get_array().tolist() == [[0]]
