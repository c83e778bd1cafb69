"""Attention against its definition, whatever the tiles, windows and caps."""

import numpy as np
import pytest
from gradcheck import draw
from hypothesis import given
from hypothesis import strategies as st
from mistakes import attention_backward_by_definition

from refqlora import attention
from refqlora.attention import attention_backward, attention_forward


def attention_by_definition(q, k, v, scale=None, window=None, softcap=None):
    """The lines of attention_forward's docstring, for each batch element and head."""
    y, (batch, t, heads, size), (s, groups) = np.empty_like(q), q.shape, k.shape[1:3]
    query, key = s - t + np.arange(t)[:, None], np.arange(s)
    seen = (key <= query) & (key > query - (window or s + t))  # (T, S)
    for b in range(batch):
        for head in range(heads):
            kv = head // (heads // groups)
            scores = q[b, :, head] @ k[b, :, kv].T * (scale or 1 / np.sqrt(size))
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            scores = np.where(seen, scores, -np.inf)
            y[b, :, head] = np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None]) @ v[b, :, kv]
    return y


@given(
    batch=st.integers(1, 3),
    t=st.integers(1, 9),
    earlier=st.integers(0, 5),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.integers(1, 5),
    tile=st.integers(1, 10),
    scale=st.sampled_from([None, 0.7]),
    window=st.none() | st.integers(1, 15),
    softcap=st.sampled_from([None, 1.5]),
)
def test_attention_is_its_definition_whatever_the_tiles(
    batch, t, earlier, groups, per_group, size, tile, scale, window, softcap
):
    q, dy = draw(batch, t, groups * per_group, size), draw(batch, t, groups * per_group, size, seed=1)
    k, v = draw(batch, t + earlier, groups, size, seed=2), draw(batch, t + earlier, groups, size, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", tile)
        y, cache = attention_forward(q, k, v, scale=scale, window=window, softcap=softcap)
        grads = attention_backward(dy, cache)
    np.testing.assert_allclose(y, attention_by_definition(q, k, v, scale, window, softcap), rtol=1e-12, atol=1e-13)
    for grad, expected in zip(grads, attention_backward_by_definition(dy, cache), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 9, attention.TILE, attention.TILE + 4])
def test_attention_past_the_real_tile(window):
    t = attention.TILE + 5
    q, k, v, dy = (
        draw(1, t, 4, 6),
        draw(1, t + 3, 2, 6),
        draw(1, t + 3, 2, 6, seed=1),
        draw(1, t, 4, 6, seed=1),
    )
    y, cache = attention_forward(q, k, v, window=window)
    np.testing.assert_allclose(y, attention_by_definition(q, k, v, window=window), rtol=1e-11, atol=1e-13)
    for grad, expected in zip(attention_backward(dy, cache), attention_backward_by_definition(dy, cache), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-12)


def test_no_query_sees_a_later_key(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 3)
    q, k, v = draw(2, 7, 4, 6), draw(2, 9, 2, 6), draw(2, 9, 2, 6, seed=1)
    y, _ = attention_forward(q, k, v)
    for t in range(7):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, t + 3 :], other_v[:, t + 3 :] = 1e3, np.inf  # query t stands at position 9 - 7 + t
        with np.errstate(invalid="ignore"):  # 0 * inf, in rows that are not looked at
            changed, _ = attention_forward(q, other_k, v)
        assert np.array_equal(changed[:, : t + 1], y[:, : t + 1])
        if t < 6:
            assert not np.allclose(changed[:, t + 1 :], y[:, t + 1 :])


def test_no_query_sees_a_key_before_its_window_and_tiles_skip_what_none_sees(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 2)
    q, k, v, dy = draw(2, 7, 4, 6), draw(2, 9, 2, 6), draw(2, 9, 2, 6, seed=1), draw(2, 7, 4, 6, seed=1)
    y, _ = attention_forward(q, k, v, window=3)
    for t in range(7):  # query t stands at position t + 2 and sees t, t + 1 and t + 2
        other_k, other_v = k.copy(), v.copy()
        other_k[:, :t], other_v[:, :t] = 1e3, 1e3
        changed, _ = attention_forward(q, other_k, other_v, window=3)
        assert np.array_equal(changed[:, t:], y[:, t:])
        if t:
            assert not np.allclose(changed[:, t - 1], y[:, t - 1])
    k[:, :5] = v[:, :5] = np.nan  # what a tile does not look at cannot spoil it
    y, cache = attention_forward(q, k, v, window=2)
    assert np.isfinite(y[:, 4:]).all()  # the tile of the queries 4 and 5, at the positions 6 and 7, begins at key 5
    grads = attention_backward(np.where(np.isnan(y), 0, dy), cache)
    assert np.isfinite(grads[0][:, 4:]).all()


def test_attention_scores_may_be_huge():
    q, k, v = (1e3 * draw(2, 5, 4, 6)).astype(np.float32), draw(2, 5, 2, 6), draw(2, 5, 2, 6, seed=1)
    y, cache = attention_forward(q, k.astype(np.float32), v.astype(np.float32))
    np.testing.assert_allclose(y, attention_by_definition(q.astype(np.float64), k, v), atol=1e-3)
    assert all(np.isfinite(grad).all() for grad in attention_backward(np.ones_like(q), cache))
