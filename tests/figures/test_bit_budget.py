"""The bars of the bit budget have the lengths of its parts."""

import numpy as np
import pytest

import refqlora as rq
from refqlora.figures.bit_budget import ONE, TWO, bit_budget_figure, budgets


def test_the_budgets_are_those_of_the_arrays():
    w = np.ones((64, 256), np.float32)
    held = budgets(w.size)
    assert held["float32"] == {"weights": 8 * w.itemsize}
    assert sum(held[ONE].values()) == rq.quantize(w, double_quant=False).bits_per_param
    assert sum(held[TWO].values()) == rq.quantize(w).bits_per_param + 32 / w.size


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_the_bars_are_to_scale(block_size):
    held = budgets(block_size=block_size)
    figure = bit_budget_figure(held)
    whole, zoom = figure.axes
    for axes, names in ((whole, list(held)), (zoom, [ONE, TWO])):
        drawn = [(patch.get_y(), patch.get_x(), patch.get_width()) for patch in axes.patches]
        for i, name in enumerate(names):
            row = sorted((x, width) for y, x, width in drawn if abs(y + 0.31 - i) < 1e-9)
            np.testing.assert_allclose([width for _, width in row], list(held[name].values()), rtol=1e-6)
            np.testing.assert_allclose([x for x, _ in row], np.cumsum([0, *held[name].values()])[:-1], rtol=1e-12)
        totals = [text.get_text().strip() for text in axes.texts if text.get_position()[0] != 4][: len(names)]
        assert totals == [f"{sum(parts.values()):.4g}" for parts in (held[name] for name in names)]
    assert whole.get_xlim()[0] == 0  # to scale, from zero
    assert zoom.get_xlim()[0] == 4


def test_the_parts_of_the_two_levels_are_named():
    _, zoom = bit_budget_figure(budgets()).axes
    texts = [text.get_text().strip() for text in zoom.texts]
    assert texts[2:] == [
        "float32 constants 0.5",
        "8-bit constants 0.125",
        "second-level constants 0.00195",
        "mean 0.00000191",
    ]
