"""Adapters on a model: residuals of PiSSA and OLoRA, as plain LoRA, what printing one shows."""

import numpy as np
import pytest
from spoil import TOKENS, assert_same_bits, new_model, with_adapter

import refqlora as rq
from refqlora.adapter_sums import as_lora
from refqlora.files import adapter_files
from refqlora.quantization import dequantize


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init": "pissa_niter_2", "dora": True}, {"init": "olora"}])
def test_the_base_stays_what_it_is(options):
    model = new_model()
    base, before = model.forward(TOKENS)[0], {name: p.copy() for name, p in model.params.items()}
    model.add_adapter("plain", rank=3)
    model.add_adapter("a", rank=5, **options)
    np.testing.assert_allclose(model.forward(TOKENS)[0], base, rtol=1e-3, atol=1e-3)  # a new adapter changes nothing
    model.add_adapter("b", rank=5, **options)
    for name in model.adapters["a"].start:  # the second did not take the first one's residual apart
        np.testing.assert_array_equal(model.adapters["a"].params[name], model.adapters["b"].params[name])
    model.set_adapter("plain")
    np.testing.assert_array_equal(model.forward(TOKENS)[0], base)
    model.set_adapter(None)
    np.testing.assert_array_equal(model.forward(TOKENS)[0], base)
    assert_same_bits(model.params, before)


def test_quantising_quantises_residuals():
    model = new_model()
    model.add_adapter(rank=5, init="pissa", targets=("q_proj",))
    residual = dict(model.adapters["default"].residual)
    model.quantize()
    for name, weight in model.adapters["default"].residual.items():
        np.testing.assert_array_equal(dequantize(weight), dequantize(rq.quantize(residual[name])))
    assert model.adapters["default"].residual.keys() == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: pissa decomposes the dense weight"):
        model.add_adapter("late", rank=5, init="pissa")
    with pytest.raises(ValueError, match=r"q_proj: rank: expected at most 20 for pissa"):
        new_model().add_adapter(rank=21, init="pissa")


@pytest.mark.parametrize("options", [{}, {"rslora": True, "rank_pattern": {"q_proj": 2}}, {"dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora"])
def test_as_plain_lora_it_is_the_same(init, options, tmp_path):
    model = with_adapter(new_model(), init=init, **options)
    expected = model.forward(TOKENS)[0]
    model.save_adapter(tmp_path, plain=True)
    again = new_model()
    again.load_adapter(tmp_path)
    assert again.adapters["default"].config.rank == 10
    assert not again.adapters["default"].residual
    found = again.forward(TOKENS)[0]
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()


def test_a_random_residual_is_written_as_plain_lora_or_not_at_all(tmp_path):
    model = with_adapter(new_model(), init="pissa_niter_3")
    model.save_adapter(tmp_path / "a")
    assert adapter_files.read_config(tmp_path / "a").init == "default"
    with pytest.raises(ValueError, match="'pissa_niter_3' cannot be written"):
        model.save_adapter(tmp_path / "b", plain=False)
    plain = with_adapter(new_model())
    assert as_lora(plain.adapters["default"]) is plain.adapters["default"]
    model.quantize()
    with pytest.warns(UserWarning, match="pissa_niter_3 adapter is not quite what was trained"):
        model.save_adapter(tmp_path / "c")


def test_dora_needs_rows_that_are_not_zero():
    model = new_model()
    model.params["model.layers.1.mlp.up_proj.weight"][3] = 0
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: row 3 of its weight is zero"):
        model.add_adapter(dora=True)


# ---- what printing one shows ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"targets": ("q_proj", "down_proj")},
            "Adapter(LoRA, rank 5, alpha 7, on 4 linears (q_proj, down_proj), 1,160 trainable parameters, 4,640 bytes)",
        ),
        (
            {"targets": ("q_proj",), "dora": True, "init": "pissa"},
            "Adapter(DoRA, PiSSA, rank 5, alpha 7, on 2 linears (q_proj), 776 trainable parameters, 3,104 bytes)",
        ),
        (
            {"targets": ("q_proj",), "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 0.5}},
            "Adapter(LoRA, rank 2 to 5, alpha 0.5, on 2 linears (q_proj), 476 trainable parameters, 1,904 bytes)",
        ),
    ],
)
def test_an_adapter_prints_what_it_is(options, expected):
    model = with_adapter(new_model(), **options)
    assert repr(model.adapters) == f"{{'default': {expected}}}"
    page = model.adapters["default"]._repr_html_()
    for name, value in model.adapters["default"].facts().items():
        assert f"{name}</th><td>{f'{value:,}' if isinstance(value, int) else value}</td>" in page


# ---- loaded along with the model ----


@pytest.mark.parametrize("init", ["pissa", "olora", "default"])
def test_the_base_is_quantised_after_it_was_taken_apart(init, tmp_path):
    model = with_adapter(new_model(), init=init)
    model.save_pretrained(tmp_path / "base")
    model.save_adapter(tmp_path / "adapter")
    model.quantize()
    found = rq.Model.from_pretrained(tmp_path / "base", "nf4", adapters={"mine": tmp_path / "adapter"})
    assert found.active == "mine"
    np.testing.assert_array_equal(found.forward(TOKENS)[0], model.forward(TOKENS)[0])

    expected = rq.Model.from_pretrained(tmp_path / "base")
    expected.add_adapter(rank=3, init=init, seed=4)
    expected.quantize()
    config = rq.LoraConfig(rank=3, init=init)
    found = rq.Model.from_pretrained(tmp_path / "base", "nf4", adapters={"new": config}, seed=4)
    assert_same_bits(found.trainable(), expected.trainable())
    np.testing.assert_array_equal(found.forward(TOKENS)[0], expected.forward(TOKENS)[0])


def test_a_new_adapter_must_learn_something():
    for options in ({"alpha": 0}, {"alpha_pattern": {"up_proj": 0}}):
        with pytest.raises(ValueError, match=r"proj: alpha: expected a number above 0, got 0"):
            new_model().add_adapter(**options)
    with pytest.raises(ValueError, match=r"targets: expected one of .*, got 'query'"):
        new_model().add_adapter(targets=("q_proj", "query"))
