"""Every architecture held live against transformers and PEFT: files, logits, losses, all gradients, generation.

A difference is that of a tensor's worst element, relative to the tensor's largest element; of several tensors, the
worst counts. `pytest -rP` prints each. Everything is float32 on both sides.
"""

import json
import logging
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from closeness import agree_but_for_rounding
from pairs import agree
from safetensors.numpy import load_file, save_file

import refqlora as rq
from refqlora.files import pretrained
from refqlora.files.config_json import config_from_dict, config_to_dict
from refqlora.parity.differences import relative_difference as difference
from refqlora.parity.oracles import arrays, logits_of, trained
from refqlora.parity.settings import batch, shifted

SIZES = {
    "vocab_size": 37,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 300,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ODD = {"hidden_size": 54, "num_attention_heads": 9}  # SmolLM's: 9 heads, of 6 elements here
ONE_KEY = {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1}
GPT2 = {
    "vocab_size": 37, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 300,
    "bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 75}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 3.0, 7.0],
    "factor": 300 / 64,
}  # fmt: skip

# (model_type, transformers' config class, small configurations of it)
CASES = [
    (
        "llama",
        "LlamaConfig",
        [
            SIZES | {"head_dim": 8},
            SIZES | ODD | TIED | {"rope_parameters": LLAMA3},
            SIZES | ONE_KEY | {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True},
            SIZES | TIED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
            SIZES
            | {"max_position_embeddings": 150}  # fewer than the long text has
            | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        ],
    ),
    (
        "mistral",
        "MistralConfig",
        [
            SIZES | {"head_dim": 8, "sliding_window": 9},
            SIZES | ODD | TIED | {"sliding_window": 150},
            SIZES | ONE_KEY | {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ],
    ),
    (
        "qwen2",
        "Qwen2Config",
        [
            SIZES,
            SIZES | ODD | TIED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            SIZES | ONE_KEY | {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 9}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ],
    ),
    (
        "qwen3",
        "Qwen3Config",
        [
            SIZES | {"head_dim": 10},
            SIZES | ODD | TIED | {"head_dim": 8, "attention_bias": True},
            SIZES | ONE_KEY | {"head_dim": 14, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        ],
    ),
    (
        "gemma2",
        "Gemma2Config",
        [
            SIZES | {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 20, "pad_token_id": 0},
            SIZES | ODD | UNTIED | {"head_dim": 6, "sliding_window": 150, "attention_bias": True}
            | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
            SIZES | ONE_KEY | {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 8}
            | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        ],
    ),
    (
        "phi3",
        "Phi3Config",
        [
            SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
            SIZES | ODD | TIED | {"sliding_window": 9, "original_max_position_embeddings": 64}
            | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
            SIZES | {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 5, "sliding_window": 150}
            | {"original_max_position_embeddings": 64}
            | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.6}},
        ],
    ),
    (
        "gpt2",
        "GPT2Config",
        [
            GPT2,
            GPT2 | UNTIED | {"n_embd": 35, "n_head": 5, "n_inner": 44, "scale_attn_by_inverse_layer_idx": True},
            GPT2 | {"n_embd": 27, "n_head": 9, "scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"},
        ],
    ),
]  # fmt: skip
EACH = [
    pytest.param(config_class, kwargs, id=f"{name} {i}")
    for name, config_class, several in CASES
    for i, kwargs in enumerate(several, 1)
]
FIRST = [pytest.param(config_class, several[0], id=name) for name, config_class, several in CASES]
SHAPES = {"short": (4, 11), "longer than two tiles of attention": (2, 270)}


def their_model(config_class, kwargs, seed=0):
    """Weights of order one: matrices 1/sqrt(in), norms about 1, biases about 0.3; its own attention, for softcaps.

    The last norm's weights have either sign, or a tied model would say the last token again and again.
    """
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**kwargs)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                inputs = p.shape[0] if ".c_" in name else p.shape[1]  # GPT-2's are (in, out)
                p.normal_(0, inputs**-0.5)
            elif name in ("model.norm.weight", "transformer.ln_f.weight"):
                p.normal_(-1 if config.model_type == "gemma2" else 0, 1)
            else:
                p.normal_(0 if name.endswith("bias") or config.model_type == "gemma2" else 1, 0.3)
    return model


def ours_of(theirs, path):
    theirs.save_pretrained(path)
    return rq.Model.from_pretrained(path)


def ours_and_theirs(config_class, kwargs, path):
    theirs = their_model(config_class, kwargs)
    return ours_of(theirs, path), theirs


def their_gradients(theirs, ours):
    """By our names, in our layout."""
    named = [(name, p.grad.numpy()) for name, p in theirs.named_parameters()]
    return dict(pretrained.from_file(ours.config, name, grad) for name, grad in named)


def step(ours, tokens, labels, **options):
    """Logits, loss and the gradients of what is trained."""
    logits, cache = ours.forward(tokens, **options)
    loss, dlogits = rq.cross_entropy(logits, shifted(labels))
    return logits, loss, ours.backward(dlogits, cache)


def silently(call):
    """call(), in which a warning or a line in transformers' log is an error."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            result = call()
    finally:
        logger.removeHandler(handler)
    assert said == []
    return result


# ---- the base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("config_class", "kwargs"), EACH)
def test_logits_loss_and_the_gradients_of_all_parameters(config_class, kwargs, shape, tmp_path):
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path)
    tokens, labels = batch(shape=shape)
    expected = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels))
    expected.loss.backward()
    logits, loss, grads = step(ours, tokens, labels)
    assert logits.dtype == np.float32
    agree("logits", logits, expected.logits.detach().numpy())
    agree("loss", loss, expected.loss.item())
    exact = step(rq.Model.from_pretrained(tmp_path, dtype=np.float64), tokens, labels)[2]
    agree_but_for_rounding("gradients", grads, their_gradients(theirs, ours), exact)
    again = step(ours, tokens, labels, recompute=True)[2]
    assert all(np.array_equal(again[name], grad) for name, grad in grads.items())


def test_the_embedding_of_the_padding_gets_no_gradient_from_the_lookup(tmp_path):
    kwargs = SIZES | {"pad_token_id": 11}
    ours, theirs = ours_and_theirs("LlamaConfig", kwargs, tmp_path)
    tokens, labels = batch()
    assert (tokens == 11).any()
    theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels)).loss.backward()
    grads = step(ours, tokens, labels)[2]
    assert (grads["model.embed_tokens.weight"][11] == 0).all()
    agree("gradients", grads, their_gradients(theirs, ours))


@pytest.mark.parametrize(("config_class", "kwargs"), EACH)
def test_greedy_generation_token_for_token(config_class, kwargs, tmp_path):
    """Past the window and past the context that "longrope" was first trained for: 64 positions."""
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path)
    prompt = np.random.default_rng(3).integers(0, 37, (1, 50))
    expected = theirs.generate(
        torch.from_numpy(prompt),
        attention_mask=torch.ones(1, 50, dtype=torch.long),  # else token 0, its padding, is not seen
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = list(rq.generate(ours, prompt[0], max_new_tokens=40))
    assert found == expected[0, 50:].tolist()
    assert len(set(found)) > 2


# ---- adapters ----------------------------------------------------------------------------------------------


def their_adapter(theirs, **options):
    """PEFT's LoRA on all linears, B not zero."""
    torch.manual_seed(1)
    conv1d = theirs.config.model_type == "gpt2"
    config = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "fan_in_fan_out": conv1d} | options
    model = peft.get_peft_model(theirs, peft.LoraConfig(**config, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("config_class", "kwargs"), EACH)
def test_gradients_of_the_adapters_of_all_linears(config_class, kwargs, shape, tmp_path):
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path / "base")
    adapted = their_adapter(theirs)
    adapted.save_pretrained(tmp_path / "adapter")
    ours.load_adapter(tmp_path / "adapter")
    tokens, labels = batch(shape=shape)
    expected = adapted(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels))
    expected.loss.backward()
    logits, loss, grads = step(ours, tokens, labels)
    agree("logits", logits, expected.logits.detach().numpy())
    agree("loss", loss, expected.loss.item())
    exact = rq.Model.from_pretrained(tmp_path / "base", dtype=np.float64)
    exact.load_adapter(tmp_path / "adapter")
    theirs = arrays([(name, p.grad) for name, p in trained(adapted)])
    agree_but_for_rounding("gradients", grads, theirs, step(exact, tokens, labels)[2])


@pytest.mark.parametrize(("config_class", "kwargs"), FIRST)
def test_adapters_that_we_save_load_in_peft_without_a_word(config_class, kwargs, tmp_path):
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path / "base")
    targets = ("c_attn",) if config_class == "GPT2Config" else "all-linear"
    ours.add_adapter(rank=3, alpha=9, targets=targets)
    rng = np.random.default_rng(0)
    for p in ours.trainable().values():
        p[...] = rng.standard_normal(p.shape) * 0.1
    ours.save_adapter(tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] == (config_class == "GPT2Config")
    adapted = silently(lambda: peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True))
    loaded = arrays(trained(adapted))
    assert loaded.keys() == ours.trainable().keys()
    for name, p in loaded.items():
        np.testing.assert_array_equal(p, ours.trainable()[name], err_msg=name)
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(adapted, tokens))


# ---- model files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_class", "kwargs"), EACH)
def test_what_we_save_loads_in_transformers_without_a_word(config_class, kwargs, tmp_path):
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    load = transformers.AutoModelForCausalLM.from_pretrained
    again, info = silently(lambda: load(tmp_path / "ours", output_loading_info=True, attn_implementation="eager"))
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    changed = {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "architectures",
        "max_window_layers",
        "attn_pdrop",
        "embd_pdrop",
    }
    changed |= {"resid_pdrop", "original_max_position_embeddings", "activation_function", "n_inner"}
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in before.items() if k not in changed and after.get(k) != v} == {}
    for shape in SHAPES.values():
        tokens, _ = batch(shape=shape)
        agree("logits", logits_of(again.eval(), tokens), logits_of(theirs, tokens), 1e-6)
    again.save_pretrained(tmp_path / "again")
    assert rq.Model.from_pretrained(tmp_path / "again").config == ours.config


@pytest.mark.parametrize(("config_class", "kwargs"), [case for case in EACH if case.id in ("gpt2 1", "gemma2 1")])
def test_a_base_model_saved_without_its_head(config_class, kwargs, tmp_path):
    ours, theirs = ours_and_theirs(config_class, kwargs, tmp_path / "whole")
    theirs.base_model.save_pretrained(tmp_path / "base")
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert {"wte.weight", "h.0.attn.c_attn.weight"} <= names or {"embed_tokens.weight", "norm.weight"} <= names
    found = rq.Model.from_pretrained(tmp_path / "base")
    assert found.params.keys() == ours.params.keys()
    assert all(np.array_equal(found.params[name], p) for name, p in ours.params.items())


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_the_masks_in_older_gpt2_files_are_left_out(dtype, tmp_path):
    ours, _ = ours_and_theirs("GPT2Config", GPT2, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(3):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 300, 300), dtype))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = rq.Model.from_pretrained(tmp_path)
    assert all(np.array_equal(found.params[name], p) for name, p in ours.params.items())


# The config.json files of the hub as they are spelt there, in small sizes.
SMALL = {
    "vocab_size": 37, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 300, "initializer_range": 0.02, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG_SHORT = {"long_factor": [1.2, 3.0, 7.0], "short_factor": [1.0, 1.1, 1.3]}
HUB = {
    "Llama-3.1": SMALL
    | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": [2, 5, 6], "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
    },
    "Llama-2-7b": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "a Llama stretched with type": SMALL
    | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "pad_token_id": 0, "rope_scaling": {"type": "linear", "factor": 2.5}, "torch_dtype": "float32",
        "transformers_version": "4.31.0",
    },
    "Mistral-7B-v0.1": SMALL
    | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 9, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
    },
    "Mistral-7B-v0.3": SMALL
    | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
    },
    "Qwen2.5-0.5B": SMALL
    | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu",
        "max_window_layers": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 9,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen2.5-7B-Instruct with YaRN": SMALL
    | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu",
        "max_window_layers": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 9,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 75, "type": "yarn"},
        "use_sliding_window": True,
    },
    "Qwen3-0.6B": SMALL
    | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
        "head_dim": 16, "hidden_act": "silu", "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_sliding_window": False,
    },
    "gemma-2-2b": SMALL
    | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 9, "torch_dtype": "float32", "transformers_version": "4.42.4",
    },
    "Phi-3-mini-4k": SMALL
    | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "attention_bias": False, "hidden_act": "silu", "original_max_position_embeddings": 300, "pad_token_id": 30,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 9,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
    },
    "Phi-3-mini-128k": SMALL
    | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "hidden_act": "silu", "original_max_position_embeddings": 64, "pad_token_id": 30, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": {**LONG_SHORT, "type": "longrope"}, "rope_theta": 10000.0,
        "sliding_window": 600, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
    },
    "Phi-4-mini": SMALL
    | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 48, "pad_token_id": 30,
        "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu", "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05, "rope_scaling": {**LONG_SHORT, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
    },
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 1,
        "embd_pdrop": 0.1, "eos_token_id": 2, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 300, "n_embd": 36, "n_head": 6, "n_layer": 3, "n_positions": 300,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 37,
    },
}  # fmt: skip


@pytest.mark.parametrize("d", HUB.values(), ids=HUB)
def test_config_json_as_the_hub_has_it(d, tmp_path):
    """transformers reads the file and makes the model; we read the same file, not what transformers makes of it."""
    text = json.dumps(d)
    (tmp_path / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    ours = rq.Model.from_pretrained(tmp_path)
    eos = d["eos_token_id"]
    assert ours.config.eos_token_id == (tuple(eos) if isinstance(eos, list) else eos)
    for shape in SHAPES.values():
        tokens, _ = batch(shape=shape)
        agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(ours.config)))) == ours.config


def test_the_first_spelling_of_phi3s_longrope():
    """transformers 5 refuses a file with it, whose meaning is known."""
    found = []
    for name in ("longrope", "su", "yarn"):
        d = json.loads(json.dumps(HUB["Phi-3-mini-128k"]))
        d["rope_scaling"]["type"] = name
        found.append(config_from_dict(d))
    assert found[0].rope_scaling["rope_type"] == "longrope"
    assert found[0] == found[1] == found[2]


# ---- 4 bits ------------------------------------------------------------------------------------------------

FOUR_BIT = {
    "GPT2Config": GPT2 | {"n_embd": 128, "n_head": 4, "n_inner": 192},
    "Phi3Config": SIZES | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 192},
}  # fmt: skip


@pytest.mark.parametrize(("config_class", "kwargs"), FOUR_BIT.items(), ids=FOUR_BIT)
def test_adapters_on_linears_that_bitsandbytes_quantised(config_class, kwargs, tmp_path):
    """Fused linears, and GPT-2's, whose weight bitsandbytes transposes before it quantises: the same 4 bits as ours."""
    pytest.importorskip("bitsandbytes")
    their_model(config_class, kwargs).save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    adapted = their_adapter(theirs, fan_in_fan_out=False)
    adapted.train()  # in eval mode bitsandbytes computes in bfloat16 on a CPU
    ours = rq.Model.from_pretrained(tmp_path)
    ours.quantize(double_quant=False)
    for name, p in adapted.get_base_model().named_parameters():
        if hasattr(p, "quant_state"):
            np.testing.assert_array_equal(ours.params[name.replace(".base_layer", "")].packed, p.numpy().ravel())
    ours.add_adapter(rank=5, alpha=7)
    start = arrays(trained(adapted))
    assert start.keys() == ours.trainable().keys()
    for name, p in start.items():
        ours.trainable()[name][...] = p
    tokens, labels = batch()
    expected = adapted(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels))
    expected.loss.backward()
    logits, loss, grads = step(ours, tokens, labels)
    agree("logits", logits, expected.logits.detach().numpy())
    agree("loss", loss, expected.loss.item())
    agree("gradients", grads, arrays([(name, p.grad) for name, p in trained(adapted)]))


# ---- that it can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"windows": (10, 10, 10)}),
        ("qwen2", {"rope_theta": 11000.0}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": None}),
        ("phi3", {"partial_rotary_factor": 1.0}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_a_planted_error_shows(name, change, tmp_path):
    config_class, several = next((config_class, several) for other, config_class, several in CASES if other == name)
    ours, theirs = ours_and_theirs(config_class, several[0], tmp_path)
    tokens, _ = batch()
    wrong = rq.Model(rq.Config(**{**vars(ours.config), **change}), ours.params)
    assert difference(wrong.forward(tokens)[0], logits_of(theirs, tokens)) > 1e-4
