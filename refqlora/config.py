"""A decoder's shape: what config.json says, and which parameters follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Config:
    """A Llama's numbers, by the legend in functional.py.

    `from_dict` reads transformers' config.json, old and new spellings; `to_dict` writes it.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # h
    eps: float = 1e-6  # added to the mean square in RMSNorm
    rope_theta: float = 10000.0
    tied: bool = False  # the output head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim")
        for field in (*sizes, "max_positions"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of 1 or more, not {value!r}")
        for field in ("eps", "rope_theta"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{field} must be a positive number, not {value!r}")
        for field in ("tied", "attention_bias", "mlp_bias"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise ValueError(f"{field} must be true or false, not {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}")

    @classmethod
    def from_dict(cls, d: dict[str, Any], where: str = "config") -> Config:
        """From transformers' config.json. Raises ValueError, beginning with `where`, for a field that is missing or
        an option that is not supported."""

        def need(key: str) -> Any:
            if d.get(key) is None:
                raise ValueError(f'{where}: has no "{key}"')
            return d[key]

        if need("model_type") != "llama":
            raise ValueError(f'{where}: model_type "{d["model_type"]}" is not supported; supported: "llama"')
        if d.get("hidden_act", "silu") != "silu":
            raise ValueError(f'{where}: hidden_act "{d["hidden_act"]}" is not supported; supported: "silu"')
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: the RoPE parameters must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f'{where}: RoPE of type "{kind}" is not supported; supported: "default"')
        heads = need("num_attention_heads")
        eos = d.get("eos_token_id")
        try:
            return cls(
                vocab_size=need("vocab_size"),
                hidden_size=need("hidden_size"),
                intermediate_size=need("intermediate_size"),
                layers=need("num_hidden_layers"),
                heads=heads,
                kv_heads=d.get("num_key_value_heads") or heads,
                head_dim=need("hidden_size") // heads if d.get("head_dim") is None else d["head_dim"],
                eps=d.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or d.get("rope_theta") or 10000.0),
                tied=d.get("tie_word_embeddings") or False,
                attention_bias=d.get("attention_bias") or False,
                mlp_bias=d.get("mlp_bias") or False,
                max_positions=d.get("max_position_embeddings", 2048),
                bos_token_id=d.get("bos_token_id"),
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{where}: {error}") from None
        except ValueError as error:
            raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None

    def to_dict(self, dtype: Any = np.float32) -> dict[str, Any]:
        """transformers' config.json for weights stored in `dtype`, in its new spelling with the old one beside it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "dtype": np.dtype(dtype).name,
            "torch_dtype": np.dtype(dtype).name,
        }

    # ---- what follows from it ----

    @property
    def head(self) -> str:
        """The name of the output head's weight (V, D)."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def linears(self) -> list[str]:
        """The linears inside the layers, in the order of the forward: what adapters and quantisation apply to."""
        names = [f"self_attn.{name}" for name in _ATTENTION]
        names += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        return [f"model.layers.{i}.{name}" for i in range(self.layers) for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape; a linear's weight is (out, in)."""
        d, f, q, k = self.hidden_size, self.intermediate_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = {
            "q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for name in self.linears():
            kind = name.rsplit(".", 1)[-1]
            shapes[name + ".weight"] = linear[kind]
            if self.attention_bias if kind in _ATTENTION else self.mlp_bias:
                shapes[name + ".bias"] = linear[kind][:1]
        for i in range(self.layers):
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (d,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (d,)
        shapes["model.norm.weight"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def rope_frequencies(self) -> np.ndarray:
        """theta^(-2i/h) for the pairs i < h/2, float64 (h/2,) (Su et al. 2021, eq. 15)."""
        return self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
