"""The pictures of blocks show the errors that were computed."""

import numpy as np
import pytest

from refqlora.codebooks import NF4
from refqlora.figures.blocks import block_errors, blocks_figure, one_block_figure
from refqlora.quantization_error import error_between, outlier_damage, rounded

W = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
SIZES = [16, 64, 1024, W.size]


def test_block_errors():
    errors = block_errors(W, 30, SIZES)
    assert {name: list(by_size) for name, by_size in errors.items()} == dict.fromkeys(("plain", "other", "own"), SIZES)
    assert errors["plain"][64] == error_between(W, rounded(W)).relative
    places = range(0, W.size, W.size // 16)
    squares = np.mean([outlier_damage(W, 30, 64, at=at)[1].relative ** 2 for at in places])
    assert errors["other"][64] == pytest.approx(np.sqrt(squares), rel=1e-3)
    assert errors["own"][W.size] == errors["other"][W.size]  # one block is the whole
    assert errors["own"][64] > 5 * errors["other"][64] > 5 * errors["plain"][64]


def test_the_picture_shows_them():
    errors = block_errors(W, 30, SIZES)
    axes = blocks_figure(errors, 30).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    for name, label in (
        ("own", "with one outlier of 30: its own block"),
        ("other", "with one outlier of 30: the whole matrix"),
        ("plain", "without an outlier"),
    ):
        np.testing.assert_array_equal(lines[label].get_xydata(), list(errors[name].items()))
    low, high = axes.get_ylim()
    assert low < errors["plain"][16] < errors["own"][16] < high


@pytest.mark.parametrize(("outlier", "named"), [(2, []), (10, ["the outlier, 10"]), (-30, ["the outlier, -30"])])
def test_one_block(outlier, named):
    block = W[0, :64].copy()
    block[0] = outlier
    axes = one_block_figure(block).axes[0]
    back = rounded(block)
    weights, rings = axes.get_lines()
    np.testing.assert_array_equal(weights.get_ydata(), block)
    np.testing.assert_array_equal(rings.get_ydata(), back)
    levels, gaps = axes.collections
    np.testing.assert_allclose([segment[0][1] for segment in levels.get_segments()], NF4 * abs(block).max(), rtol=1e-6)
    np.testing.assert_array_equal([segment[:, 1] for segment in gaps.get_segments()], np.stack([block, back], axis=1))
    assert [text.get_text() for text in axes.texts] == named
    others = np.sqrt(((back - block)[1:] ** 2).sum() / (block[1:] ** 2).sum())
    assert axes.get_title(loc="left").endswith(f"the others' error is {100 * others:.1f} %")
