"""The linear with its adapter: definition, dropout, quantised weights, initialisation, merging, targets.

Its gradients and the mistakes planted in them are checked in test_functional, with the other operations.
"""

import ml_dtypes
import numpy as np
import pytest
from gradcheck import B, D, F, T, draw, r, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from refqlora.lora import LoRA, dense, init_lora, linear_backward, linear_forward, merge
from refqlora.lora_config import LoraConfig
from refqlora.quantize import dequantize, quantize


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


# ---- the config and its targets ----------------------------------------------------------------------------


def test_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, rslora=True).scale == 8
    assert LoraConfig(rank=np.int64(3), alpha=np.float32(1)).scale == pytest.approx(1 / 3)
    assert type(LoraConfig(rank=4, alpha=np.float32(1)).scale) is float  # a NumPy scalar would widen float32


LINEARS = tiny_config().linears()
KINDS = [name.rsplit(".", 1)[1] for name in LINEARS[:7]]


def in_every_layer(*kinds):
    return [name for name in LINEARS if name.rsplit(".", 1)[1] in kinds]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEARS),
        (("q_proj", "v_proj"), in_every_layer("q_proj", "v_proj")),
        (["v_proj", "q_proj"], in_every_layer("q_proj", "v_proj")),
        (("self_attn.k_proj",), in_every_layer("k_proj")),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (("1.mlp.up_proj", "o_proj"), [*in_every_layer("o_proj"), "model.layers.1.mlp.up_proj"]),
        (r".*\.(q|down)_proj", in_every_layer("q_proj", "down_proj")),
        (r"model\.layers\.0\..*", LINEARS[:7]),
    ],
)
def test_targets(targets, expected):
    assert sorted(LoraConfig(targets=targets).matches(LINEARS)) == sorted(expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "query"), f"target query matches no linear; there are: {', '.join(sorted(KINDS))}"),
        (("_proj",), "target _proj matches no linear"),  # a suffix begins after a dot
        (("proj",), "target proj matches no linear"),
        (("lm_head",), "target lm_head matches no linear"),
        ((), r"target \(\) matches no linear"),
        (r".*\.q", "a regular expression for the whole name, matches no linear"),
        ("q_proj", "target 'q_proj', a regular expression for the whole name, matches no linear"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(targets=targets).matches(LINEARS)


@given(st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
def test_a_list_is_the_regular_expression_of_its_alternatives(kinds):
    pattern = rf".*\.({'|'.join(kinds)})"
    assert LoraConfig(targets=tuple(kinds)).matches(LINEARS) == LoraConfig(targets=pattern).matches(LINEARS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of 1 or more, not 0"),
        ({"rank": 2.0}, "rank .* not 2.0"),
        ({"rank": True}, "rank .* not True"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": float("nan")}, "alpha .* not nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout .* not -0.1"),
        ({"dropout": float("nan")}, "dropout .* not nan"),
        ({"rslora": "yes"}, "rslora must be true or false, not 'yes'"),
        ({"targets": "*_proj"}, r"target '\*_proj' is no regular expression"),
        ({"targets": ("q_proj", 3)}, "targets must be a string or names"),
    ],
)
def test_unusable_configs(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)
