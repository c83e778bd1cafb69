"""Each operation against its definition, its gradients against central differences, and planted mistakes."""

import gradcheck
import numpy as np
import pytest
import scipy.stats
from gradcheck import CAUGHT, TOLERANCE, draw, largest_error, of_operation, operation_checks
from mistakes import MISTAKES, planted

from refqlora import functional
from refqlora.functional import (
    cross_entropy,
    embedding_backward,
    embedding_forward,
    geglu_backward,
    geglu_forward,
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    softcap_backward,
    softcap_forward,
    swiglu_backward,
    swiglu_forward,
)

# ---- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", operation_checks(), ids=lambda check: check.name)
def test_gradients_equal_central_differences(check):
    errors = check.errors()
    assert errors
    assert all(error < TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if of_operation(mistake)])
def test_a_planted_mistake_is_caught(mistake):
    assert largest_error(of_operation(mistake), mistake) > CAUGHT
    assert largest_error(of_operation(mistake)) < TOLERANCE  # and with it gone, all is well again


def test_the_check_itself():
    x = draw(3, 5)
    before, some = x.copy(), np.array([14, 2, 7])
    numeric = gradcheck.central_difference(lambda: float(np.sin(x).sum()), x, some)
    assert np.array_equal(x, before)
    exact = np.cos(x).reshape(-1)[some]
    assert gradcheck.relative_error(numeric, exact) < 1e-11
    assert gradcheck.relative_error(numeric, exact * (1 + 1e-5)) == pytest.approx(1e-5, rel=1e-3)
    assert not gradcheck.relative_error(numeric, exact * np.nan) < TOLERANCE
    with pytest.raises(AssertionError, match="zero everywhere"):
        gradcheck.relative_error(0 * numeric, 0 * exact)

    def square(x):  # whose backward here has the wrong shape, right or wrong values
        return x**2, lambda dy: {"x": (2 * x * dy).T}

    assert gradcheck.Check("square", {"x": x}, square).errors() == {"x": np.inf}
    with planted("swiglu: dgate and dup exchanged"):
        assert swiglu_backward is not functional.swiglu_backward
    assert swiglu_backward is functional.swiglu_backward


# ---- embedding ---------------------------------------------------------------------------------------------


def test_embedding_looks_rows_up_and_adds_the_gradients_of_repeats():
    weight, tokens = draw(5, 3), np.array([[4, 0, 4], [4, 1, 1]])
    y, cache = embedding_forward(tokens, weight)
    assert all(np.array_equal(y[b, t], weight[tokens[b, t]]) for b in range(2) for t in range(3))
    dy = draw(2, 3, 3)
    expected = np.stack([dy[0, 1], dy[1, 1] + dy[1, 2], 0 * dy[0, 0], 0 * dy[0, 0], dy[0, 0] + dy[0, 2] + dy[1, 0]])
    np.testing.assert_allclose(embedding_backward(dy, cache), expected, rtol=1e-15)


# ---- RMSNorm -----------------------------------------------------------------------------------------------


def test_rmsnorm_is_its_definition():
    x, weight, eps = draw(3, 7, 10), draw(10), 0.25
    y, _ = rmsnorm_forward(x, weight, eps)
    np.testing.assert_allclose(y, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight, rtol=1e-14)


def test_rmsnorm_of_zeros_is_zero():
    x, weight = np.zeros((2, 4), np.float32), np.ones(4, np.float32)
    y, cache = rmsnorm_forward(x, weight, 1e-6)
    dx, dweight = rmsnorm_backward(np.ones_like(x), cache)
    assert (y == 0).all()
    assert (dweight == 0).all()
    np.testing.assert_allclose(dx, 1e3, rtol=1e-6)  # 1 / sqrt(eps)


# ---- LayerNorm ---------------------------------------------------------------------------------------------


def test_layernorm_is_its_definition():
    x, weight, bias, eps = 3 + draw(3, 7, 10), draw(10), draw(10, seed=1), 0.25
    y, _ = layernorm_forward(x, weight, bias, eps)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + eps) * weight + bias, rtol=1e-12, atol=1e-14)


def test_layernorm_of_equal_elements_is_the_bias():
    x, weight, bias = np.full((2, 4), 7, np.float32), np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    y, cache = layernorm_forward(x, weight, bias, 1e-6)
    assert np.array_equal(y, np.broadcast_to(bias, (2, 4)))
    dx, dweight, dbias = layernorm_backward(np.ones_like(x), cache)
    assert (dx == 0).all()  # a shift of the whole row changes nothing
    assert (dweight == 0).all()
    assert (dbias == 2).all()


# ---- SwiGLU ------------------------------------------------------------------------------------------------


def test_swiglu_is_its_definition():
    gate, up = draw(3, 7, 13), draw(3, 7, 13, seed=1)
    y, _ = swiglu_forward(gate, up)
    np.testing.assert_allclose(y, gate * (1 / (1 + np.exp(-gate))) * up, rtol=1e-14)


def test_swiglu_of_huge_gates_is_exact_and_warns_of_nothing():
    gate = np.array([-1e4, -200, 0, 200, 1e4], np.float32)
    up, dy = np.full_like(gate, 3), np.full_like(gate, 2)
    y, cache = swiglu_forward(gate, up)
    dgate, dup = swiglu_backward(dy, cache)
    assert y.tolist() == [0, 0, 0, 600, 3e4]
    assert dgate.tolist() == [0, 0, 3, 6, 6]
    assert dup.tolist() == [0, 0, 0, 400, 2e4]


# ---- GELU and GeGLU ----------------------------------------------------------------------------------------


def gelu_by_definition(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_gelu_is_its_definition():
    x = 3 * draw(3, 7, 13)
    y, _ = gelu_forward(x)
    np.testing.assert_allclose(y, gelu_by_definition(x), rtol=1e-10, atol=1e-15)
    assert abs(y - x * scipy.stats.norm.cdf(x)).max() < 5e-4  # the tanh stands for the normal distribution


def test_geglu_is_its_definition():
    gate, up = draw(3, 7, 13), draw(3, 7, 13, seed=1)
    np.testing.assert_allclose(geglu_forward(gate, up)[0], gelu_by_definition(gate) * up, rtol=1e-12, atol=1e-15)


def test_gelu_and_geglu_of_huge_inputs_are_exact_and_warn_of_nothing():
    x = np.array([-1e4, -200, 0, 200, 1e4], np.float32)
    up, dy = np.full_like(x, 3), np.full_like(x, 2)
    y, cache = gelu_forward(x)
    assert y.tolist() == [0, 0, 0, 200, 1e4]
    assert gelu_backward(dy, cache).tolist() == [0, 0, 1, 2, 2]
    y, cache = geglu_forward(x, up)
    dgate, dup = geglu_backward(dy, cache)
    assert y.tolist() == [0, 0, 0, 600, 3e4]
    assert dgate.tolist() == [0, 0, 3, 6, 6]
    assert dup.tolist() == [0, 0, 0, 400, 2e4]


# ---- softcap -----------------------------------------------------------------------------------------------


def test_softcap_is_its_definition_and_stays_within_the_cap():
    x = np.concatenate([10 * draw(3, 7), np.full((1, 7), 1e30)])
    y, cache = softcap_forward(x, 2.5)
    np.testing.assert_allclose(y, 2.5 * np.tanh(x / 2.5), rtol=1e-14)
    assert abs(y).max() == 2.5
    assert (softcap_backward(np.ones_like(x), cache)[-1] == 0).all()
    np.testing.assert_allclose(softcap_forward(x[:1] / 1e6, 2.5)[0], x[:1] / 1e6, rtol=1e-9)  # small ones pass


# ---- cross entropy -----------------------------------------------------------------------------------------


def cross_entropy_by_definition(logits, labels, denominator=None):
    """The definition, a row at a time."""
    counted = [at for at in np.ndindex(labels.shape) if labels[at] != -100]
    loss, dlogits = 0.0, np.zeros_like(logits)
    for at in counted:
        p = np.exp(logits[at] - np.logaddexp.reduce(logits[at]))
        loss -= np.log(p[labels[at]])
        dlogits[at] = p
        dlogits[at][labels[at]] -= 1
    n = denominator or len(counted)
    return loss / n, dlogits / n


@pytest.mark.parametrize("shape", [(3, 7, 11), (5, 11), (11,), (5, 50_000), (2, 2**17 + 1)])
@pytest.mark.parametrize("denominator", [None, 2.5])
def test_cross_entropy_is_its_definition(shape, denominator):
    """The last two shapes take several steps: of two rows, where the last step has one, and of one row."""
    logits, labels = draw(*shape), np.random.default_rng(0).integers(0, shape[-1], shape[:-1])
    if len(shape) == 3:
        labels[0, :4] = labels[2, 6] = -100
    before = logits.copy()
    loss, dlogits = cross_entropy(logits, labels, denominator)
    expected, dexpected = cross_entropy_by_definition(logits, labels, denominator)
    assert isinstance(loss, float)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(dlogits, dexpected, rtol=1e-11, atol=1e-16)
    assert np.array_equal(logits, before)


def test_micro_batches_add_up_with_a_common_denominator():
    logits, labels = draw(4, 7, 11), np.random.default_rng(0).integers(0, 11, (4, 7))
    labels[:2, 1:] = -100  # the first half counts 2 labels, the second 14
    loss, dlogits = cross_entropy(logits, labels)
    halves = [cross_entropy(logits[i : i + 2], labels[i : i + 2], denominator=16) for i in (0, 2)]
    assert sum(half[0] for half in halves) == pytest.approx(loss, rel=1e-14)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves]), dlogits, rtol=1e-14)
    own = [cross_entropy(logits[i : i + 2], labels[i : i + 2])[0] for i in (0, 2)]
    assert np.mean(own) != pytest.approx(loss, rel=1e-2)  # the classic mistake


def test_cross_entropy_of_huge_logits():
    logits = np.array([[3e38, -3e38, 0], [1e4, 0, -1e4]], np.float32)
    with np.errstate(over="ignore"):
        loss, dlogits = cross_entropy(logits[1:], np.array([1]))
        certain, dcertain = cross_entropy(logits[:1] / 2, np.array([0]))
    assert loss == 1e4
    assert dlogits.tolist() == [[1, -1, 0]]
    assert certain == 0
    assert (dcertain == 0).all()


def test_logits_may_lie_in_memory_in_any_order():
    logits, labels = draw(3, 7, 11), np.random.default_rng(0).integers(0, 11, (3, 7))
    expected = cross_entropy(logits, labels)
    turned = np.ascontiguousarray(logits.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert not turned.flags.c_contiguous
    loss, dlogits = cross_entropy(turned, labels)
    assert loss == expected[0]
    assert np.array_equal(dlogits, expected[1])


@pytest.mark.parametrize(
    ("labels", "denominator", "message"),
    [
        (np.zeros((3, 6), int), None, r"labels: expected integers of shape \(3, 7\), .* got int64 of shape \(3, 6\)"),
        (np.full((3, 7), 11), None, r"labels: expected -100 or a token below 11, got 11 at \(0, 0\)"),
        (np.where(np.arange(21).reshape(3, 7) == 9, -1, 0), None, r"got -1 at \(1, 2\)"),
        (np.zeros((3, 7)), None, r"labels: expected integers of shape \(3, 7\), .* got float64"),
        (None, None, r"labels: expected integers .* got object of shape \(\)"),
        (np.full((3, 7), -100), None, "no label counts"),
        (np.zeros((3, 7), int), 0, "no label counts"),
    ],
)
def test_labels_that_cannot_be(labels, denominator, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(draw(3, 7, 11), labels, denominator)


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", operation_checks(), ids=lambda check: check.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_everything_stays_in_the_dtype_of_the_inputs_and_leaves_them_alone(check, dtype):
    inputs = {
        name: x.astype(dtype) if getattr(x, "dtype", None) == np.float64 else x for name, x in check.inputs.items()
    }
    before = {name: np.copy(x) for name, x in inputs.items()}
    y, backward = check.run(**inputs)
    dy = np.ones_like(y) if y.ndim else dtype(1)
    grads = backward(dy)
    assert y.ndim == 0 or y.dtype == dtype
    assert {name: grad.dtype for name, grad in grads.items()} == dict.fromkeys(grads, np.dtype(dtype))
    assert all(np.array_equal(inputs[name], x) for name, x in before.items())
    assert y.ndim == 0 or (dy == 1).all()
