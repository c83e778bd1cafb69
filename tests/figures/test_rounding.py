"""The pictures of rounding show what was measured, and the measurements are right."""

from math import fsum

import numpy as np

from refqlora.figures.rounding import (
    ORDERS,
    distances,
    orders_figure,
    planted,
    planted_figure,
    products,
    sums_in_orders,
)
from refqlora.parity.closeness import FACTOR, FLOOR


def in_float32(terms):
    total = np.float32(0)
    for term in terms:
        total += term
    return total


def test_every_order_is_the_one_it_is_called():
    terms = products(64, 20, seed=1)
    sums = sums_in_orders(terms)
    assert list(sums) == list(ORDERS)
    for i, column in enumerate(terms.T):
        assert sums["in turn"][i] == in_float32(column)
        assert sums["from the end"][i] == in_float32(column[::-1])
        assert sums["sorted first"][i] == in_float32(sorted(column))
        lanes = [in_float32(column[lane::8]) for lane in range(8)]
        halves = [lanes[lane] + lanes[lane + 1] for lane in range(0, 8, 2)]
        assert sums["in 8 lanes"][i] == (halves[0] + halves[1]) + (halves[2] + halves[3])
    exact = np.array([fsum(column) for column in terms.T])
    far = distances(sums, exact)
    assert all(0 < each.max() < 1e-5 for each in far.values())
    assert far["in turn"][3] == abs(sums["in turn"][3] - exact[3]) / abs(exact).max()


def test_the_outlines_are_the_distances():
    far = {"in turn": np.array([3e-7, 3e-7, 5e-8, 0.0]), "pairwise": np.array([1e-8])}
    axes = orders_figure(far).axes[0]
    heights = [patch.get_data().values for patch in axes.patches]
    assert [round(each.sum()) for each in heights] == [100, 100]  # the smallest are counted at the edge
    assert heights[0].max() == 50
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == list(far)


def test_a_planted_error_is_noticed_where_the_lines_cross():
    facts = planted(64, 0.1, np.logspace(-7, -2, 26))
    slope = facts.far[-1].found / facts.errors[-1]
    assert 0.05 < slope < 0.2  # the adapter's share of y
    rule = facts.noticed_from(lambda far: not (far.near and far.no_farther))
    fixed = facts.noticed_from(lambda far: far.worst >= 1e-5)
    assert facts.errors[0] < rule < fixed < facts.errors[-1]
    assert facts.noticed_from(lambda far: False) == np.inf
    axes = planted_figure(facts).axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    np.testing.assert_array_equal(lines["the kernel"], [far.found for far in facts.far])
    np.testing.assert_allclose(lines["the rule: 1.5 times that + 2⁻²⁰"], FACTOR * facts.far[0].reference + FLOOR)
    (band,) = axes.patches
    np.testing.assert_allclose([band.get_x(), band.get_x() + band.get_width()], [rule, fixed])


def test_without_an_error_the_kernel_is_right():
    (right,) = planted(256, 0.01, np.zeros(1)).far
    assert right.near
    assert right.no_farther
    assert right.found > 0
