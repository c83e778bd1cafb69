"""What is held against the libraries: the architectures, the adapters, their sizes, and how both sides are trained."""

from __future__ import annotations

from typing import Any

import numpy as np

# Name: transformers' config class, and what is set beside `sizes`. A window shorter than the text and softcaps near
# the scores' size, so that leaving one out shows.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {  # wavelengths on either side of both bounds, and between them
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

# Name: fields of PEFT's LoraConfig. "adapters" of every architecture are LORA.
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
    """Of a model of two layers and about this many weights; no two are equal."""
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


# Every in_features a multiple of 64: with others bitsandbytes may be wrong on a CPU with AVX512.
def sizes_4bit(weights: int) -> dict[str, Any]:
    d = 64 * max(1, round((weights / 30) ** 0.5 / 64))
    return sizes(weights) | {
        "vocab_size": 37,
        "hidden_size": d,
        "intermediate_size": 3 * d,
        "head_dim": d // 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


# AdamW divides each gradient by its own size. With the usual eps, 1e-8, a parameter whose gradient is rounding
# noise goes either way by a whole learning rate, rightly on both sides, and takes the others along. With an eps
# of about the clipped gradients' own size a step is a smooth function of the gradient, and all can be held
# against each other. The learning rate is so large that the adapters move by about their own size: then a
# tensor's largest element is a fair measure of an error in the update, too.
STEP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.1}
MAX_NORM = 0.2
STEPS = 20


def batch(seed: int = 0, vocabulary: int = 37, shape: tuple[int, int] = (B, T)) -> tuple[np.ndarray, np.ndarray]:
    """tokens (B, T), and labels (B, T) as transformers takes them: not shifted. Some rows' starts do not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, shape)
    labels = tokens.copy()
    for row, length in enumerate(rng.integers(0, shape[1] - 2, shape[0])):
        labels[row, :length] = -100
    return tokens, labels


def shifted(labels: np.ndarray) -> np.ndarray:
    """labels as refqlora takes them: the token that each position must predict."""
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), -100)], axis=1)
