"""The output head: its tiles make the whole product, a 16-bit weight counts as its values, and is never cast whole.

Its gradients and the mistakes planted in them are checked in test_functional, with the other operations.
"""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from refqlora import lm_head as head
from refqlora.lora import linear_backward, linear_forward
from refqlora.quantization import dequantize, quantize

B, T, D, V = 2, 3, 8, 37


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("tile", [1, 5 * D, 37 * D, 1 << 24])
def test_the_tiles_make_the_whole_product(monkeypatch, tile):
    monkeypatch.setattr(head, "TILE", tile)
    x, weight, dlogits = draw(B, T, D), draw(V, D, seed=1), draw(B, T, V, seed=2)
    logits, cache = head.head_forward(x, weight)
    expected, linear = linear_forward(x, weight)
    np.testing.assert_allclose(logits, expected, rtol=1e-13, atol=1e-13)
    for train in (False, True):
        dx, grads = head.head_backward(dlogits, cache, train)
        dx_expected, grads_expected = linear_backward(dlogits, linear, train)
        np.testing.assert_allclose(dx, dx_expected, rtol=1e-13, atol=1e-13)
        assert grads.keys() == grads_expected.keys()
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, grads_expected[name])


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 24, 33])
def test_sixteen_bits_count_as_their_values_to_the_bit(monkeypatch, stored, dtype, rows):
    """However many tiles, the last of which is partial."""
    monkeypatch.setattr(head, "TILE", 500 * 96)
    x, weight = draw(rows, 96, dtype=dtype), draw(1300, 96, seed=1).astype(stored)
    dlogits = draw(rows, 1300, seed=2, dtype=dtype)
    (logits, cache), (wide, wide_cache) = (head.head_forward(x, w) for w in (weight, weight.astype(dtype)))
    assert logits.dtype == dtype
    np.testing.assert_array_equal(logits, wide)
    np.testing.assert_array_equal(head.head_backward(dlogits, cache)[0], head.head_backward(dlogits, wide_cache)[0])


def test_a_quantised_head_counts_as_its_dequantised_values(monkeypatch):
    q = quantize(draw(V, D, seed=1), block_size=32)
    x, dlogits = draw(B, T, D, dtype=np.float32), draw(B, T, V, seed=2, dtype=np.float32)
    (logits, cache), (wide, wide_cache) = (head.head_forward(x, w) for w in (q, dequantize(q)))
    np.testing.assert_array_equal(logits, wide)
    np.testing.assert_array_equal(head.head_backward(dlogits, cache)[0], head.head_backward(dlogits, wide_cache)[0])


def test_a_head_in_16_bits_is_not_cast_whole(monkeypatch):
    monkeypatch.setattr(head, "TILE", 1 << 16)  # 256 KiB in float32
    x, weight = draw(1, 256, dtype=np.float32), np.ones((8192, 256), ml_dtypes.bfloat16)  # 8 MiB in float32
    tracemalloc.start()
    try:
        logits, cache = head.head_forward(x, weight)
        head.head_backward(logits, cache)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
