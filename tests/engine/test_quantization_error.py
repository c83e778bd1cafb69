"""The error of quantising, against its definition."""

from dataclasses import astuple

import ml_dtypes
import numpy as np
import pytest

import refqlora as rq
from refqlora.quantization_error import Error, quantization_error


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_error_is_its_definition(dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((700, 401)).astype(dtype)  # more than a chunk, and no multiple of one
    q = rq.quantize(w)
    e = rq.dequantize(q).astype(np.float64) - w.astype(np.float64)
    found = quantization_error(w, q)
    assert found.squares == pytest.approx((e**2).sum(), rel=1e-12)
    assert found.weight_squares == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-12)
    assert found.largest == np.abs(e).max()
    assert found.relative == pytest.approx(np.sqrt((e**2).sum() / (w.astype(np.float64) ** 2).sum()), rel=1e-12)
    assert 0.08 < found.relative < 0.1  # NF4 on normal weights


def test_errors_add_up_to_that_of_both():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((8, 64)).astype(np.float32) for _ in range(2))
    parts = [quantization_error(w, rq.quantize(w, double_quant=False)) for w in (a, b)]
    both = np.concatenate([a, b])
    whole = quantization_error(both, rq.quantize(both, double_quant=False))
    assert astuple(sum(parts, Error())) == pytest.approx(astuple(whole))


def test_zeros_have_none():
    w = np.zeros((4, 64), np.float32)
    assert quantization_error(w, rq.quantize(w)).relative == 0
