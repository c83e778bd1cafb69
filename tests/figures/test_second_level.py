"""The pictures of the second level show the constants, the codes in use, and the measured points."""

import numpy as np

from refqlora.figures.second_level import constants_figure, trade_figure


def test_the_constants_and_the_codes_in_use():
    book = np.array([-1, -0.5, 0, 0.5, 1], np.float32)
    figure = constants_figure({"a": np.array([0.4, 0.6, 1], np.float32), "b": np.array([-1, 0], np.float32)}, book)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a: 2 of 5 codes in use", "b: 2 of 5 codes in use"]
    for axes, constants, used in zip(figure.axes, (3, 2), ([0.5, 1], [-1, 0]), strict=True):
        assert sum(patch.get_height() for patch in axes.patches) == constants
        every, chosen = ([line[0, 0] for line in lines.get_segments()] for lines in axes.collections)
        np.testing.assert_array_equal(every, book)
        np.testing.assert_array_equal(chosen, used)


def test_the_trade_shows_each_point():
    curves = {"one": [(32, 5.0, 0.087), (64, 4.5, 0.092)], "two": [(32, 4.25, 0.088), (64, 4.127, 0.092)]}
    axes = trade_figure(curves).axes[0]
    lines, rings = axes.get_lines()[0::2], axes.get_lines()[1::2]
    for (name, points), line, ring in zip(curves.items(), lines, rings, strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), [point[1:] for point in points])
        np.testing.assert_array_equal(ring.get_xydata(), [points[1][1:]])
    assert [text.get_text() for text in axes.texts] == ["32", "64"]
