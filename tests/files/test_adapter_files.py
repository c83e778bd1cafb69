"""PEFT's adapter files: round trips to the bit, and the names in errors."""

import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
from spoil import TOKENS, assert_same_bits, change_json, change_tensors, complaint, cut_short, new_model, with_adapter

from refqlora.adapters import warn_if_untrained
from refqlora.architectures import ARCHITECTURES
from refqlora.files import adapter_files, writing
from refqlora.files import reading as files


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
        f"no {key}": (change_config(**{key: ...}), [f"adapter_config.json: {key} is missing"])
        for key in ("peft_type", "r", "lora_alpha", "target_modules")
    },
    "null targets": (change_config(target_modules=None), ["adapter_config.json: target_modules is missing"]),
    **{
        f"{key} {str(value)[:40]}": (change_config(**{key: value}), [f"adapter_config.json: {key}{said}"])
        for key, value, said in [
            ("r", 0, ": expected a whole number from 1 to 2147483647, got 0"),
            ("r", 5.0, ": expected a whole number from 1 to 2147483647, got 5.0"),
            ("r", 10**400, ": expected a whole number from 1 to 2147483647, got 1000"),
            ("lora_alpha", "7", ": expected a number from 0 to 1e+09, got '7'"),
            ("lora_alpha", -7, ": expected a number from 0 to 1e+09, got -7"),
            ("lora_alpha", 10**400, ": expected a number from 0 to 1e+09, got 1000"),
            ("lora_alpha", 1e300, ": expected a number from 0 to 1e+09, got 1e+300"),
            ("alpha_pattern", {"q_proj": 1e300}, " of 'q_proj': expected a number from 0 to 1e+09, got 1e+300"),
            ("lora_dropout", "0.1", ": expected a number from 0 to below 1, got '0.1'"),
            ("lora_dropout", 1, ": expected a number from 0 to below 1, got 1"),
            ("use_rslora", "no", ": expected true or false, got 'no'"),
            ("target_modules", 5, ": expected names, or one regular expression, got 5"),
            ("target_modules", [5], ": expected names, or one regular expression, got (5,)"),
            ("target_modules", "q_proj(", ": 'q_proj(' is not a regular expression: missing )"),
            ("target_modules", "(" * 5000, ": '(((("),
            ("target_modules", "x{99999999999}", ": 'x{99999999999}' is not a regular expression"),
            ("rank_pattern", {"(" * 300 + ")" * 300: 2}, ": '(((("),
            ("rank_pattern", [3], ": expected regular expressions with a value each, got (3,)"),
            ("peft_type", "IA3", ': expected "LORA", got "IA3"'),
            ("bias", "lora_only", ': expected "none", got "lora_only"'),
            ("fan_in_fan_out", True, ": expected false (only GPT-2 has true), got true"),
            ("modules_to_save", ["lm_head"], ': expected null or [], got ["lm_head"]'),
            ("layer_replication", [[0, 2]], ": expected null or [], got [[0, 2]]"),
            ("target_parameters", ["mlp.experts"], ': expected null or [], got ["mlp.experts"]'),
            ("trainable_token_indices", [0], ": expected null or [] or {}, got [0]"),
            ("lora_bias", True, ": expected false or null, got true"),
            ("use_qalora", True, ": expected false or null, got true"),
            ("use_bdlora", {"nblocks": 2}, ': expected null or false, got {"nblocks": 2}'),
            ("alora_invocation_tokens", [1], ": expected null, got [1]"),
            ("arrow_config", {"top_k": 3}, ': expected null, got {"top_k": 3}'),
            ("kasa_config", {"beta": 1}, ': expected null, got {"beta": 1}'),
            ("monteclora_config", {"buffer_size": 3}, ': expected null, got {"buffer_size": 3}'),
            ("velora_config", {"num_groups": 3}, ': expected null, got {"num_groups": 3}'),
            ("megatron_config", {"a": 1}, ': expected null, got {"a": 1}'),
            (
                "init_lora_weights",
                "pissa_niter_16",
                ": 'pissa_niter_16' changed the base at random",
            ),
        ]
    },
    **{
        f"started by {init}": (
            change_config(init_lora_weights=init),
            [
                "adapter_config.json: init_lora_weights: expected an initialisation that leaves the base alone",
                f'got "{init}"',
            ],
        )
        for init in ("loftq", "corda", "lora_ga", "PiSSA", "svd")
    },
    "an unknown key": (
        change_config(use_xlora=True),
        ["adapter_config.json: 'use_xlora' is unknown and might change the numbers"],
    ),
    "no target": (change_config(target_modules=[]), ["adapter: targets: expected one of down_proj, ", "got none"]),
    "no target that is there": (
        change_config(target_modules=["query", "value"]),
        ["adapter: targets: expected one of down_proj, ", "got 'query'"],
    ),
    "a part of a name": (
        change_config(target_modules="proj"),
        ["adapter: targets: expected a pattern for names that end in", "got 'proj'"],
    ),
    "a pattern that backtracks for ever": (
        change_config(target_modules="(((.*)*)*)*!"),
        ["adapter: targets: expected a pattern for names that end in", "got '(((.*)*)*)*!'"],
    ),
    "another kind, without LoRA's keys": (
        change_config(peft_type="VERA", r=..., lora_alpha=..., vera_dropout=0.1),
        ['adapter_config.json: peft_type: expected "LORA", got "VERA"'],
    ),
    "NaN": (
        change_adapter({KEY: np.full((5, 20), np.nan, "f4")}),
        [f"adapter: {A}: expected finite numbers, got nan"],
    ),
    "beyond float32": (
        change_adapter({KEY: np.full((5, 20), 1e300)}),
        [f"adapter: {A}: expected finite numbers, got inf"],
    ),
    "on the output head": (
        change_adapter({"base_model.model.lm_head.lora_A.weight": np.zeros((5, 20), "f4")}),
        ["adapter_model.safetensors: 'base_model.model.lm_head.lora_A.weight' is on the output head"],
    ),
    "on an embedding": (
        change_adapter({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((5, 20), "f4")}),
        ["embed_tokens.lora_embedding_A' is on an embedding"],
    ),
    "a llama.cpp adapter": (
        lambda d: [(d / "mine.gguf").touch(), *(file.unlink() for file in d.glob("adapter*"))],
        ["adapter_config.json: no such file; expected PEFT's adapter_config.json"],
    ),
    "DoRA without magnitudes": (change_config(use_dora=True), ["q_proj.lora_magnitude_vector (48,) is missing"]),
    "magnitudes without DoRA": (
        change_adapter({"base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector": np.ones(20, "f4")}),
        ["down_proj.lora_magnitude_vector' is not a LoRA matrix"],
    ),
    "another rank by a pattern": (
        change_config(rank_pattern={"q_proj": 3}),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight has shape (5, 20), expected (3, 20)"],
    ),
    "fewer layers": (change_config(layers_to_transform=[0]), ["adapter: model.layers.1.", "is not expected"]),
    "layers of a regex": (
        change_config(layers_to_transform=[0], target_modules=".*q_proj"),
        ["adapter_config.json: layers_to_transform: expected none with a regular expression"],
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
        ["adapter_model.bin: pickled files are never opened"],
    ),
    "weights cut short": (
        lambda d: cut_short(d / "adapter_model.safetensors", -1),
        ["adapter_model.safetensors: not a valid safetensors"],
    ),
    "no prefix": (
        rename_keys("base_model.model.", ""),
        ["adapter_model.safetensors: 'model.layers.0", "is not a LoRA matrix (base_model.model."],
    ),
    "half a prefix": (
        rename_keys("base_model.model.", "base_model."),
        ["adapter: model.layers.0.self_attn.q_proj.lora_A.weight (5, 20) is missing"],
    ),
    "adapter's name in the keys": (
        rename_keys(".weight", ".default.weight"),
        [
            "adapter_model.safetensors: 'base_model.model.model.layers.0",
            ".default.weight' is not a LoRA matrix",
        ],
    ),
    "not LoRA": (
        change_adapter({"base_model.model.lm_head.weight": np.zeros((37, 20), np.float32)}),
        ["adapter_model.safetensors: 'base_model.model.lm_head.weight' is not a LoRA matrix"],
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj", "down_proj", "query_key_value"]}, "targets: .*, got 'query_key_value'"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "targets: .*, got 'lm_head'"),
        ({"exclude_modules": ["k_prj"]}, "exclude: .*, got 'k_prj'"),
        ({"layers_to_transform": [0, 1, 2]}, r"layers: expected numbers among \[0, 1\], got 2"),
        ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern: .* that get an adapter, got 'k_proj'"),
        ({"lora_alpha": 0}, "alpha of model.layers.0.self_attn.q_proj is 0, so the adapter changes nothing there"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_reported(adapter, changes, said):
    change_json(adapter / "adapter_config.json", **changes)
    model = new_model()
    with pytest.warns(UserWarning, match=f"adapter: {said}"):
        model.load_adapter(adapter)
    assert len(model.adapters["default"].linears) == 4


def test_an_adapter_that_was_never_trained_loads_in_silence(tmp_path, recwarn):
    """It may be there to be trained. Whoever uses it asks whether it changes anything."""
    model = new_model()
    model.add_adapter(rank=5, targets=("q_proj", "down_proj"))
    model.trainable()[A.replace("lora_A", "lora_B")][1] = 1
    model.save_adapter(tmp_path)
    again = new_model()
    again.load_adapter(tmp_path)
    assert list(recwarn) == []
    with pytest.warns(UserWarning, match=r"here: 3 of 4 lora_B are all zeros .*0\.self_attn\.q_proj.lora_B.weight"):
        warn_if_untrained(again.adapters["default"], "here")


def test_a_directory_that_holds_adapters_names_them(adapter):
    message = complaint(new_model().load_adapter, adapter.parent)
    assert message.endswith("adapter_config.json: no such file; there are adapters in its subdirectories adapter")
    message = complaint(new_model().load_adapter, adapter / "adapter_config.json")
    assert message.endswith("adapter_config.json: expected an adapter's directory, got a file")


def test_a_kill_between_the_two_files_leaves_no_config(adapter, monkeypatch):
    """New weights beside an old config load without complaint where only alpha differs."""

    def killed(*args):
        raise MemoryError

    monkeypatch.setattr(writing.os, "replace", lambda old, new: killed() if new.suffix == ".json" else rename(old, new))
    rename = os.rename
    with pytest.raises(MemoryError):
        with_adapter(new_model(1), targets=["q_proj", "down_proj"], alpha=64).save_adapter(adapter)
    assert complaint(new_model().load_adapter, adapter).endswith("adapter_config.json: no such file")


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


def test_competing_alphas_are_reported(adapter):
    """The file of an adapter that PEFT trained with other scales than it loads it with."""
    change_json(adapter / "adapter_config.json", alpha_pattern={".*_proj": 3, "q_proj": 4})
    model = new_model()
    with pytest.warns(UserWarning, match=r"alpha_pattern: \.\*_proj and q_proj match model\.layers\.0\."):
        model.load_adapter(adapter)
    assert model.adapters["default"].config.scale_of("model.layers.0.self_attn.q_proj") == 3 / 5
