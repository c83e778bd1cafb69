"""Adapters in and out and put together: round trips to the bit, what is refused and by which name, residuals."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from spoil import TOKENS, assert_same_bits, change_json, change_tensors, complaint, cut_short, new_model

import refqlora as rq
from refqlora.adapter_sums import as_lora
from refqlora.architectures import ARCHITECTURES
from refqlora.files import adapter_files, writing
from refqlora.files import reading as files
from refqlora.quantization import dequantize


def with_adapter(model, **options):
    """Every A, B and magnitude random."""
    model.add_adapter(**{"rank": 5, "alpha": 7, **options})
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    return model


@pytest.fixture
def adapter(tmp_path):
    """An adapter's directory, for new_model()."""
    with_adapter(new_model(), targets=["q_proj", "down_proj"]).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- round trips ----

ADAPTERS = {
    "all-linear": {},
    "list": {"targets": ("v_proj", "model.layers.1.mlp.up_proj"), "dropout": 0.1},
    "regex": {"targets": r".*\.0\.(self_attn\.[qk]|mlp\.down)_proj", "alpha": 2.5},
    "rslora": {"rslora": True, "rank": 3},
    "DoRA": {"dora": True},
    "PiSSA": {"init": "pissa"},
    "OLoRA, DoRA": {"init": "olora", "dora": True, "targets": ("v_proj",)},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.0.mlp.*": 3}, "alpha_pattern": {"^model.*up_proj": 1.5}},
    "layers and exclusions": {"layers": (1,), "layers_pattern": "layers", "exclude": ("1.mlp.up_proj", "v_proj")},
    "excluded by a regex": {"targets": r".*_proj", "exclude": r".*mlp.*"},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_round_trips(options, tmp_path):
    model = with_adapter(new_model(), **options)
    model.save_adapter(tmp_path, base="some/model")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    assert json.loads((tmp_path / files[0]).read_text())["base_model_name_or_path"] == "some/model"

    again = new_model()
    again.load_adapter(tmp_path, "mine")
    assert again.active == "mine"
    assert_same_bits(again.trainable(), model.trainable())
    found, expected = again.adapters["mine"].config, model.adapters["default"].config
    for field in ("rank", "alpha", "dropout", "rslora", "dora", "init", "scale"):
        assert getattr(found, field) == getattr(expected, field)
    linears = model.config.linears()
    assert found.matches(linears) == expected.matches(linears)
    assert [found.scale_of(name) for name in linears] == [expected.scale_of(name) for name in linears]
    assert_same_bits(again.adapters["mine"].residual, model.adapters["default"].residual)
    np.testing.assert_array_equal(again.forward(TOKENS)[0], model.forward(TOKENS)[0])


def test_the_adapter_that_is_named_is_saved(tmp_path):
    model = with_adapter(new_model())
    model.add_adapter("second", rank=2, targets=["o_proj"])
    model.save_adapter(tmp_path / "active")
    model.save_adapter(tmp_path / "named", "default")
    for directory, name in (("active", "second"), ("named", "default")):
        config, params = adapter_files.load_adapter(tmp_path / directory)
        assert config.rank == model.adapters[name].config.rank
        assert_same_bits(params, model.adapters[name].params)
    with pytest.raises(ValueError, match="no adapter 'third'; there are: 'default', 'second'"):
        model.save_adapter(tmp_path / "third", "third")


def test_adapter_files_have_pefts_names(adapter):
    """Key for key as PEFT writes them (peft 0.21)."""
    names = {f"model.layers.{i}.{x}" for i in (0, 1) for x in ("self_attn.q_proj", "mlp.down_proj")}
    keys = {f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
    assert {name for name, _ in files.read_tensors(adapter / "adapter_model.safetensors")} == keys
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 5, "lora_alpha": 7, "lora_dropout": 0.0}
    expected |= {"target_modules": ["q_proj", "down_proj"], "bias": "none", "use_rslora": False}
    assert expected.items() <= config.items()


# ---- what is wrong with an adapter is said ----

A = "model.layers.1.self_attn.q_proj.lora_A.weight"  # (5, 20)
KEY = "base_model.model." + A


def change_config(**changes):
    return lambda d: change_json(d / "adapter_config.json", **changes)


def change_adapter(changes):
    return lambda d: change_tensors(d / "adapter_model.safetensors", changes)


def rename_keys(old, new):
    def spoil(d):
        path = d / "adapter_model.safetensors"
        tensors = {name.replace(old, new): x for name, x in files.read_tensors(path)}
        writing.write_tensors(path, tensors)

    return spoil


ADAPTER_FAULTS = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), ["adapter_config.json: no such file"]),
    "config not JSON": (
        lambda d: (d / "adapter_config.json").write_text('{"r": 5,'),
        ["adapter_config.json: not valid JSON"],
    ),
    **{
        f"no {key}": (change_config(**{key: ...}), [f'adapter_config.json: has no "{key}"'])
        for key in ("peft_type", "r", "lora_alpha", "target_modules")
    },
    "null targets": (change_config(target_modules=None), ['adapter_config.json: has no "target_modules"']),
    "r zero": (change_config(r=0), ["adapter_config.json: rank must be a whole number", "0"]),
    "r a float": (change_config(r=5.0), ["adapter_config.json: rank must be a whole number", "5.0"]),
    "alpha text": (
        change_config(lora_alpha="7"),
        ["adapter_config.json: alpha must be a positive number", "'7'"],
    ),
    "alpha negative": (change_config(lora_alpha=-7), ["adapter_config.json: alpha must be", "-7"]),
    "dropout text": (change_config(lora_dropout="0.1"), ["adapter_config.json: dropout must be", "'0.1'"]),
    "dropout one": (change_config(lora_dropout=1), ["adapter_config.json: dropout must be"]),
    "rslora text": (
        change_config(use_rslora="no"),
        ["adapter_config.json: rslora must be true or false", "'no'"],
    ),
    "targets a number": (change_config(target_modules=5), ["adapter_config.json: targets must be", "5"]),
    "targets numbers": (change_config(target_modules=[5]), ["adapter_config.json: targets must be", "5"]),
    "targets no regex": (change_config(target_modules="q_proj("), ["adapter_config.json: target 'q_proj('"]),
    "no target": (change_config(target_modules=[]), ["adapter: target () matches no linear"]),
    "unknown target": (
        change_config(target_modules=["q_proj", "down_proj", "query_key_value"]),
        ["adapter: target query_key_value matches no linear", "q_proj"],
    ),
    "a part of a name": (
        change_config(target_modules="proj"),
        ["adapter: target 'proj'", "matches no linear"],
    ),
    **{
        f"{key} {value}": (
            change_config(**{key: value}),
            [f'adapter_config.json: "{key}": {json.dumps(value)}'],
        )
        for key, value in {
            "peft_type": "LOHA",
            "bias": "lora_only",
            "fan_in_fan_out": True,
            "modules_to_save": ["lm_head"],
            "layer_replication": [[0, 2]],
            "target_parameters": ["mlp.experts"],
            "trainable_token_indices": [0],
            "lora_bias": True,
            "use_qalora": True,
            "use_bdlora": {"nblocks": 2},
            "alora_invocation_tokens": [1],
            "arrow_config": {"top_k": 3},
            "kasa_config": {"beta": 1},
            "monteclora_config": {"buffer_size": 3},
            "velora_config": {"num_groups": 3},
            "megatron_config": {"a": 1},
            "init_lora_weights": "pissa_niter_16",
        }.items()
    },
    **{
        f"started by {init}": (
            change_config(init_lora_weights=init),
            [f'adapter_config.json: "init_lora_weights": "{init}" is not supported'],
        )
        for init in ("loftq", "corda", "lora_ga", "PiSSA", "svd")
    },
    "a key nobody knows": (
        change_config(use_xlora=True),
        ['adapter_config.json: "use_xlora" is not known: it might change the numbers'],
    ),
    "DoRA without magnitudes": (change_config(use_dora=True), ["q_proj.lora_magnitude_vector (48,) is missing"]),
    "magnitudes without DoRA": (
        change_adapter({"base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector": np.ones(20, "f4")}),
        ["down_proj.lora_magnitude_vector is not a LoRA matrix"],
    ),
    "another rank by a pattern": (
        change_config(rank_pattern={"q_proj": 3}),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight has shape (5, 20), expected (3, 20)"],
    ),
    "a pattern that fits nothing": (
        change_config(alpha_pattern={"k_proj": 3}),
        ['adapter: alpha_pattern: "k_proj" matches no linear that has an adapter'],
    ),
    "rank_pattern a list": (change_config(rank_pattern=[3]), ["adapter_config.json: rank_pattern must map names"]),
    "fewer layers": (change_config(layers_to_transform=[0]), ["adapter: model.layers.1.", "is not expected"]),
    "a layer too many": (change_config(layers_to_transform=[0, 1, 2]), ["adapter: layers: there is no layer 2"]),
    "layers of a regex": (
        change_config(layers_to_transform=[0], target_modules=".*q_proj"),
        ["adapter_config.json: layers do not go with a regular expression"],
    ),
    "an exclusion": (change_config(exclude_modules=["q_proj"]), ["q_proj.lora_A.weight", "is not expected"]),
    "a rank too large to come from the weight": (
        change_config(init_lora_weights="pissa", r=21),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight has shape (5, 20), expected (21, 20)"],
    ),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        ["adapter_model.safetensors: no such file"],
    ),
    "pickled weights": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        ["adapter_model.bin: is pickled"],
    ),
    "weights cut short": (
        lambda d: cut_short(d / "adapter_model.safetensors", -1),
        ["adapter_model.safetensors: not a valid safetensors"],
    ),
    "no prefix": (
        rename_keys("base_model.model.", ""),
        ["adapter_model.safetensors: model.layers.0", "is not a LoRA matrix (base_model.model."],
    ),
    "half a prefix": (
        rename_keys("base_model.model.", "base_model."),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight (5, 20) is missing"],
    ),
    "adapter's name in the keys": (
        rename_keys(".weight", ".default.weight"),
        [
            "adapter_model.safetensors: base_model.model.model.layers.0",
            ".default.weight is not a LoRA matrix",
        ],
    ),
    "not LoRA": (
        change_adapter({"base_model.model.lm_head.weight": np.zeros((37, 20), np.float32)}),
        ["adapter_model.safetensors: base_model.model.lm_head.weight is not a LoRA matrix"],
    ),
    "another rank": (
        change_config(r=4),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight has shape (5, 20), expected (4, 20)"],
    ),
    "one dimension": (
        change_adapter({KEY: np.zeros(5, np.float32)}),
        [f"adapter: {A} has shape (5,), expected (5, 20)"],
    ),
    "transposed": (
        change_adapter({KEY: np.zeros((20, 5), np.float32)}),
        [f"adapter: {A} has shape (20, 5), expected (5, 20)"],
    ),
    "integers": (
        change_adapter({KEY: np.zeros((5, 20), np.int32)}),
        [f"adapter_model.safetensors: {KEY} is int32, expected one of float16"],
    ),
    "missing tensor": (change_adapter({KEY: ...}), [f"adapter: {A} (5, 20) is missing"]),
    "more than the targets": (
        change_config(target_modules=["down_proj"]),
        ["adapter: model.layers.0.self_attn.q_proj.lora_", "is not expected"],
    ),
    "less than the targets": (
        change_config(target_modules="all-linear"),
        ["adapter: model.layers.0.self_attn.k_proj.lora_A.weight (5, 20) is missing"],
    ),
    "another model's width": (
        change_adapter({KEY: np.zeros((5, 24), np.float32)}),
        [f"adapter: {A} has shape (5, 24), expected (5, 20)"],
    ),
}


@pytest.mark.parametrize(("spoil", "said"), ADAPTER_FAULTS.values(), ids=ADAPTER_FAULTS)
def test_a_spoilt_adapter_is_refused_by_name(adapter, spoil, said):
    model = new_model()
    model.load_adapter(adapter, "good")
    spoil(adapter)
    message = complaint(lambda path: model.load_adapter(path, "bad"), adapter)
    assert str(adapter) in message
    for part in said:
        assert part in message
    assert list(model.adapters) == ["good"]
    assert model.active == "good"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 24}, "lora_A.weight has shape (5, 20), expected (5, 24)"),
        ({"heads": 3}, "q_proj.lora_B.weight has shape (48, 5), expected (24, 5)"),
        ({"layers": 3}, "model.layers.2.self_attn.q_proj.lora_A.weight (5, 20) is missing"),
        ({"layers": 1}, "model.layers.1."),
    ],
)
def test_an_adapter_for_another_model_is_refused(adapter, changes, said):
    message = complaint(new_model(**changes).load_adapter, adapter)
    assert message.startswith(str(adapter))
    assert said in message


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_taken(adapter, value):
    change_json(adapter / "adapter_config.json", init_lora_weights=value)
    new_model().load_adapter(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_xlora": None, "use_ylora": False, "z_config": {}},
        {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}},
        {"layers_to_transform": [], "layers_pattern": "layers", "use_dora": None, "modules_to_save": []},
        {"layers_to_transform": 1, "layers_pattern": [], "target_modules": ["q_proj"]},
        {"qalora_group_size": 8, "megatron_core": "x", "ensure_weight_tying": True, "peft_version": "9"},
        {"eva_config": {"rho": 2}, "init_lora_weights": "eva", "loftq_config": {"loftq_bits": 4}, "task_type": None},
    ],
    ids=str,
)
def test_what_cannot_change_a_number_is_taken(adapter, changes):
    change_json(adapter / "adapter_config.json", **changes)
    if changes.get("layers_to_transform") == 1:
        names = [name for name, _ in files.read_tensors(adapter / "adapter_model.safetensors")]
        gone = [name for name in names if "layers.0" in name or "down_proj" in name]
        change_tensors(adapter / "adapter_model.safetensors", dict.fromkeys(gone, ...))
    new_model().load_adapter(adapter)


def test_a_b_of_zeros_is_told(adapter, tmp_path):
    """What was never trained, or lost on the way."""
    zero = {f"base_model.model.model.layers.{i}.mlp.down_proj.lora_B.weight": np.zeros((20, 5), "f4") for i in (0, 1)}
    change_tensors(adapter / "adapter_model.safetensors", zero)
    with pytest.warns(UserWarning, match=r"adapter: 2 of 4 lora_B are zero .*down_proj.lora_B.weight"):
        new_model().load_adapter(adapter)


def test_gpt2s_adapters_say_that_its_weights_are_stored_the_other_way(adapter, tmp_path, monkeypatch):
    """fan_in_fan_out is true in GPT-2's adapters and nowhere else; A and B lie as ever."""
    params = dict(files.read_tensors(adapter / "adapter_model.safetensors"))
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], conv1d=True))
    new_model().load_adapter(adapter)  # PEFT too puts a false right
    model = with_adapter(new_model(), targets=["q_proj", "down_proj"])
    model.save_adapter(tmp_path / "gpt2")
    assert json.loads((tmp_path / "gpt2/adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same_bits(dict(files.read_tensors(tmp_path / "gpt2/adapter_model.safetensors")), params)
    new_model().load_adapter(tmp_path / "gpt2")
    model.add_adapter("olora", rank=2, init="olora")
    with pytest.raises(ValueError, match="init 'olora' cannot be written: PEFT would make another residual"):
        model.save_adapter(tmp_path / "olora")


def test_patterns_are_written_so_that_their_order_does_not_matter(tmp_path):
    """PEFT takes the first key that fits, and sorts the keys when it writes them."""
    model = with_adapter(new_model(), rank_pattern={"q_proj": 2, ".*": 3}, alpha_pattern={"v_proj": 9, "k_proj": 8})
    model.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config["alpha_pattern"].items()) == [("k_proj", 8), ("v_proj", 9)]
    assert len(config["rank_pattern"]) == len(model.config.linears())
    again = new_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_adapter(tmp_path)
    np.testing.assert_array_equal(again.forward(TOKENS)[0], model.forward(TOKENS)[0])


def test_alphas_that_compete_are_told(adapter):
    """The file of an adapter that PEFT trained with other scales than it loads it with."""
    change_json(adapter / "adapter_config.json", alpha_pattern={".*_proj": 3, "q_proj": 4})
    model = new_model()
    with pytest.warns(UserWarning, match=r"alpha_pattern: \.\*_proj and q_proj both fit model\.layers\.0\."):
        model.load_adapter(adapter)
    assert model.adapters["default"].config.scale_of("model.layers.0.self_attn.q_proj") == 3 / 5


# ---- PiSSA and OLoRA: residuals ----


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
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: pissa takes the dense weight apart"):
        model.add_adapter("late", rank=5, init="pissa")
    with pytest.raises(ValueError, match=r"q_proj: pissa takes rank 20 at most"):
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


# ---- adding adapters ----


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
        ({"a": 1, "b": 1}, {"method": "ties"}, "method must be one of cat, svd, linear, not 'ties'"),
        ({"a": 1, "b": 1}, {"rank": 3}, 'rank goes with method "svd"'),
        ({"a": 1, "b": 1}, {"method": "linear"}, "the ranks must be equal"),
        ({"a": 1, "dora": 1}, {}, "adapter 'dora' is a DoRA"),
        ({"a": 1, "b": 1}, {"method": "svd", "rank": 0}, "rank must be a whole number of 1 or more, not 0"),
        ({}, {}, "adapters are added with a finite factor each, not {}"),
        ({"a": np.nan}, {}, "a finite factor each, not {'a': nan}"),
    ],
)
def test_what_cannot_be_added(factors, options, message):
    model = two_adapters()
    model.add_adapter("dora", rank=2, dora=True)
    with pytest.raises(ValueError, match=message):
        model.combine_adapters(factors, "c", **options)
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        model.combine_adapters({"a": 1}, "a")
