"""A decoder's shape: read from config.json, written back, and what follows from it."""

import dataclasses
import json

import numpy as np
import pytest

from refqlora.config import Config
from refqlora.files.config_json import config_from_dict, config_to_dict

# The shape of Llama 3.2 1B (without its RoPE scaling), as transformers before version 5 wrote it.
OLD = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
NEW = {key: value for key, value in OLD.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
NEW |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "bfloat16"}
EXPECTED = Config(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    eps=1e-5,
    rope_theta=5e5,
    tied=True,
    max_positions=131072,
    bos_token_id=128000,
    eos_token_id=(128001, 128008, 128009),
)
MINIMAL = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("spelling", [OLD, NEW])
def test_reads_the_old_spelling_and_the_new(spelling):
    assert config_from_dict(spelling) == EXPECTED


@pytest.mark.parametrize("value", ["absent", None])
def test_what_config_json_may_leave_out(value):
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "quantization_config")
    optional += ("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id")
    config = config_from_dict(MINIMAL if value == "absent" else MINIMAL | dict.fromkeys(optional, value))
    assert config == Config(11, 24, 13, layers=2, heads=4, kv_heads=4, head_dim=6)
    assert (config.eps, config.rope_theta, config.tied, config.max_positions) == (1e-6, 1e4, False, 2048)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tied": False, "attention_bias": True, "eos_token_id": 7},
        {"mlp_bias": True, "bos_token_id": None, "eos_token_id": None, "head_dim": 80},
    ],
)
def test_what_is_written_reads_back(change):
    config = dataclasses.replace(EXPECTED, **change)
    written = json.loads(json.dumps(config_to_dict(config, np.float16)))
    assert config_from_dict(written) == config
    assert written["dtype"] == written["torch_dtype"] == "float16"
    without_new = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert config_from_dict(without_new) == config  # for readers of the old spelling


@pytest.mark.parametrize("key", MINIMAL)
def test_a_missing_field_is_named_with_the_file(key):
    for d in ({k: v for k, v in MINIMAL.items() if k != key}, MINIMAL | {key: None}):
        with pytest.raises(ValueError, match=rf'^some/config\.json: "{key}" is missing$'):
            config_from_dict(d, where="some/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, 'model_type: \'bert\' is not supported; supported: "llama", "mistral", "qwen2"'),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            'low_freq_factor: expected a value for RoPE of type "llama3"',
        ),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2}},
            "rope_type: expected one of .*, got 'mrope'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, 'factor: expected a value for RoPE of type "linear"'),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "separate sets for kinds of layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_scaling": "linear"}, "rope_parameters: expected an object, got 'linear'"),
        ({"rope_theta": "much"}, "much"),
        ({"rope_theta": -1.0}, r"rope_theta: expected a number from 1e-30 to 1e\+30, got -1.0"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number from 1 to 2147483647, got 0"),
        ({"hidden_size": 24.0}, "hidden_size: expected a whole number from 1 to 2147483647, got 24.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number from 1 to 9999, got True"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: expected a whole number from 1 to 2147483647, got '2'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads evenly"),
        ({"num_attention_heads": "4"}, "num_attention_heads: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
        ({"head_dim": 7}, "head_dim: expected an even number for RoPE, got 7"),
        ({"head_dim": 0}, "head_dim: expected a whole number from 1 to 65536, got 0"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings: expected a whole number"),
        ({"rms_norm_eps": None}, '"rms_norm_eps" is missing'),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number from .*, got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number from .*, got nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file(change, message):
    with pytest.raises(ValueError, match=rf"^some/config\.json: .*{message}"):
        config_from_dict(MINIMAL | change, where="some/config.json")


def test_parameters_and_their_shapes():
    config = Config(11, 10, 13, layers=2, heads=8, kv_heads=2, head_dim=6, attention_bias=True)
    layer = {
        "input_layernorm.weight": (10,),
        "self_attn.q_proj.weight": (48, 10),
        "self_attn.q_proj.bias": (48,),
        "self_attn.k_proj.weight": (12, 10),
        "self_attn.k_proj.bias": (12,),
        "self_attn.v_proj.weight": (12, 10),
        "self_attn.v_proj.bias": (12,),
        "self_attn.o_proj.weight": (10, 48),
        "self_attn.o_proj.bias": (10,),
        "post_attention_layernorm.weight": (10,),
        "mlp.gate_proj.weight": (13, 10),
        "mlp.up_proj.weight": (13, 10),
        "mlp.down_proj.weight": (10, 13),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (11, 10), "model.norm.weight": (10,)}
    assert config.shapes() == expected | {"lm_head.weight": (11, 10)}
    assert config.head == "lm_head.weight"

    tied = dataclasses.replace(config, tied=True)
    assert tied.shapes() == expected
    assert tied.head == "model.embed_tokens.weight"

    swapped = dataclasses.replace(config, attention_bias=False, mlp_bias=True)
    biases = {name: shape for name, shape in swapped.shapes().items() if name.endswith("bias")}
    sizes = {"gate_proj": 13, "up_proj": 13, "down_proj": 10}
    assert biases == {f"model.layers.{i}.mlp.{name}.bias": (n,) for i in range(2) for name, n in sizes.items()}


def test_linears_are_those_of_the_layers():
    linears = Config(11, 10, 13, layers=2, heads=8, kv_heads=2, head_dim=6).linears()
    assert len(linears) == len(set(linears)) == 14
    assert linears[0] == "model.layers.0.self_attn.q_proj"
    assert linears[-1] == "model.layers.1.mlp.down_proj"
    assert not any("lm_head" in name or "embed" in name for name in linears)


def test_the_tokens_that_end_a_text():
    sizes = (11, 10, 13, 2, 8, 2, 6)
    assert [Config(*sizes, eos_token_id=eos).ends for eos in (None, 3, (3,), (3, 5))] == [(), (3,), (3,), (3, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10**6}, "layers: expected a whole number from 1 to 9999, got 1000000"),
        ({"heads": True}, "heads: expected a whole number from 1 to 2147483647, got True"),
        ({"rope_theta": 10**400}, "rope_theta: expected a number from 1e-30 to 1e+30, got 1" + "0" * 56 + "..."),
        ({"eps": 10**9999}, "eps: expected a number from 1e-30 to 1e+30, got int too large to show"),
        ({"eos_token_id": ()}, "eos_token_id: expected a token or a list of tokens, got ()"),
        ({"pad_token_id": "x"}, "pad_token_id: expected a whole number from -2147483648 to 2147483647, got 'x'"),
        ({"rope_scaling": [1]}, 'rope_type: expected one of "default", '),
        (
            {"rope_theta": 1e30, "rope_scaling": {"rope_type": "linear", "factor": 1e-9}, "max_positions": 2**31 - 1},
            None,
        ),
        (
            {"rope_theta": 1e-30, "rope_scaling": {"rope_type": "linear", "factor": 1e-9}, "head_dim": 64},
            "rope_scaling: expected numbers that give finite frequencies, got {'rope_theta': 1e-30, 'rope_type'",
        ),
    ],
)
def test_a_config_made_by_hand_is_checked(change, message):
    fields = {"vocab_size": 11, "hidden_size": 10, "intermediate_size": 13, "layers": 2, "heads": 8, "kv_heads": 2}
    if message is None:
        Config(**{**fields, "head_dim": 6, **change})
    else:
        with pytest.raises(ValueError, match="expected") as error:
            Config(**{**fields, "head_dim": 6, **change})
        assert str(error.value).startswith(message)
