"""Adapters combined: their changes add up."""

import numpy as np
import pytest
from spoil import TOKENS, new_model, with_adapter


def changes(model, name):
    """s B A of every linear."""
    loras = {linear: model.adapters[name].lora(linear) for linear in model.config.linears()}
    return {linear: lora.scale * lora.B @ lora.A for linear, lora in loras.items() if lora is not None}


def two_adapters():
    model = new_model()
    for seed, (name, options) in enumerate(
        {
            "a": {"rank": 5, "alpha": 7, "targets": ("q_proj", "up_proj"), "rank_pattern": {"q_proj": 2}},
            "b": {"rank": 3, "alpha": 9, "targets": ("q_proj", "v_proj"), "rslora": True},
        }.items()
    ):
        model.add_adapter(name, **options)
        for p in model.trainable().values():
            p[...] = np.random.default_rng(seed).standard_normal(p.shape)
    return model


@pytest.mark.parametrize(("method", "rank", "expected"), [("cat", None, 8), ("svd", 8, 8), ("svd", 20, 20)])
def test_the_changes_add_up(method, rank, expected):
    """rsLoRA and ranks of a pattern among them."""
    model = two_adapters()
    parts = [changes(model, name) for name in "ab"]
    model.combine_adapters({"a": 0.7, "b": -1.5}, "c", method, rank)
    assert model.active == "c"
    assert (model.adapters["c"].config.rank, model.adapters["c"].config.scale) == (expected, 1)
    found = changes(model, "c")
    assert found.keys() == parts[0].keys() | parts[1].keys()
    for linear, change in found.items():
        wanted = 0.7 * parts[0].get(linear, 0) - 1.5 * parts[1].get(linear, 0)
        np.testing.assert_allclose(change, wanted, atol=2e-6 * abs(wanted).max())


def test_svd_is_the_best_of_its_rank():
    model = two_adapters()
    parts = [changes(model, name) for name in "ab"]
    model.combine_adapters({"a": 1, "b": 1}, "c", "svd", 2)
    q = "model.layers.0.self_attn.q_proj"
    wanted = parts[0][q] + parts[1][q]
    values = np.linalg.svd(wanted, compute_uv=False)
    assert np.linalg.norm(changes(model, "c")[q] - wanted) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)


def test_linear_is_exact_for_one_and_far_off_for_two():
    model = new_model()
    for seed in (0, 1):
        model.add_adapter(str(seed), rank=5, alpha=7 + seed, targets=("q_proj",))
        for p in model.trainable().values():
            p[...] = np.random.default_rng(seed).standard_normal(p.shape)
    model.combine_adapters({"0": -0.5}, "half", "linear")
    model.combine_adapters({"0": 0.5, "1": 0.5}, "both", "linear")
    one, two, half, both = (changes(model, name) for name in ("0", "1", "half", "both"))
    for linear in one:
        np.testing.assert_allclose(half[linear], -0.5 * one[linear], rtol=1e-4, atol=1e-5)
        exact = 0.5 * (one[linear] + two[linear])
        assert np.linalg.norm(both[linear] - exact) > 0.5 * np.linalg.norm(exact)


def test_pissa_adapters_add_up_as_the_lora_that_they_are():
    model = with_adapter(new_model(), init="pissa")
    expected = model.forward(TOKENS)[0]
    model.combine_adapters({"default": 1.0}, "same")
    assert abs(model.forward(TOKENS)[0] - expected).max() < 1e-4 * abs(expected).max()
    model.quantize()
    with pytest.raises(ValueError, match="adapter 'default' sits on a quantised residual"):
        model.combine_adapters({"default": 1.0}, "again")


def test_a_sum_can_be_saved(tmp_path):
    model = two_adapters()
    model.combine_adapters({"a": 0.7, "b": 0.3}, "c")
    model.save_adapter(tmp_path)
    again = new_model()
    again.load_adapter(tmp_path)
    np.testing.assert_array_equal(again.forward(TOKENS)[0], model.forward(TOKENS)[0])


@pytest.mark.parametrize(
    ("factors", "options", "message"),
    [
        ({"a": 1, "x": 1}, {}, "no adapter 'x'; there are: 'a', 'b', 'dora'"),
        ({"a": 1, "b": 1}, {"method": "ties"}, "method: expected one of cat, svd, linear, got 'ties'"),
        ({"a": 1, "b": 1}, {"rank": 3}, 'rank: expected only with method "svd"'),
        ({"a": 1, "b": 1}, {"method": "linear"}, 'method: expected equal ranks for "linear"'),
        ({"a": 1, "dora": 1}, {}, "adapter 'dora' is a DoRA"),
        ({"a": 1, "b": 1}, {"method": "svd", "rank": 0}, "rank: expected a whole number from 1 to 2147483647, got 0"),
        ({}, {}, "factors: expected a finite number for each adapter, got {}"),
        ({"a": np.nan}, {}, "a finite number for each adapter, got {'a': nan}"),
    ],
)
def test_what_cannot_be_added(factors, options, message):
    model = two_adapters()
    model.add_adapter("dora", rank=2, dora=True)
    with pytest.raises(ValueError, match=message):
        model.combine_adapters(factors, "c", **options)
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        model.combine_adapters({"a": 1}, "a")
