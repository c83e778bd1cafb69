"""The linear with its adapter: definition, dropout, quantised weights, DoRA, initialisation, merging.

Its gradients and the mistakes planted in them are checked in test_functional, with the other operations.
"""

import ml_dtypes
import numpy as np
import pytest
from gradcheck import B, D, F, T, central_difference, draw, r, relative_error

from refqlora.adapters import init_lora, residual
from refqlora.lora import LoRA, dense, linear_backward, linear_forward, merge, row_norms
from refqlora.quantization import dequantize, quantize


def adapter(scale=1.7, dropout=0.0, dtype=np.float64):
    return LoRA(draw(r, D).astype(dtype), draw(F, r).astype(dtype), scale, dropout)


# ---- the linear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, T, D), (T, D), (D,)])
def test_forward_is_its_definition(shape):
    x, w, bias, lora = draw(*shape), draw(F, D), draw(F), adapter()
    expected = np.einsum("...i,oi->...o", x, w)
    np.testing.assert_allclose(linear_forward(x, w)[0], expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(linear_forward(x, w, bias)[0], expected + bias, rtol=1e-13, atol=1e-14)
    expected = expected + bias + 1.7 * np.einsum("...i,ri,or->...o", x, lora.A, lora.B)
    np.testing.assert_allclose(linear_forward(x, w, bias, lora)[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_only_what_is_trained_has_a_gradient(trained, bias, with_lora):
    _, cache = linear_forward(draw(B, T, D), draw(F, D), draw(F) if bias else None, adapter() if with_lora else None)
    _, grads = linear_backward(draw(B, T, F), cache, train_weight=trained)
    wanted = {"lora_A.weight": (r, D), "lora_B.weight": (F, r)} if with_lora else {}
    if trained:
        wanted |= {"weight": (F, D)} | ({"bias": (F,)} if bias else {})
    assert {name: grad.shape for name, grad in grads.items()} == wanted


def test_b_of_zero_changes_nothing():
    x, w = draw(B, T, D).astype(np.float32), draw(F, D).astype(np.float32)
    x[0] = 0  # zeros of either sign stay equal
    lora = LoRA(*init_lora(w, r, np.random.default_rng(0), np.float32), scale=2.0)
    base, _ = linear_forward(x, w)
    y, cache = linear_forward(x, w, None, lora)
    assert np.array_equal(y, base)
    _, grads = linear_backward(np.ones_like(y), cache)
    assert (grads["lora_A.weight"] == 0).all()  # at the first step only B learns
    assert grads["lora_B.weight"].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_quantised_weight_acts_as_its_dequantised_values_to_the_bit(dtype):
    x, dy, q = (
        draw(B, T, D).astype(dtype),
        draw(B, T, F).astype(dtype),
        quantize(draw(F, D).astype(np.float32)),
    )
    results = []
    for weight in (q, dequantize(q, dtype)):
        y, cache = linear_forward(x, weight, None, adapter(dtype=dtype))
        dx, grads = linear_backward(dy, cache)
        results.append([y, dx, *grads.values()])
    assert all(a.dtype == dtype and np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_dense_gives_the_array_itself_or_a_cast():
    w = draw(F, D).astype(np.float32)
    assert dense(w, np.float32) is w
    assert dense(w.astype(ml_dtypes.bfloat16), np.float32).dtype == np.float32
    q = quantize(w)
    assert np.array_equal(dense(q, np.float64), dequantize(q).astype(np.float64))


# ---- dropout -----------------------------------------------------------------------------------------------


def test_dropout_zeroes_a_share_of_the_adapters_input_and_scales_up_the_rest():
    n, p, rng = 300, 0.3, np.random.default_rng(0)
    x, w = np.ones((n, n)), np.zeros((n, n))
    lora = LoRA(np.eye(n), np.eye(n), scale=1.0, dropout=p)  # y is the adapter's input, after dropout
    y, _ = linear_forward(x, w, None, lora, rng)
    assert set(np.unique(y)) == {0.0, 1 / (1 - p)}
    assert abs((y == 0).mean() - p) < 4 * np.sqrt(p * (1 - p) / n**2)
    again, _ = linear_forward(x, w, None, lora, rng)
    assert not np.array_equal(y, again)


def test_dropout_leaves_the_base_alone_and_is_off_without_a_generator():
    x, w, rng = draw(B, T, D), draw(F, D), np.random.default_rng(0)
    plain = adapter()
    y, _ = linear_forward(x, w, None, plain)
    assert np.array_equal(linear_forward(x, w, None, plain._replace(dropout=0.4))[0], y)
    assert np.array_equal(linear_forward(x, w, None, plain, rng)[0], y)
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn for a rate of 0
    nothing = plain._replace(B=np.zeros_like(plain.B), dropout=0.4)
    assert np.array_equal(linear_forward(x, w, None, nothing, rng)[0], linear_forward(x, w)[0])


# ---- initialisation and merging ----------------------------------------------------------------------------


def test_a_is_uniform_and_b_zero():
    w = np.empty((300, 400), np.float32)
    a, b = init_lora(w, 50, np.random.default_rng(0), np.float32)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((50, 400), (300, 50), np.float32, np.float32)
    assert (b == 0).all()
    bound = 1 / 20  # 1 / sqrt(in)
    assert 0.999 * bound < abs(a).max() <= bound
    counts, _ = np.histogram(a, bins=10, range=(-bound, bound))
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert np.array_equal(init_lora(w, 50, np.random.default_rng(0), np.float32)[0], a)
    assert not np.array_equal(init_lora(w, 50, np.random.default_rng(1), np.float32)[0], a)


def test_merged_is_the_sum_and_gives_the_same_outputs():
    x, w, lora = draw(B, T, D), draw(F, D), adapter()
    before = w.copy()
    merged = merge(w, lora)
    np.testing.assert_allclose(merged, w + 1.7 * np.einsum("or,ri->oi", lora.B, lora.A), rtol=1e-12, atol=1e-14)
    assert np.array_equal(w, before)
    y, expected = linear_forward(x, merged)[0], linear_forward(x, w, None, lora)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)
    assert np.array_equal(merge(w, lora._replace(B=0 * lora.B)), w)


def test_merging_into_a_quantised_weight_adds_to_its_dequantised_values():
    q, lora = quantize(draw(F, D)), adapter(dtype=np.float32)
    merged = merge(q, lora)
    assert merged.dtype == np.float32
    assert np.array_equal(merged, merge(dequantize(q), lora))
    assert not np.array_equal(merged, dequantize(q))


def test_merging_into_16_bits_rounds_once():
    w, lora = draw(F, D).astype(ml_dtypes.bfloat16), adapter(dtype=np.float32)
    merged = merge(w, lora)
    assert merged.dtype == ml_dtypes.bfloat16
    assert np.array_equal(merged, merge(w.astype(np.float32), lora).astype(ml_dtypes.bfloat16))


# ---- DoRA --------------------------------------------------------------------------------------------------


def dora(**options):
    return adapter(**options)._replace(magnitude=draw(F, seed=1) + 5)


def test_dora_is_its_definition():
    """Liu et al. 2024, eq. 5: y = x W'^T + bias, the rows of W' being those of W + s B A brought to the lengths m."""
    x, w, bias, lora = draw(B, T, D), draw(F, D), draw(F), dora()
    changed = w + 1.7 * lora.B @ lora.A
    rescaled = changed / np.linalg.norm(changed, axis=1, keepdims=True) * lora.magnitude[:, None]
    np.testing.assert_allclose(linear_forward(x, w, bias, lora)[0], x @ rescaled.T + bias, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merge(w, lora), rescaled, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(merge(w, lora), axis=1), lora.magnitude, rtol=1e-13)


def test_doras_dropout_reaches_the_rescaling_too():
    """PEFT's way: y = x W^T + (m/norm - 1) x' W^T + m/norm s (x' A^T) B^T with the dropped x'."""
    x, w, lora = draw(T, D), draw(F, D), dora(dropout=0.4)
    keep = np.random.default_rng(0).random((T, D), np.float32) >= 0.4
    dropped, g = x * keep / 0.6, lora.magnitude / row_norms(w, lora)
    expected = x @ w.T + (g - 1) * (dropped @ w.T) + g * (1.7 * (dropped @ lora.A.T) @ lora.B.T)
    y, _ = linear_forward(x, w, None, lora, np.random.default_rng(0))
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_a_new_dora_changes_nothing():
    x, w = draw(B, T, D), draw(F, D)
    lora = LoRA(*init_lora(w, r, np.random.default_rng(0), w.dtype), scale=2.0)
    y, _ = linear_forward(x, w, None, lora._replace(magnitude=row_norms(w, lora)))
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-13, atol=1e-13)


def test_doras_norm_is_held_in_its_backward():
    """Central differences that let the norm move find another dB: the gradient checks are right to hold it."""
    x, w, lora, dy = draw(T, D), draw(F, D), dora(), draw(T, F, seed=1)
    _, grads = linear_backward(dy, linear_forward(x, w, None, lora)[1])
    numeric = central_difference(lambda: (linear_forward(x, w, None, lora)[0] * dy).sum(), lora.B, np.arange(F * r))
    assert relative_error(numeric, grads["lora_B.weight"].ravel()) > 0.1


# ---- PiSSA and OLoRA ---------------------------------------------------------------------------------------

FROM_THE_WEIGHT = ["pissa", "pissa_niter_50", "olora"]


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
@pytest.mark.parametrize("shape", [(F, D), (D, F)])
def test_residual_and_b_a_make_the_weight(init, shape):
    w = draw(*shape)
    a, b = init_lora(w, r, np.random.default_rng(0), w.dtype, init, scale=0.6)
    assert (a.shape, b.shape) == ((r, shape[1]), (shape[0], r))
    np.testing.assert_allclose(residual(w, a, b, 0.6) + 0.6 * b @ a, w, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_50"])
def test_pissa_takes_the_largest_part_of_the_weight(init):
    """The residual's singular values are the rest of W's; A and B share theirs evenly."""
    w, scale = draw(F, D), 0.6
    a, b = init_lora(w, r, np.random.default_rng(0), w.dtype, init, scale)
    values = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(residual(w, a, b, scale), compute_uv=False)
    np.testing.assert_allclose(left[: D - r], values[r:], rtol=1e-4 if "niter" in init else 1e-12)
    np.testing.assert_allclose(left[D - r :], 0, atol=1e-12)
    np.testing.assert_allclose(a @ a.T, np.diag(values[:r] / scale), atol=1e-3 if "niter" in init else 1e-12)
    np.testing.assert_allclose(b.T @ b, a @ a.T, rtol=1e-9, atol=1e-10)


def test_olora_is_the_first_part_of_the_qr():
    w = draw(F, D)
    a, b = init_lora(w, r, np.random.default_rng(0), w.dtype, "olora", 0.6)
    np.testing.assert_allclose(b.T @ b, np.eye(r), atol=1e-13)
    np.testing.assert_allclose((b @ a)[:, :r], w[:, :r], rtol=1e-12, atol=1e-13)  # the first r columns are in B A whole
    assert np.allclose(np.tril(a[:, :r], -1), 0)


def test_gaussian_a_has_std_1_over_r():
    a, b = init_lora(np.empty((300, 400), np.float32), 50, np.random.default_rng(0), np.float32, "gaussian")
    assert (b == 0).all()
    assert abs(a.std() * 50 - 1) < 5 / np.sqrt(2 * a.size)


def test_a_quantised_weight_gives_olora_a_quantised_residual():
    q = quantize(draw(128, 192).astype(np.float32), block_size=128, double_quant=False)
    a, b = init_lora(q, r, np.random.default_rng(0), np.dtype(np.float32), "olora", 2.0)
    found = residual(q, a, b, 2.0)
    assert (found.block_size, found.nested_absmax) == (128, None)
    rest = dequantize(q) - 2.0 * b @ a
    assert np.array_equal(found.packed, quantize(rest, block_size=128, double_quant=False).packed)


def test_starts_that_are_not_possible():
    with pytest.raises(ValueError, match=r"rank: expected at most 10 for pissa on shape \(13, 10\), got 11"):
        init_lora(draw(F, D), 11, np.random.default_rng(0), np.dtype(float), "pissa")
    with pytest.raises(ValueError, match="this one is quantised already: load the model dense"):
        init_lora(quantize(draw(F, D)), r, np.random.default_rng(0), np.dtype(float), "pissa")
