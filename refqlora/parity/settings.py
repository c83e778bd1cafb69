"""What is compared with the libraries: architectures, adapters and sizes, and how both sides are trained."""

from __future__ import annotations

from typing import Any

import numpy as np

# {name: (transformers' config class, fields besides `sizes`)}. Windows are shorter than the text and softcaps as large
# as the scores, so that a missing one is noticed.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {  # there are wavelengths below, between and above the bounds
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 13,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}

# {name: fields of PEFT's LoraConfig}; every architecture is checked with LORA.
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 7, "target_modules": "all-linear"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": LORA | {"use_rslora": True},
    "some-targets": LORA | {"target_modules": ["q_proj", "v_proj"]},
    "regex-targets": LORA | {"target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.(gate|down)_proj)"},
    "dora": LORA | {"use_dora": True},
    "pissa": LORA | {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]},
    "olora": LORA | {"init_lora_weights": "olora", "target_modules": ["k_proj", "up_proj"]},
}

B, T = 4, 11  # sequences and tokens of a batch


def sizes(weights: int, config: str = "LlamaConfig") -> dict[str, Any]:
    """The sizes, all different, of a model of two layers with about this many weights."""
    d = 12 * max(2, round((weights / 25) ** 0.5 / 12))
    common = {
        "vocab_size": d + 13,
        "hidden_size": d,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config == "GPT2Config":
        return common | {"n_inner": d + d // 4 + 4, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    common |= {"intermediate_size": d + d // 4 + 4, "num_key_value_heads": 3, "rms_norm_eps": 1e-5}
    if config == "Phi3Config":
        return common
    return common | {"head_dim": d // 6 // 2 * 2 + 6}  # not hidden_size / heads


def sizes_4bit(weights: int) -> dict[str, Any]:
    """The same with every in_features a multiple of 64: otherwise bitsandbytes may be wrong on a CPU with AVX512."""
    d = 64 * max(1, round((weights / 30) ** 0.5 / 64))
    return sizes(weights) | {
        "vocab_size": 37,
        "hidden_size": d,
        "intermediate_size": 3 * d,
        "head_dim": d // 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


# AdamW divides each gradient by its own size. With the usual eps, 1e-8, a parameter whose gradient is rounding noise
# moves by a full learning rate in either direction, and changes all others. With an eps about as large as the clipped
# gradients a step is a smooth function of the gradient, and both sides can be compared. The learning rate is so large
# that adapters move by about their own size, so that an error in the update is large relative to a tensor's elements.
STEP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.1}
MAX_NORM = 0.2
STEPS = 20


def batch(seed: int = 0, vocabulary: int = 37, shape: tuple[int, int] = (B, T)) -> tuple[np.ndarray, np.ndarray]:
    """tokens (B, T), and labels (B, T) as transformers takes them: not shifted. In some rows the first do not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, shape)
    labels = tokens.copy()
    for row, length in enumerate(rng.integers(0, shape[1] - 2, shape[0])):
        labels[row, :length] = -100
    return tokens, labels


def shifted(labels: np.ndarray) -> np.ndarray:
    """The labels as refqlora takes them: the token that each position must predict."""
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), -100)], axis=1)
