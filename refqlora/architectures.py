"""The architectures: how each differs from Llama, and how its files name and lay out the tensors.

Taken from transformers' modeling_*.py (version 5.23). files/config_json.py reads config.json by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One model_type: which parts it has and what they are called. The defaults are Llama's."""

    transformers: str  # the class that reads its files
    embedding: str = "model.embed_tokens"
    positions: str | None = None  # an embedding of the positions, in place of RoPE
    padding: bool = True  # the embedding of pad_token_id gets no gradient (torch's padding_idx)
    scaled_embedding: bool = False  # the embedding is multiplied by sqrt(D)

    layers: str = "model.layers."  # followed by the layer's number, a dot, and one of these:
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one linear for all three
    qk_norm: tuple[str, ...] = ()  # norms of each head of q and of k, before RoPE
    attention_out: str = "self_attn.o_proj"
    attention_post_norm: str | None = None  # norm of what attention adds to the residual stream
    mlp_norm: str = "post_attention_layernorm"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one linear for both
    mlp_out: str = "mlp.down_proj"
    mlp_post_norm: str | None = None  # norm of what the MLP adds
    final_norm: str = "model.norm"

    gated: bool = True  # the MLP is act(gate) * up; else act(in)
    layernorm: bool = False  # LayerNorm in place of RMSNorm
    norm_of_one_plus: bool = False  # a norm's weight is 1 + w
    out_bias: bool = True  # where attention has biases, attention_out has one too
    conv1d: bool = False  # files hold the linears' weights as (in, out)

    sliding: str | None = None  # which layers may slide: "all", "even", "upper" (those from max_window_layers on)
    options: tuple[str, ...] = ()  # the fields of Config that config.json states under the same names
    fixed: Mapping[str, Any] = field(default_factory=dict)  # those that it does not state, and their values
    keys: Mapping[str, str] = field(default_factory=dict)  # {Llama's key in config.json: this one's}
    defaults: Mapping[str, Any] = field(default_factory=dict)  # keys that config.json may leave out, and their values

    @property
    def prefix(self) -> str:
        """What every name but the output head's begins with: "model." or "transformer."."""
        return self.embedding.split(".")[0] + "."

    def key(self, key: str) -> str:
        """A key of Llama's config.json, as this architecture's config.json calls it."""
        return self.keys.get(key, key)


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", options=("attention_bias", "mlp_bias")),
    "mistral": Architecture(
        "MistralForCausalLM",
        sliding="all",
        fixed=_NO_BIAS,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        out_bias=False,
        sliding="upper",
        fixed={"attention_bias": True, "mlp_bias": False},
        defaults=_QWEN,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        sliding="upper",
        options=("attention_bias",),
        fixed={"mlp_bias": False},
        defaults={**_QWEN, "head_dim": 128},
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        scaled_embedding=True,
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        norm_of_one_plus=True,
        sliding="even",
        options=("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        fixed={"mlp_bias": False},
        keys={"hidden_act": "hidden_activation"},
        defaults={
            "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
            "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "pad_token_id": 0,
        },
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        qkv=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        sliding="all",
        fixed=_NO_BIAS,
        defaults={
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
        },
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        embedding="transformer.wte",
        positions="transformer.wpe",
        padding=False,
        layers="transformer.h.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_norm="ln_2",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        final_norm="transformer.ln_f",
        gated=False,
        layernorm=True,
        conv1d=True,
        options=("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        fixed={"attention_bias": True, "mlp_bias": True},
        keys={
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
        },
        defaults={
            "layer_norm_epsilon": 1e-5, "n_positions": 1024, "activation_function": "gelu_new",
            "tie_word_embeddings": True, "scale_attn_weights": True,
        },
    ),
}  # fmt: skip
