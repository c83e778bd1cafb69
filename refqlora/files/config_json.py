"""config.json as transformers writes it, in its new spelling and older ones, to the fields of a Config and back.

The defaults of fields that a file leaves out are those of transformers' configuration_*.py (version 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures import ARCHITECTURES
from ..checks import POSITIVE, SIZE, SWITCH, TEXT, TOKEN, TOKENS, Rule, check, number, shown, whole
from ..config import RULES, Config
from ..rope import SCALINGS
from .reading import read_json

_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}  # Llama's, and most others'
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_UNSUPPORTED = ("add_cross_attention", "use_bidirectional_attention")  # they would change the numbers
_KEYS = {  # a field of Config: Llama's key
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings", "eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
_RULES: dict[str, Rule] = {_KEYS.get(name, name): rule for name, rule in RULES.items()} | {
    "rope_type": TEXT,
    "type": TEXT,
    "sliding_window": SIZE,
    "use_sliding_window": SWITCH,
    "max_window_layers": whole(0),
    "original_max_position_embeddings": SIZE,
}
_GENERATION: dict[str, Rule] = {
    "eos_token_id": TOKENS,
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "do_sample": SWITCH,
    "temperature": number(0, 1e30),
    "repetition_penalty": POSITIVE,
    "top_p": Rule("a number above 0 and at most 1", number(5e-324, 1).fits),
    "min_p": number(0, 1),
    "top_k": whole(0, 2**63),
    "max_new_tokens": SIZE,
}


# ---- in --------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> tuple[Config, dict[str, Any]]:
    """config.json of a model's directory: as a Config, and as the dict in the file.

    Raises FileNotFoundError, or ValueError that names the file and the field.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise ValueError(f"{path.parent}: expected a model, got an adapter (give it as --adapter)")
        for file in sorted(path.parent.glob("*.gguf")):
            raise ValueError(f"{file}: expected config.json and *.safetensors, got llama.cpp's format")
    d = read_json(path)
    return config_from_dict(d, str(path)), d


def config_from_dict(d: Mapping[str, Any], where: str = "config") -> Config:
    """A config.json -> Config. Raises ValueError, beginning with `where`, for a field that is missing or invalid, or an
    option that is not supported.

    The base's own dropout (attn_pdrop, attention_dropout, ...) is ignored: it is never applied, as in eval mode.
    """
    try:
        return Config(**_fields(d))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class _Given:
    """The fields of a config.json under Llama's keys, each checked when it is read."""

    def __init__(self, d: Mapping[str, Any]) -> None:
        kind = d.get("model_type")
        if kind is None:
            raise ValueError('"model_type" is missing')
        check("model_type", kind, TEXT)
        if kind not in ARCHITECTURES:
            supported = ", ".join(f'"{name}"' for name in ARCHITECTURES)
            raise ValueError(f"model_type: {shown(kind)} is not supported; supported: {supported}")
        self.d = d
        self.architecture = ARCHITECTURES[kind]

    def get(self, key: str) -> Any:
        """The value, or the architecture's default if the file lacks the key; None if it is null."""
        name = self.architecture.key(key)
        value = self.d.get(name, self.architecture.defaults.get(name, _DEFAULTS.get(key)))
        return _checked(name, value, key)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f'"{self.architecture.key(key)}" is missing')
        return value


def _checked(name: str, value: Any, key: str) -> Any:
    if value is not None and key in _RULES:
        check(name, value, _RULES[key])
    return value


def _fields(d: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json -> the fields of a Config."""
    given = _Given(d)
    architecture, get, need = given.architecture, given.get, given.need
    for option in _UNSUPPORTED:
        if d.get(option):
            raise ValueError(f"{option} is not supported")
    vocabulary, hidden = need("vocab_size"), need("hidden_size")
    layers, heads = need("num_hidden_layers"), need("num_attention_heads")
    gpt2_default = 4 * hidden if d["model_type"] == "gpt2" else None
    eos = get("eos_token_id")
    return {
        "model_type": d["model_type"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": get("intermediate_size") or gpt2_default or need("intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": get("num_key_value_heads") or heads,
        "head_dim": get("head_dim") or hidden // heads,
        "activation": _read_activation(given),
        "eps": need("rms_norm_eps"),
        "tied": get("tie_word_embeddings") or False,
        "max_positions": need("max_position_embeddings"),
        "bos_token_id": get("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": get("pad_token_id"),
        "windows": _read_windows(given, layers),
        **(_read_rope(given) if architecture.positions is None else {}),
        **architecture.fixed,
        **{option: get(option) for option in architecture.options if get(option) is not None},
    }


def _read_activation(given: _Given) -> str:
    activation, architecture = given.get("hidden_act"), given.architecture
    supported = [name for name in _ACTIVATIONS if architecture.gated or name != "silu"]
    if activation not in supported:
        names = ", ".join(f'"{name}"' for name in supported)
        raise ValueError(f"{architecture.key('hidden_act')}: {shown(activation)} is not supported; supported: {names}")
    return _ACTIVATIONS[activation]


def _read_windows(given: _Given, layers: int) -> tuple[int | None, ...] | None:
    """Each layer's sliding window, or None for a layer without one; None if no layer has one."""
    sliding, types = given.architecture.sliding, given.get("layer_types")
    if sliding is None:
        return None
    window = None if sliding == "upper" and not given.get("use_sliding_window") else given.get("sliding_window")
    first = given.need("max_window_layers") if sliding == "upper" and window is not None else 0
    usual = []
    for i in range(layers):
        slides = i % 2 == 0 if sliding == "even" else window is not None and i >= first
        usual.append("sliding_attention" if slides else "full_attention")
    if types is None:
        types = usual
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        raise ValueError(f'layer_types: expected {layers} times "{known[0]}" or "{known[1]}", got {shown(types)}')
    if sliding == "all" and types != usual:
        raise ValueError(f"layer_types: expected one kind for all layers, by sliding_window, got {shown(types)}")
    if window is None and "sliding_attention" in types:
        raise ValueError('layer_types: contains "sliding_attention", but sliding_window is missing')
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(w is not None for w in windows) else None


def _read_rope(given: _Given) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rope_scaling, from rope_parameters or the older keys."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters: expected an object, got {shown(rope)}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters: separate sets for kinds of layers are not supported")
    rope = {key: _checked(key, value, key) for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor")) or 1.0
    if given.d["model_type"] == "phi3":
        kind = "longrope" if kind in ("su", "yarn") else kind  # its older names
    elif partial != 1:
        raise ValueError(f'partial_rotary_factor: {partial} is not supported with model_type "{given.d["model_type"]}"')
    theta, longest = given.get("rope_theta"), given.need("max_position_embeddings")
    original = given.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original = original or longest
    if kind in ("yarn", "longrope"):
        rope.setdefault("factor", longest / original)
    known = {key for keys in SCALINGS.get(kind, ()) for key in keys}
    scaling = {"rope_type": kind} | {key: value for key, value in rope.items() if key in known}
    return {
        "rope_theta": float(rope.get("rope_theta") or theta or 10000.0),
        "partial_rotary_factor": partial,
        "rope_scaling": None if kind == "default" else scaling,
    }


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """generation_config.json of a model's directory, under its own names: the special tokens (eos_token_id always as a
    tuple) and the options of sampling. Other fields and nulls are left out; {} if there is no such file.

    Raises ValueError that names the file and the field for an invalid value.
    """
    path = Path(directory) / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    found = {field: given[field] for field in _GENERATION if given.get(field) is not None}
    for field, value in found.items():
        check(f"{path}: {field}", value, _GENERATION[field])
    if "eos_token_id" in found:
        eos = found["eos_token_id"]
        found["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    return found


# ---- out -------------------------------------------------------------------------------------------------------


def config_to_dict(config: Config, dtype: Any = np.float32) -> dict[str, Any]:
    """A Config -> the config.json that transformers reads, for weights stored in `dtype`. Renamed keys are written in
    the old spelling too."""
    architecture, eos = config.architecture, config.eos_token_id
    gelu = "gelu_pytorch_tanh" if architecture.gated else "gelu_new"
    d = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": gelu if config.activation == "gelu_tanh" else config.activation,
        "rms_norm_eps": config.eps,
        "max_position_embeddings": config.max_positions,
    }
    d = {architecture.key(key): value for key, value in d.items()} | {
        "architectures": [architecture.transformers],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "dtype": np.dtype(dtype).name,
        "torch_dtype": np.dtype(dtype).name,
    }
    d |= {option: getattr(config, option) for option in architecture.options}
    if architecture.positions is None:
        d |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, **_write_rope(config)}
    return d | (_write_windows(config) if architecture.sliding else {})


def _write_rope(config: Config) -> dict[str, Any]:
    scaling = config.rope_scaling or {"rope_type": "default"}
    d: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.model_type == "phi3":
        d["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings", config.max_positions)
        d["partial_rotary_factor"] = config.partial_rotary_factor
    partial = {key: d[key] for key in ("partial_rotary_factor",) if key in d}
    d["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta, **partial}
    return d | ({"rope_scaling": dict(scaling)} if config.rope_scaling else {})


def _write_windows(config: Config) -> dict[str, Any]:
    windows = [config.window(i) for i in range(config.layers)]
    window = next((w for w in windows if w is not None), None)
    d: dict[str, Any] = {"sliding_window": window}
    if config.architecture.sliding == "upper":
        first = next((i for i, w in enumerate(windows) if w is not None), config.layers)
        d |= {"use_sliding_window": window is not None, "max_window_layers": first}
    if config.architecture.sliding == "even" and window is None:
        d["sliding_window"] = config.max_positions  # no layer has one, but transformers needs a number
    if config.architecture.sliding != "all":
        d["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return d
