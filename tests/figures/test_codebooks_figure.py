"""A row of ticks for each codebook, and a bar for each code."""

import numpy as np
import pytest

from refqlora.codebooks import NF4, nearest
from refqlora.figures.codebooks import codebooks_figure, four_bit_codebooks, occupation_figure


def test_each_row_has_the_codebook_s_values():
    books = four_bit_codebooks()
    axes = codebooks_figure(books, 0.2121).axes[0]
    rows = axes.collections
    assert len(rows) == 2 * len(books)
    for row, (name, book) in enumerate(books.items()):
        shown = sorted(segment[0][0] for segment in rows[2 * row].get_segments())
        np.testing.assert_array_equal(shown, np.unique(book[abs(book) <= 1]))
        assert len(shown) == (15 if "float" in name or name == "int4" else 16)
        (taken,) = (segment[0][0] for segment in rows[2 * row + 1].get_segments())
        assert taken == book[nearest(np.float32([0.2121]), book)[0]]
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text.startswith("0.")] == ["0.2461", "0.2500", "0.2500", "0.1429", "0.2000"]
    assert "NF4\n16 values" in texts
    assert "the weight 0.2121" in texts


def test_a_bar_for_each_share():
    shares = {"once": np.full(16, 1 / 16), "unequal": np.bincount(nearest(NF4[5:], NF4), minlength=16) / 11}
    axes = occupation_figure(shares).axes[0]
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(2, 16)
    np.testing.assert_allclose(heights, 100 * np.array(list(shares.values())))
    places = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    np.testing.assert_allclose(np.round(places), [*range(16), *range(16)])
    assert axes.get_lines()[0].get_ydata()[0] == pytest.approx(6.25)
