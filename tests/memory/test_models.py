"""The built-in models: each has as many parameters as were published, and other models are found or refused by name."""

import json

import huggingface_hub
import pytest
import tiny

from refqlora.config import Config
from refqlora.files.config_json import config_from_dict, config_to_dict
from refqlora.memory.models import known_models, model_config, parameter_count


@pytest.mark.parametrize("name", known_models())
def test_each_model_has_as_many_parameters_as_were_published(name):
    published, counted = known_models()[name].parameters, parameter_count(model_config(name))
    if isinstance(published, int):
        assert counted == published
    else:
        digits = len(published.removesuffix("B").partition(".")[2])
        assert f"{counted / 1e9:.{digits}f}B" == published


def test_the_count_notices_a_wrong_number():
    right = known_models()["qwen2.5-7b"]
    for key, wrong in (("num_key_value_heads", 7), ("intermediate_size", 18945), ("tie_word_embeddings", True)):
        config = config_from_dict(dict(right.config) | {key: wrong})
        assert parameter_count(config) != right.parameters, key


def test_the_families_that_were_promised_are_there():
    names = list(known_models())
    promised = {
        "gpt2": "gpt2 gpt2-medium gpt2-large gpt2-xl gpt3-175b",
        "llama-": "7b 13b 33b 65b 2-7b 2-13b 2-70b 3.2-1b 3.2-3b 3.1-8b 3.1-70b 3.1-405b",
        "qwen2.5-": "0.5b 1.5b 3b 7b 14b 32b 72b",
        "qwen3-": "0.6b 1.7b 4b 8b 14b 32b",
        "gemma-2-": "2b 9b 27b",
        "smollm2-": "135m 360m 1.7b",
        "": "mistral-7b phi-3-mini tinyllama-1.1b",
    }
    for family, sizes in promised.items():
        for size in sizes.split():
            assert (size if family == "gpt2" else family + size) in names
    assert all(name == name.lower() and " " not in name for name in names)


def test_a_name_in_capitals_is_the_same_model():
    assert model_config("Llama-2-7B") == model_config("llama-2-7b")


def test_a_file_and_a_directory(tmp_path):
    config = model_config("qwen3-0.6b")
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    assert model_config(tmp_path) == model_config(tmp_path / "config.json") == config
    assert model_config(str(tiny.save(tmp_path / "model"))) == tiny.unsure().config


def test_of_a_model_on_the_hub_only_its_config_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(known_models()["gpt2"].config))
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_config("someone/gpt2-again@v2") == model_config("gpt2")
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == ("someone/gpt2-again", "v2", ["config.json"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llama2-7b", "llama-2-7b"),
        ("llama-3.1-7b", "llama-3.1-8b"),
        ("qwen-2.5-7b", "qwen2.5-7b"),
        ("mistral", "mistral-7b"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_ones(name, nearest):
    with pytest.raises(FileNotFoundError, match=rf"^{name}: no such model") as raised:
        model_config(name)
    assert nearest in str(raised.value).partition("known models: ")[2].partition(";")[0].split(", ")
    assert "\n" not in str(raised.value)


def test_a_name_unlike_any_gets_all_of_them():
    with pytest.raises(FileNotFoundError, match=r"gpt2, gpt2-medium, .* smollm2-1\.7b"):
        model_config("zzz")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            r"'mixtral' is a mixture of experts \(num_local_experts: 8\)",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 256},
            "'deepseek_v3' is a mixture of experts",
        ),
        ({"model_type": "mamba"}, "model_type: 'mamba' is not supported; supported: \"llama\""),
        ({}, '"model_type" is missing'),
    ],
)
def test_models_of_another_kind_are_refused_by_name(tmp_path, fields, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as raised:
        model_config(path)
    assert str(path) in str(raised.value)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        model_config(tmp_path)


def test_a_model_is_a_config_like_any_other():
    assert isinstance(model_config("phi-3-mini"), Config)
