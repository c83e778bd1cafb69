"""The figures of the walkthrough of backpropagation show the data that they are given."""

import numpy as np
import pytest

from refqlora.figures import picture
from refqlora.figures.attention_gradient import attention_gradient_figure
from refqlora.figures.differences import differences_figure

RNG = np.random.default_rng(0)
STEPS = [1e-8, 1e-6, 1e-4, 1e-2]
ERRORS = {"float64": dict(zip(STEPS, [1e-6, 1e-9, 1e-8, 1e-4], strict=True)), "float32": dict.fromkeys(STEPS, 0.5)}


@pytest.mark.parametrize("order", [1, 2])
def test_the_errors_and_the_slopes_beside_them(order):
    figure = differences_figure(
        {name: dict(reversed(curve.items())) for name, curve in ERRORS.items()}, order, "central"
    )
    axes = figure.axes[0]
    curves = [line for line in axes.lines if len(line.get_xdata()) == 4]
    for line, curve in zip(curves, ERRORS.values(), strict=True):
        assert dict(line.get_xydata().tolist()) == curve
    slopes = []
    for line in (line for line in axes.lines if line.get_linestyle() == ":"):
        x, y = np.log(line.get_xydata().T)
        slopes.append((y[-1] - y[0]) / (x[-1] - x[0]))
    assert slopes == pytest.approx([-1, order])
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert said[0] == "float64: best at h = 1e-06, error 1e-09"
    assert "central" in axes.get_title(loc="left")
    assert picture(figure, "png")


def test_the_maps_are_the_arrays():
    p, dp, ds = RNG.standard_normal((3, 5, 7))
    figure = attention_gradient_figure(p, dp, ds, "a head")
    for axes, values, name in zip(figure.axes, (p, dp, ds), ("P", "dP", "dS"), strict=True):
        (image,) = axes.images
        assert np.array_equal(image.get_array(), values)
        assert image.get_clim() == (-abs(values).max(), abs(values).max())  # zero is white
        assert axes.get_title(loc="left") == f"{name}, up to {abs(values).max():.2g}"
    assert figure.get_suptitle() == "a head"
