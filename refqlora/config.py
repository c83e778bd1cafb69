"""A decoder's numbers, and the parameters that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .architectures import ARCHITECTURES, Architecture
from .checks import POSITIVE, SIZE, SWITCH, TEXT, TOKENS, Rule, check, check_mapping, cut, shown, whole
from .rope import check_scaling, rope_frequencies

# What each field must be unless it is None; files/config_json.py checks config.json by the same rules.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "heads", "kv_heads", "max_positions"), SIZE),
    "layers": whole(1, 9999),
    "head_dim": whole(1, 65536),
    "model_type": TEXT,
    **dict.fromkeys(("eps", "rope_theta", "partial_rotary_factor"), POSITIVE),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), POSITIVE),
    **dict.fromkeys(("tied", "attention_bias", "mlp_bias"), SWITCH),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), SWITCH),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), whole(-(2**31))),  # some files say -1 for none
    "eos_token_id": TOKENS,
}


@dataclass(frozen=True)
class Config:
    """A decoder's numbers, by the legend in functional.py; `model_type` says which parts it has.

    files/config_json.py reads and writes it as transformers' config.json.

        >>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, layers=2, heads=2, kv_heads=1, head_dim=8)
        >>> rq.Config(**sizes).shapes()["model.layers.1.self_attn.k_proj.weight"]
        (8, 16)

    Raises ValueError that begins with the field at fault.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # h
    model_type: str = "llama"  # one of ARCHITECTURES
    activation: str = "silu"  # of the MLP: "silu" or "gelu_tanh"
    eps: float = 1e-6  # added to the mean square in a norm
    tied: bool = False  # the output head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False

    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": ..., "factor": ...}: see SCALINGS in rope.py
    partial_rotary_factor: float = 1.0  # the part of each head that RoPE rotates

    windows: tuple[int | None, ...] | None = None  # for each layer, how many keys a query sees, its own included
    query_pre_attn_scalar: float | None = None  # attention scores are q k^T / sqrt(this); None: h
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    scale_attn_weights: bool = True  # False: attention scores are q k^T
    scale_attn_by_inverse_layer_idx: bool = False  # True: those of layer i are divided by i + 1

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name, rule in RULES.items():
            if not (getattr(self, name) is None and name in optional):
                check(name, getattr(self, name), rule)
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {shown(self.model_type)}")
        for field, value in self.architecture.fixed.items():
            if getattr(self, field) != value:
                raise ValueError(f"{field}: expected {value} for {self.model_type}, got {getattr(self, field)}")
        activations = ("silu", "gelu_tanh") if self.architecture.gated else ("gelu_tanh",)
        if not isinstance(self.activation, str) or self.activation not in activations:
            expected = f"{' or '.join(activations)} for {self.model_type}"
            raise ValueError(f"activation: expected {expected}, got {shown(self.activation)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.architecture.positions is None:
            self._check_rope()
        elif self.heads != self.kv_heads or self.heads * self.head_dim != self.hidden_size:
            raise ValueError(f"{self.model_type}: its heads share hidden_size evenly, and each has its own keys")
        if not isinstance(self.windows, tuple | None):
            raise ValueError(f"windows: expected None or a tuple, got {shown(self.windows)}")
        if self.windows is not None:
            known = {w for w in self.windows if w is not None}
            if len(self.windows) != self.layers or len(known) > 1 or not all(SIZE.fits(w) for w in known):
                raise ValueError(
                    f"windows: expected None or one size for each of {self.layers} layers, got {shown(self.windows)}"
                )

    def _check_rope(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for RoPE, got {self.head_dim}")
        if self.partial_rotary_factor > 1 or self.rotary_dim < 1:
            raise ValueError(f"partial_rotary_factor: expected 1/head_dim to 1, got {self.partial_rotary_factor}")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling, pairs=(self.rotary_dim + 1) // 2)
        try:
            with np.errstate(all="ignore"):
                for length in (1, 2**31 - 1):  # a short text and a long one: their frequencies may differ
                    frequencies, factor = rope_frequencies(
                        self.rope_theta, self.rotary_dim, np.float32, self.rope_scaling, length, self.max_positions
                    )
                    if not np.isfinite(np.append(frequencies * np.float32(self.max_positions), factor)).all():
                        raise ArithmeticError
        except ArithmeticError:
            given = shown({"rope_theta": self.rope_theta, **(self.rope_scaling or {})}, 200)
            raise ValueError(f"rope_scaling: expected numbers that give finite frequencies, got {given}") from None

    # ---- what follows from it ----

    @property
    def architecture(self) -> Architecture:
        """Which parts there are, and what they are called."""
        return ARCHITECTURES[self.model_type]

    @property
    def rotary_dim(self) -> int:
        """How many elements of each head RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def rope_regime(self, length: int) -> int:
        """A number that changes when RoPE's frequencies do, as a text grows to `length` tokens: cached keys are valid
        only within one regime."""
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") == "dynamic":
            return max(length, self.max_positions)
        return int(scaling.get("rope_type") == "longrope" and length > scaling["original_max_position_embeddings"])

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text: none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, its own included; None: all up to its own."""
        return None if self.windows is None else self.windows[layer]

    def attention_scale(self, layer: int) -> float:
        """What this layer's attention scores are multiplied by."""
        scale = (self.query_pre_attn_scalar or self.head_dim) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def padding(self) -> int | None:
        """The token whose embedding gets no gradient from where it is looked up (torch's padding_idx)."""
        pad = self.pad_token_id if self.architecture.padding else None
        return pad if pad is not None and -self.vocab_size <= pad < self.vocab_size else None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """The sizes of q, k and v: H*h, K*h, K*h."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """The sizes of gate and up, F each; one F if the MLP is not gated."""
        return (self.intermediate_size,) * (2 if self.architecture.gated else 1)

    @property
    def head(self) -> str:
        """The name of the output head's weight (V, D)."""
        return self.architecture.embedding + ".weight" if self.tied else "lm_head.weight"

    def linears(self) -> list[str]:
        """The linears inside the layers, in the order of the forward: those that adapters and quantisation apply to."""
        a = self.architecture
        names = (*a.qkv, a.attention_out, *a.mlp_in, a.mlp_out)
        return [f"{a.layers}{i}.{name}" for i in range(self.layers) for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape; a linear's weight is (out, in)."""
        a, d = self.architecture, self.hidden_size
        q, f = self.qkv_sizes[0], self.intermediate_size
        linears = {  # name: out, in, bias
            **{name: (n, d, self.attention_bias) for name, n in _outputs(a.qkv, self.qkv_sizes).items()},
            a.attention_out: (d, q, self.attention_bias and a.out_bias),
            **{name: (n, d, self.mlp_bias) for name, n in _outputs(a.mlp_in, self.mlp_sizes).items()},
            a.mlp_out: (d, f, self.mlp_bias),
        }
        norms = (a.attention_norm, a.attention_post_norm, a.mlp_norm, a.mlp_post_norm)
        sizes = {name: d for name in norms if name} | dict.fromkeys(a.qk_norm, self.head_dim)
        shapes: dict[str, tuple[int, ...]] = {a.embedding + ".weight": (self.vocab_size, d)}
        if a.positions:
            shapes[a.positions + ".weight"] = (self.max_positions, d)
        for layer in (f"{a.layers}{i}." for i in range(self.layers)):
            for name, (n, inputs, bias) in linears.items():
                shapes[layer + name + ".weight"] = (n, inputs)
                if bias:
                    shapes[layer + name + ".bias"] = (n,)
        each = [(f"{a.layers}{i}.{name}", n) for i in range(self.layers) for name, n in sizes.items()]
        for name, n in (*each, (a.final_norm, d)):
            shapes[name + ".weight"] = (n,)
            if a.layernorm:
                shapes[name + ".bias"] = (n,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes


def _outputs(names: Sequence[str], sizes: Sequence[int]) -> dict[str, int]:
    """{linear: outputs}: a linear for each size, or one linear for all of them side by side."""
    return dict(zip(names, sizes, strict=True)) if len(names) == len(sizes) else {names[0]: sum(sizes)}


def check_shapes(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError naming the first tensor that is missing, misshapen or unexpected, if there is one."""
    check_mapping(where, params)
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"{where}: {name} {shape} is missing")
        found = getattr(params[name], "shape", None)
        if found != tuple(shape):
            raise ValueError(f"{where}: {name} has shape {found}, expected {tuple(shape)}")
    for name in params:
        if name not in shapes:
            raise ValueError(f"{where}: {cut(name, 200)} is not expected in this model")
