"""config.json as transformers writes it, in its new spelling and older ones, to the fields of a Config and back.

What a file leaves out is as in transformers' configuration_*.py (version 5.23).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures import ARCHITECTURES, Architecture
from ..config import Config
from ..rope import SCALINGS
from .reading import read_json

_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}  # Llama's, and of most
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_UNSUPPORTED = {  # what would change the numbers
    "add_cross_attention": "add_cross_attention is not supported",
    "use_bidirectional_attention": "use_bidirectional_attention is not supported",
}


def config_from_dict(d: Mapping[str, Any], where: str = "config") -> Config:
    """A config.json -> Config. Raises ValueError, beginning with `where`, for a field that is missing or an option that
    is not supported."""
    try:
        return Config(**_fields(d))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _fields(d: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json -> the fields of a Config.

    Dropout of the base itself (attn_pdrop, attention_dropout, ...) is not read: it is never applied, as in a model
    in eval mode. Raises ValueError for a field that is missing or an option that is not supported.
    """
    model_type = d.get("model_type")
    if model_type is None:
        raise ValueError('has no "model_type"')
    if model_type not in ARCHITECTURES:
        supported = ", ".join(f'"{name}"' for name in ARCHITECTURES)
        raise ValueError(f'model_type "{model_type}" is not supported; supported: {supported}')
    architecture = ARCHITECTURES[model_type]
    for option, message in _UNSUPPORTED.items():
        if d.get(option):
            raise ValueError(message)

    def get(key: str) -> Any:
        name = architecture.key(key)
        return d.get(name, architecture.defaults.get(name, _DEFAULTS.get(key)))

    def need(key: str) -> Any:
        if get(key) is None:
            raise ValueError(f'has no "{architecture.key(key)}"')
        return get(key)

    vocabulary, hidden = need("vocab_size"), need("hidden_size")
    layers, heads = need("num_hidden_layers"), need("num_attention_heads")
    eos = get("eos_token_id")
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": get("intermediate_size")
        or (4 * hidden if model_type == "gpt2" else need("intermediate_size")),
        "layers": layers,
        "heads": heads,
        "kv_heads": get("num_key_value_heads") or heads,
        "head_dim": hidden // heads if get("head_dim") is None else get("head_dim"),
        "activation": _read_activation(get, architecture),
        "eps": get("rms_norm_eps"),
        "tied": get("tie_word_embeddings") or False,
        "max_positions": get("max_position_embeddings"),
        "bos_token_id": get("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": get("pad_token_id"),
        "windows": _read_windows(get, architecture, layers),
        **(_read_rope(get, model_type) if architecture.positions is None else {}),
        **architecture.fixed,
        **{option: get(option) for option in architecture.options if get(option) is not None},
    }


def _read_activation(get: Callable, architecture: Architecture) -> str:
    activation = get("hidden_act")
    supported = [name for name in _ACTIVATIONS if architecture.gated or name != "silu"]
    if activation not in supported:
        names = ", ".join(f'"{name}"' for name in supported)
        raise ValueError(f'{architecture.key("hidden_act")} "{activation}" is not supported; supported: {names}')
    return _ACTIVATIONS[activation]


def _read_windows(get: Callable, architecture: Architecture, layers: int) -> tuple[int | None, ...] | None:
    """Each layer's sliding window, None where it has none; None if no layer has one."""
    window = get("sliding_window")
    if architecture.sliding is None or (architecture.sliding == "upper" and not get("use_sliding_window")):
        window = None
    slides = {
        None: lambda i: False,
        "all": lambda i: window is not None,
        "even": lambda i: i % 2 == 0,
        "upper": lambda i: window is not None and i >= get("max_window_layers"),
    }[architecture.sliding]
    usual = ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)]
    types = usual if architecture.sliding is None or get("layer_types") is None else get("layer_types")
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {"full_attention", "sliding_attention"}:
        raise ValueError(f'layer_types must hold {layers} times "full_attention" or "sliding_attention", not {types!r}')
    if architecture.sliding == "all" and types != usual:
        raise ValueError(f"layer_types {types!r} is not supported: sliding_window is of all layers or of none")
    if window is None and "sliding_attention" in types:
        raise ValueError('layer_types has "sliding_attention", but there is no sliding_window')
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(w is not None for w in windows) else None


def _read_rope(get: Callable, model_type: str) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rope_scaling, from rope_parameters or the older keys."""
    rope = get("rope_scaling") or get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"the RoPE parameters must be an object, not {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("RoPE parameters of their own for each kind of layer are not supported")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", get("partial_rotary_factor")) or 1.0
    if model_type == "phi3":
        kind = "longrope" if kind in ("su", "yarn") else kind  # its older names
    elif partial != 1:
        raise ValueError(f'partial_rotary_factor {partial} is not supported with model_type "{model_type}"')
    original = get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original = original or get("max_position_embeddings")
    if kind in ("yarn", "longrope"):
        rope.setdefault("factor", get("max_position_embeddings") / original)
    known = {key for keys in SCALINGS.get(kind, ()) for key in keys}
    scaling = {"rope_type": kind} | {key: value for key, value in rope.items() if key in known}
    return {
        "rope_theta": float(rope.get("rope_theta") or get("rope_theta") or 10000.0),
        "partial_rotary_factor": partial,
        "rope_scaling": None if kind == "default" else scaling,
    }


def config_to_dict(config: Config, dtype: Any = np.float32) -> dict[str, Any]:
    """A Config -> the config.json that transformers reads, for weights stored in `dtype`: the new spelling, and beside
    it the old one of what has changed its name."""
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
        d["sliding_window"] = config.max_positions  # of no layer, but transformers needs a number
    if config.architecture.sliding != "all":
        d["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return d


def read_config_json(directory: Path) -> dict[str, Any]:
    """config.json of a model's directory, by its own names: the sizes, numbers and switches that every decoder has are
    such, or null or not there. What else it must say, and what is supported, is for config.py.

    Raises FileNotFoundError, or ValueError that names the file and the field.
    """
    path = directory / "config.json"
    config = read_json(path)
    _check(config, _CONFIG, path)
    return config


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """generation_config.json of a model's directory, by its own names: the tokens (eos_token_id as a tuple, of one or
    many) and the numbers of sampling. Null fields and others are left out; {} where there is no such file.

    Raises ValueError that names the file and the field for a value that cannot be.
    """
    path = Path(directory) / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    _check(given, _GENERATION, path)
    found = {field: given[field] for field in _GENERATION if given.get(field) is not None}
    if "eos_token_id" in found:
        eos = found["eos_token_id"]
        found["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    return found


def _check(given: Mapping[str, Any], fields: Mapping[str, tuple[str, Callable[[Any], bool]]], path: Path) -> None:
    for field, (expected, fits) in fields.items():
        if given.get(field) is not None and not fits(given[field]):
            raise ValueError(f"{path}: {field} must be {expected}, not {json.dumps(given[field])[:80]}")


def _number(low: float, high: float, whole: bool = False) -> Callable[[Any], bool]:
    return lambda value: type(value) in ((int,) if whole else (int, float)) and low <= value <= high


def _tokens(value: Any) -> bool:
    return all(type(token) is int and token >= 0 for token in (value if isinstance(value, list) else [value]))


_SIZE = "a whole number of 1 to 2147483647", _number(1, 2**31 - 1, whole=True)


_POSITIVE = "a number above 0", _number(1e-300, 1e300)


_SWITCH = "true or false", lambda value: isinstance(value, bool)


_TOKEN = "a token", lambda value: type(value) is int and value >= 0


_CONFIG = {  # what each field must be, and whether a value is that
    "model_type": ("text", lambda value: isinstance(value, str)),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings"), _SIZE),
    "num_hidden_layers": ("a whole number of 1 to 9999", _number(1, 9999, whole=True)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), _POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _SWITCH),
    "eos_token_id": ("a token or a list of tokens", _tokens),
}


_GENERATION = {
    "eos_token_id": ("a token or a list of tokens", lambda value: value != [] and _tokens(value)),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN),
    "do_sample": _SWITCH,
    **dict.fromkeys(("temperature", "repetition_penalty"), ("a number of 0 or more", _number(0, 1e300))),
    **dict.fromkeys(("top_p", "min_p"), ("a number from 0 to 1", _number(0, 1))),
    "top_k": ("a whole number of 0 or more", _number(0, 2**63, whole=True)),
    "max_new_tokens": _SIZE,
}
