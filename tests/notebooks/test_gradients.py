"""The differences that the walkthrough of backpropagation checks with are right, and see what is wrong."""

import gradcheck
import mistakes
import numpy as np
import pytest
from gradcheck import CAUGHT, TOLERANCE, draw
from mistakes import planted

from refqlora import attention, functional, lora
from refqlora.notebooks.gradients import FORMULAS, STEP, check_gradients, gradient_error, numeric_gradient

B, T, H, K, h, D, F, r = 2, 5, 6, 3, 4, 7, 9, 8


def attend():
    inputs = {"q": draw(B, T, H, h), "k": draw(B, T, K, h), "v": draw(B, T, K, h, seed=1)}
    return check_gradients(attention.attention_forward, lambda dy, c: attention.attention_backward(dy, c), **inputs)


def rmsnorm():
    def forward(x, weight):
        return functional.rmsnorm_forward(x, weight, 1e-2)

    return check_gradients(forward, lambda dy, c: functional.rmsnorm_backward(dy, c), x=draw(B, T, D), weight=draw(D))


def swiglu():
    inputs = {"gate": draw(B, T, F), "up": draw(B, T, F, seed=1)}
    return check_gradients(functional.swiglu_forward, lambda dy, c: functional.swiglu_backward(dy, c), **inputs)


def linear():
    weight = draw(F, D)

    def forward(x, a, b):
        return lora.linear_forward(x, weight, lora=lora.LoRA(a, b, 1.7))

    def backward(dy, cache):
        dx, grads = lora.linear_backward(dy, cache)
        return dx, grads["lora_A.weight"], grads["lora_B.weight"]

    return check_gradients(forward, backward, x=draw(B, T, D), A=draw(r, D), B=draw(F, r))


def embedding():
    tokens = np.array([[4, 0, 4], [4, 1, 1]])

    def forward(weight):
        return functional.embedding_forward(tokens, weight)

    return check_gradients(forward, lambda dy, c: functional.embedding_backward(dy, c), weight=draw(5, D))


PLANTED = {
    "attention: dq without 1/sqrt(h)": attend,
    "attention: dk without 1/sqrt(h)": attend,
    "attention: dk, dv of the group's first head only": attend,
    "attention: heads grouped by remainder": attend,
    "attention: softmax without the row sum": attend,
    "attention: no causal mask": attend,
    **dict.fromkeys(mistakes.PLANTS["rmsnorm_backward"], rmsnorm),
    **dict.fromkeys(mistakes.PLANTS["swiglu_backward"], swiglu),
    "linear: dA without the scale": linear,
    "linear: dB without the scale": linear,
    "linear: dB with the scale twice": linear,
    "linear: dx without the adapter's path": linear,
    "embedding: a repeated token overwrites": embedding,
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake):
    errors = PLANTED[mistake]
    assert max(errors().values()) < TOLERANCE
    with planted(mistake):
        assert max(errors().values()) > CAUGHT


def test_it_agrees_with_the_tests_own_differences():
    x = draw(3, 4)
    theirs = gradcheck.central_difference(lambda: float(np.sin(x).sum()), x, np.arange(x.size))
    np.testing.assert_allclose(numeric_gradient(lambda x: np.sin(x).sum(), x).reshape(-1), theirs, rtol=1e-9)


@pytest.mark.parametrize(("formula", "order"), [("one-sided", 1), ("central", 2), ("four points", 4)])
def test_what_is_left_out_is_of_the_formula_s_order(formula, order):
    assert list(FORMULAS).index(formula) == [1, 2, 4].index(order)
    x = draw(6)
    errors = [abs(numeric_gradient(lambda x: np.exp(x).sum(), x, h, formula) - np.exp(x)).max() for h in (2e-2, 1e-2)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_x_of_any_layout_is_put_back():
    x = draw(4, 6)[:, ::2].T
    before = x.copy()
    np.testing.assert_allclose(numeric_gradient(lambda x: (x**2).sum(), x), 2 * x, rtol=1e-9)
    assert np.array_equal(x, before)


def test_the_function_may_reach_x_by_itself():
    params = {"w": draw(3)}
    numeric = numeric_gradient(lambda _: np.cos(params["w"]).sum(), params["w"])
    np.testing.assert_allclose(numeric, -np.sin(params["w"]), rtol=1e-8)


def test_the_precision_is_that_of_the_function():
    x = draw(50)
    errors = {}
    for dtype in (np.float32, np.float64):
        numeric = numeric_gradient(lambda x: np.sin(x).sum(), x.astype(dtype), STEP)
        assert numeric.dtype == np.float64
        errors[dtype] = abs(numeric - np.cos(x)).max()
    assert errors[np.float32] > 1e-3 > 1e-9 > errors[np.float64]


def test_the_error_is_relative_and_the_largest():
    numeric = np.array([[3.0, 4.0], [0.0, 0.0]])  # root mean square 2.5
    assert gradient_error(numeric, numeric) == 0
    assert gradient_error(numeric, numeric + [[0.3, 0], [0, 0]]) == pytest.approx(0.3 / 3.3)
    assert gradient_error(numeric, numeric + [[0, 0], [0, 0.1]]) == pytest.approx(0.1 / 2.5)
    assert not gradient_error(numeric, numeric * np.nan) < TOLERANCE


def test_what_checks_nothing_is_refused():
    with pytest.raises(ValueError, match=r"gradient: expected shape \(2, 3\), got \(3, 2\)"):
        gradient_error(draw(2, 3), draw(3, 2))
    with pytest.raises(ValueError, match="zero everywhere here"):
        gradient_error(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="zip"):  # a gradient is missing
        check_gradients(lambda x, y: (x * y, None), lambda dy, _: dy, x=draw(2), y=draw(2, seed=1))
