"""NF4's picture has its values and their areas; the weights' picture is their histogram."""

import numpy as np
import pytest

import refqlora as rq
from refqlora.figures.nf4 import nf4_figure, nf4_quantiles, weights_figure


def test_equal_areas_on_each_side_of_zero():
    parts = nf4_quantiles()
    np.testing.assert_array_equal(parts["values"], rq.NF4)
    np.testing.assert_allclose(parts["quantiles"] / parts["quantiles"][-1], rq.NF4, rtol=1e-6)
    areas = parts["areas"]
    assert areas.sum() == pytest.approx(1)
    np.testing.assert_allclose(areas[[0, -1]], 1 - 0.9677083, rtol=1e-6)
    np.testing.assert_allclose(areas[1:8], 0.4677083 / 7, rtol=1e-5)
    np.testing.assert_allclose(areas[8:-1], 0.4677083 / 8, rtol=1e-5)


def test_the_picture_has_a_line_at_each_value_and_says_the_areas():
    parts = nf4_quantiles()
    axes = nf4_figure(parts).axes[0]
    upright = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    np.testing.assert_array_equal([line.get_xdata()[0] for line in upright], parts["quantiles"])
    tops = [line.get_ydata()[1] for line in upright]
    np.testing.assert_allclose(tops, np.exp(-(parts["quantiles"] ** 2) / 2) / np.sqrt(2 * np.pi))
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text.isdigit()] == [str(code) for code in range(16)]
    assert {"7 equal areas\nof 6.68 %", "8 equal areas\nof 5.85 %", "an exact zero"} < set(texts)
    assert [text for text in texts if text.startswith("3.")] == ["3.2 %", "3.2 %"]


def test_the_weights_picture_is_a_density():
    x = np.random.default_rng(0).standard_normal(200_000)
    figure = weights_figure({"by matrix": x, "twice as wide": 2 * x})
    for axes in figure.axes:
        normal, same, wide = axes.get_lines()
        assert [line.get_label() for line in (normal, same, wide)] == ["N(0, 1)", "by matrix", "twice as wide"]
        at = same.get_xdata()
        near = abs(at) < 2
        np.testing.assert_allclose(same.get_ydata()[near], normal.get_ydata()[near], rtol=0.1)
        assert np.nansum(same.get_ydata()) * (at[1] - at[0]) == pytest.approx(1, abs=1e-3)
        inside = np.mean(abs(2 * x) < 1)
        assert np.sum(wide.get_ydata()[abs(at) < 1]) * (at[1] - at[0]) == pytest.approx(inside)
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
