"""The picture of the error against the bits shows what was computed, for normal weights and real ones."""

import numpy as np

from refqlora.figures.error_bits import error_bits_figure
from refqlora.quantization_error import error_by_bits


def test_lines_for_normal_weights_and_marks_for_real_ones():
    rng = np.random.default_rng(0)
    normal, real = error_by_bits(rng.standard_normal(6400)), error_by_bits(rng.laplace(size=6400))
    axes = error_bits_figure(normal, real).axes[0]
    lines = axes.get_lines()
    for i, family in enumerate(normal):
        np.testing.assert_array_equal(lines[2 * i].get_xydata(), list(normal[family].items()))
        np.testing.assert_array_equal(lines[2 * i + 1].get_xydata(), list(real[family].items()))
        assert lines[2 * i + 1].get_fillstyle() == "none"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*normal, "the same, real weights"]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < min(normal["integers"].values()) < max(normal["integers"].values()) < high


def test_the_title_is_true():
    errors = error_by_bits(np.random.default_rng(1).standard_normal(64 * 1000))
    assert errors["NormalFloat"][4] == min(family[4] for family in errors.values())
    assert all(errors["NormalFloat"][bits] > errors["integers"][bits] for bits in (6, 7, 8))
