"""The planted mistakes are mistakes: a check with good inputs sees them, and one with weak inputs does not."""

import numpy as np
import pytest

from refqlora.attention import attention_backward, attention_forward
from refqlora.functional import rmsnorm_backward, rmsnorm_forward
from refqlora.lora import LoRA, linear_forward
from refqlora.notebooks.gradients import check_gradients
from refqlora.notebooks.mistakes import attention_by_definition, careless_test, lora_without_scale, planted

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize("mistake", planted(), ids=lambda mistake: mistake.name)
def test_good_inputs_show_it_and_weak_ones_do_not(mistake):
    assert max(check_gradients(mistake.forward, mistake.backward, **mistake.inputs).values()) > 0.1
    assert careless_test(mistake.forward, mistake.backward, **mistake.weak_inputs)


@pytest.mark.parametrize(("time", "source", "kv_heads"), [(5, 5, 3), (4, 7, 2), (3, 3, 6)])
def test_attention_without_a_mistake_is_the_engine_s(time, source, kv_heads):
    q, k, v, dy = draw(2, time, 6, 4), *draw(2, 2, source, kv_heads, 4), draw(2, time, 6, 4)
    _, cache = attention_forward(q, k, v, scale=0.7)
    for found, expected in zip(attention_by_definition(dy, cache), attention_backward(dy, cache), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_a_careless_test_passes_what_is_right_and_sees_some_of_what_is_wrong():
    def norm(x, weight):
        return rmsnorm_forward(x, weight, 1e-2)

    inputs = {"x": draw(4, 7), "weight": draw(7)}
    assert careless_test(norm, rmsnorm_backward, **inputs)
    assert not careless_test(norm, lambda dy, cache: (dy, rmsnorm_backward(dy, cache)[1]), **inputs)


def test_only_da_is_wrong_without_the_scale():
    weight = draw(7, 5)

    def linear(x, a, b):
        return linear_forward(x, weight, lora=LoRA(a, b, 1.7))

    errors = check_gradients(linear, lora_without_scale, x=draw(4, 5), A=draw(3, 5), B=draw(7, 3))
    assert errors["A"] > 0.1
    assert max(errors["x"], errors["B"]) < 1e-7
