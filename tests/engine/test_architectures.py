"""The architectures: their tensors in files, their config.json, and what they refuse. No torch is needed here."""

import dataclasses
import json

import numpy as np
import pytest
from gradcheck import ARCHITECTURES as TINY
from gradcheck import B, T, V, of_architecture, r, stir

import refqlora as rq
from refqlora import attention
from refqlora.architectures import ARCHITECTURES
from refqlora.files.config_json import config_from_dict, config_to_dict
from refqlora.files.pretrained import from_file, to_file
from refqlora.files.reading import read_tensors
from refqlora.files.writing import write_tensors
from refqlora.kv_cache import KVCache

TOKENS = np.random.default_rng(0).integers(0, V, (B, T))


def test_every_architecture_is_tried_here():
    assert TINY.keys() == ARCHITECTURES.keys()


# ---- the decoder -------------------------------------------------------------------------------------------


def test_each_architecture_is_another_function():
    logits = {name: of_architecture(name).forward(TOKENS)[0].tobytes() for name in TINY}
    assert len(set(logits.values())) == len(TINY)


@pytest.mark.parametrize("pieces", [[1] * T, [3, 4], [2, 1, 4]])
@pytest.mark.parametrize("name", TINY)
def test_decoding_with_the_cache_equals_the_whole_forward(monkeypatch, name, pieces):
    monkeypatch.setattr(attention, "TILE", 3)
    m = of_architecture(name, **({"rope_scaling": None} if name == "phi3" else {}))
    m.add_adapter(rank=r, alpha=8)
    stir(m.trainable())
    kv, logits, start = KVCache(m.config, batch=B, capacity=T, dtype=np.float64), [], 0
    for n in pieces:
        logits.append(m.forward(TOKENS[:, start : start + n], kv=kv)[0])
        start += n
    whole = m.forward(TOKENS)[0]
    assert abs(np.concatenate(logits, axis=1) - whole).max() < 1e-12 * abs(whole).max()


@pytest.mark.parametrize("name", TINY)
def test_no_token_sees_a_later_one(name):
    m = of_architecture(name, **({"rope_scaling": None} if name == "phi3" else {}))
    whole, _ = m.forward(TOKENS)
    for t in (1, 4):
        np.testing.assert_allclose(m.forward(TOKENS[:, :t])[0], whole[:, :t], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_cached_keys_are_made_anew_where_the_frequencies_of_rope_change(kind):
    if kind == "longrope":
        m = of_architecture("phi3", max_positions=12)
    else:
        m = of_architecture("llama", rope_scaling={"rope_type": "dynamic", "factor": 3.0}, max_positions=12)
    prompt = [3, 1, 4]  # and 4 is the original context of longrope
    found = list(rq.generate(m, prompt))
    tokens = list(prompt)
    for token in found:
        assert token == m.forward(np.array([tokens]))[0][0, -1].argmax()
        tokens.append(token)
    assert len(tokens) == 12

    change = 4 if kind == "longrope" else 12
    kv = KVCache(m.config, 1, 20, np.float64)
    m.forward(np.arange(change)[None] % V, kv=kv)
    with pytest.raises(
        ValueError, match=rf"RoPE's frequencies change at {change + 1} positions, so the {change} cached"
    ):
        m.forward(np.array([[5]]), kv=kv)


def test_a_text_longer_than_the_learned_positions_is_refused():
    m = of_architecture("gpt2")
    assert m.forward(np.zeros((1, T + 2), int))[0].shape == (1, T + 2, V)
    with pytest.raises(ValueError, match=rf"tokens: expected at most {T + 2} positions, got {T + 3}"):
        m.forward(np.zeros((1, T + 3), int))
    kv = KVCache(m.config, 1, T + 3, np.float64)
    m.forward(np.zeros((1, T + 2), int), kv=kv)
    with pytest.raises(ValueError, match=rf"got {T + 3}"):
        m.forward(np.zeros((1, 1), int), kv=kv)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_have_norms_that_multiply_by_one(name):
    m = rq.Model.from_config(of_architecture(name).config)
    for param, p in m.params.items():
        if p.ndim == 1:
            one = not param.endswith("bias") and name != "gemma2"
            assert (p == one).all(), param
    assert np.isfinite(m.forward(TOKENS)[0]).all()


@pytest.mark.parametrize("name", TINY)
def test_quantisation_and_adapters_take_all_linears_and_nothing_else(name):
    m = of_architecture(name)
    m.quantize()
    quantized = [param for param, p in m.params.items() if isinstance(p, rq.QuantizedTensor)]
    assert quantized == [linear + ".weight" for linear in m.config.linears()]
    dense = {param for param, p in m.params.items() if len(p.shape) == 2} - set(quantized)
    a = m.config.architecture
    assert dense <= {m.config.head, f"{a.embedding}.weight", f"{a.positions}.weight"}
    m.add_adapter(rank=r)
    assert len(m.trainable()) == 2 * len(m.config.linears())
    for linear in m.config.linears():
        n, inputs = m.params[linear + ".weight"].shape
        assert m.trainable()[linear + ".lora_A.weight"].shape == (r, inputs)
        assert m.trainable()[linear + ".lora_B.weight"].shape == (n, r)


def test_fused_projections_are_one_linear():
    assert of_architecture("phi3").config.linears()[:4] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    m = of_architecture("gpt2")
    m.add_adapter(rank=r, targets=("c_attn", "mlp.c_proj"))
    assert list(m.trainable())[:4] == [
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "transformer.h.0.attn.c_attn.lora_B.weight",
        "transformer.h.0.mlp.c_proj.lora_A.weight",
        "transformer.h.0.mlp.c_proj.lora_B.weight",
    ]


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_loads_again(name, tmp_path):
    m = of_architecture(name, dtype=np.float32)
    m.save_pretrained(tmp_path)
    again = rq.Model.from_pretrained(tmp_path)
    assert again.config == m.config
    assert list(again.params) == list(m.params)
    assert all(np.array_equal(p, m.params[param]) and p.flags.c_contiguous for param, p in again.params.items())
    nf4 = rq.Model.from_pretrained(tmp_path, quantize="nf4")
    m.quantize()
    assert np.array_equal(nf4.forward(TOKENS)[0], m.forward(TOKENS)[0])


def test_gpt2s_files_hold_the_linears_transposed(tmp_path):
    m = of_architecture("gpt2", dtype=np.float32)
    m.save_pretrained(tmp_path)
    stored = dict(read_tensors(tmp_path / "model.safetensors"))
    for name, p in m.params.items():
        linear = name.removesuffix(".weight") in m.config.linears()
        assert np.array_equal(stored[name], p.T if linear else p), name
        assert from_file(m.config, *to_file(m.config, name, p))[0] == name
    quantized = rq.quantize(m.params["transformer.h.0.mlp.c_fc.weight"], name="w")
    assert from_file(m.config, "transformer.h.0.mlp.c_fc.weight", quantized)[1] is quantized  # (out, in) in files too


@pytest.mark.parametrize("name", TINY)
def test_a_base_model_without_its_prefix_loads(name, tmp_path):
    m = of_architecture(name, dtype=np.float32)
    m.save_pretrained(tmp_path)
    prefix = ARCHITECTURES[name].prefix
    stored = {param.removeprefix(prefix): p for param, p in read_tensors(tmp_path / "model.safetensors")}
    write_tensors(tmp_path / "model.safetensors", stored)
    again = rq.Model.from_pretrained(tmp_path)
    assert all(np.array_equal(again.params[param], p) for param, p in m.params.items())
    write_tensors(tmp_path / "model.safetensors", stored | {"score.weight": np.ones((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r": score\.weight is not expected in this model"):
        rq.Model.from_pretrained(tmp_path)


def test_what_older_writers_keep_is_not_read(tmp_path):
    m = of_architecture("gpt2", dtype=np.float32)
    m.save_pretrained(tmp_path)
    stored = dict(read_tensors(tmp_path / "model.safetensors"))
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8)}
    write_tensors(tmp_path / "model.safetensors", stored | mask)
    again = rq.Model.from_pretrained(tmp_path)
    assert again.params.keys() == m.params.keys()


# ---- config.json -------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 37, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 6,
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_reads_back(name):
    config = of_architecture(name).config
    written = json.loads(json.dumps(config_to_dict(config, np.float16)))
    assert config_from_dict(written) == config
    assert written["architectures"] == [ARCHITECTURES[name].transformers]
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    if name != "qwen2":  # its layers may slide in any order, which only layer_types can say
        assert config_from_dict(old) == config


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 9}, None),
        ({"model_type": "mistral", "num_key_value_heads": 3}, (4096,) * 4),
        ({"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 9}, (9,) * 4),
        ({"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": None}, None),
        ({"model_type": "phi3"}, None),
        ({"model_type": "phi3", "sliding_window": 9}, (9,) * 4),
        ({"model_type": "qwen2", "num_key_value_heads": 3, "sliding_window": 9, "max_window_layers": 0}, None),
        (
            {"model_type": "qwen2", "num_key_value_heads": 3, "sliding_window": 9, "max_window_layers": 3}
            | {"use_sliding_window": True},
            (None, None, None, 9),
        ),
        ({"model_type": "qwen3", "num_key_value_heads": 3, "use_sliding_window": True}, None),  # 28 layers are full
        (
            {"model_type": "qwen3", "num_key_value_heads": 3, "sliding_window": 9, "use_sliding_window": True}
            | {"layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 9, None, 9),
        ),
        ({"model_type": "gemma2", "num_key_value_heads": 3}, (4096, None, 4096, None)),
        ({"model_type": "gemma2", "num_key_value_heads": 3, "layer_types": ["full_attention"] * 4}, None),
    ],
)
def test_sliding_windows(options, windows):
    config = config_from_dict(SMALL | options)
    assert config.windows == windows
    assert [config.window(i) for i in range(4)] == list(windows or (None,) * 4)
    assert config_from_dict(config_to_dict(config)) == config


def test_what_each_config_json_may_leave_out():
    gemma2 = config_from_dict(SMALL | {"model_type": "gemma2", "num_attention_heads": 4})
    assert (gemma2.kv_heads, gemma2.head_dim, gemma2.tied, gemma2.pad_token_id) == (4, 256, True, 0)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert gemma2.attention_scale(3) == 256**-0.5
    gpt2 = config_from_dict({"model_type": "gpt2", "vocab_size": 11, "n_embd": 36, "n_layer": 3, "n_head": 6})
    assert (gpt2.intermediate_size, gpt2.max_positions, gpt2.eps, gpt2.tied) == (144, 1024, 1e-5, True)
    assert gpt2.attention_scale(2) == 6**-0.5
    each = dataclasses.replace(gpt2, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)
    assert each.attention_scale(2) == 1 / 3
    qwen3 = config_from_dict(SMALL | {"model_type": "qwen3", "num_attention_heads": 32})
    assert (qwen3.head_dim, qwen3.kv_heads, qwen3.max_positions) == (128, 32, 32768)
    phi3 = config_from_dict(SMALL | {"model_type": "phi3"})
    assert (phi3.eps, phi3.kv_heads, phi3.pad_token_id, phi3.padding) == (1e-5, 6, 32000, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 36, "n_head": 6}, '"n_layer" is missing'),
        ({"model_type": "gpt2", "n_embd": 36, "n_layer": 3, "n_head": 5}, "heads share hidden_size evenly"),
        ({"model_type": "gpt2", "n_embd": 36, "n_layer": 3, "n_head": 6, "activation_function": "relu"},
         'activation_function: .relu. is not supported; supported: "gelu_pytorch_tanh", "gelu_new"'),
        ({"model_type": "gpt2", "n_embd": 36, "n_layer": 3, "n_head": 6, "activation_function": "silu"},
         "activation_function: 'silu' is not supported"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is not supported"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
        ({"model_type": "gemma2", "num_key_value_heads": 3, "sliding_window": None}, "sliding_window is missing"),
        ({"model_type": "gemma2", "num_key_value_heads": 3, "hidden_activation": "gelu"},
         'hidden_activation: .gelu. is not supported; supported: "silu"'),
        ({"model_type": "gemma2", "num_key_value_heads": 3, "query_pre_attn_scalar": 0},
         "query_pre_attn_scalar: expected a number from .*, got 0"),
        ({"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 0}, "sliding_window: expected a"),
        ({"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 2.5}, "sliding_window: expected a"),
        ({"model_type": "mistral", "num_key_value_heads": 3, "layer_types": ["full_attention"] * 4},
         "expected one kind for all layers, by sliding_window"),
        ({"model_type": "qwen2", "num_key_value_heads": 3, "layer_types": ["full_attention"] * 3},
         "layer_types: expected 4 times"),
        ({"model_type": "qwen2", "num_key_value_heads": 3, "layer_types": ["chunked_attention"] * 4},
         "layer_types: expected 4 times"),
        ({"model_type": "qwen2", "num_key_value_heads": 3, "layer_types": ["sliding_attention"] * 4},
         "sliding_window is missing"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "expected 1/head_dim to 1, got 1.5"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.1}, "expected 1/head_dim to 1, got 0.1"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
         "short_factor: expected a list of 3"),
        ({"model_type": "qwen2", "num_key_value_heads": 3, "partial_rotary_factor": 0.5},
         'partial_rotary_factor: 0.5 is not supported with model_type "qwen2"'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=rf"^some/config\.json: .*{message}"):
        config_from_dict(SMALL | options, where="some/config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bert"}, "model_type: expected one of llama, mistral"),
        ({"model_type": "gpt2"}, "attention_bias: expected True for gpt2, got False"),
        ({"model_type": "qwen2"}, "attention_bias: expected True for qwen2, got False"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias: expected False for mistral, got True"),
        (
            {"model_type": "gpt2", "attention_bias": True, "mlp_bias": True},
            "activation: expected gelu_tanh for gpt2, got 'silu'",
        ),
        ({"activation": "relu"}, "activation: expected silu or gelu_tanh for llama, got 'relu'"),
        ({"windows": (3,)}, r"windows: expected None or one size for each of 2 layers, got \(3,\)"),
        ({"windows": (3, 4)}, "windows: expected"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: expected a value for RoPE"),
    ],
)
def test_a_config_made_by_hand_must_be_one_that_there_is(options, message):
    with pytest.raises(ValueError, match=message):
        rq.Config(11, 12, 13, layers=2, heads=4, kv_heads=4, head_dim=6, **options)
