"""PEFT's adapter files in and out, strictly: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..lora_config import LoraConfig, fits
from .reading import read_json, read_weights
from .writing import write_json, write_tensors

PEFT_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Every key of PEFT's LoraConfig (0.21) that is no field of ours. Those that would change the numbers, and the values
# under which they do not: anything else is refused by name.
_MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
}
# Those that change no number once A and B are there.
_IGNORED = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
_FIELDS = {  # PEFT's key: the field of LoraConfig
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_rslora": "rslora",
    "use_dora": "dora", "init_lora_weights": "init", "exclude_modules": "exclude", "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
# Starts that leave the base alone: what A and B were before training no longer matters.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def save_adapter(
    directory: Path, config: LoraConfig, params: Mapping[str, np.ndarray], base: str = "", conv1d: bool = False
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    `base` is recorded as base_model_name_or_path. "all-linear" is written out as the names it stood for, as PEFT does.
    conv1d: the model stores its weights (in, out), as GPT-2 does.

    PEFT makes a PiSSA or OLoRA adapter's residual again from the base when it loads the file. But that of
    "pissa_niter_N" it draws anew, which is another model, and OLoRA fails on a Conv1D: these raise ValueError, and can
    be written as plain LoRA (adapters.as_lora).
    """
    init = config.init
    if init.startswith("pissa_niter") or (init == "olora" and conv1d):
        raise ValueError(f"init {init!r} cannot be written: PEFT would make another residual; write it as plain LoRA")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    linears = [name.removesuffix(_A) for name in params if name.endswith(_A)]
    targets = config.targets
    if targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    write_tensors(directory / WEIGHTS, {PEFT_PREFIX + name: p for name, p in params.items()})
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": int(config.rank),
            "lora_alpha": _plain(config.alpha),
            "lora_dropout": float(config.dropout),
            "target_modules": _names(targets),
            "exclude_modules": _names(config.exclude) or None,
            "layers_to_transform": None if config.layers is None else list(config.layers),
            "layers_pattern": _names(config.layers_pattern) or None,
            "rank_pattern": _unordered(config, "rank_pattern", linears),
            "alpha_pattern": _unordered(config, "alpha_pattern", linears),
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            "init_lora_weights": {"default": True}.get(init, init),
            "bias": "none",
            "fan_in_fan_out": conv1d,
            "inference_mode": True,
            "modules_to_save": None,
        },
    )


def _names(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _plain(number: float) -> int | float:
    """A whole number as PEFT writes it."""
    return int(number) if float(number).is_integer() else float(number)


def _unordered(config: LoraConfig, pattern: str, linears: list[str]) -> dict[str, float]:
    """rank_pattern or alpha_pattern as a file can hold it. PEFT takes the first key that fits, but sorts the keys when
    it writes: where two keys compete, every linear is named instead."""
    values = getattr(config, pattern)
    if any(config.rivals(pattern, linear) for linear in linears):
        first = {linear: next((v for k, v in values.items() if fits(k, linear)), None) for linear in linears}
        values = {f"^{re.escape(linear)}": value for linear, value in first.items() if value is not None}
    return {key: _plain(value) for key, value in sorted(values.items())}


def read_config(directory: Path) -> LoraConfig:
    """adapter_config.json as a LoraConfig.

    Stricter than PEFT, which goes on with defaults: r, lora_alpha and target_modules must be there, and an option that
    would change the numbers and is not supported is refused by name, also one that PEFT does not know.
    """
    return _read_config(Path(directory) / CONFIG)[0]


def _read_config(path: Path) -> tuple[LoraConfig, bool]:
    """The config, and fan_in_fan_out."""
    found = read_json(path)
    for key in _NEEDED:
        if found.get(key) is None:
            raise ValueError(f'{path}: has no "{key}"')
    fields: dict[str, Any] = {}
    for key, value in found.items():
        if key in _FIELDS:
            if value is None:  # the default, but for the keys that are needed
                continue
            fields[_FIELDS[key]] = tuple(value) if isinstance(value, list) else value
        elif key in _MUST_BE:
            if not any(value == allowed and type(value) is type(allowed) for allowed in _MUST_BE[key]):
                raise _refusal(path, key, value, json.dumps(_MUST_BE[key][0]))
        elif key == "fan_in_fan_out":
            if not isinstance(value, bool | None):
                raise _refusal(path, key, value, "true and false")
        elif key not in _IGNORED and value not in (None, False, [], {}):
            raise ValueError(f'{path}: "{key}" is not known: it might change the numbers')
    fields["init"] = _init(path, found.get("init_lora_weights"))
    if not fields.get("layers_pattern") or not fields.get("layers"):  # PEFT: an empty list of layers is none
        fields.pop("layers_pattern", None)
    if fields.get("layers") == ():
        del fields["layers"]
    try:
        return LoraConfig(**fields), bool(found.get("fan_in_fan_out"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _init(path: Path, value: Any) -> str:
    if isinstance(value, bool | None) or value in _HARMLESS_INITS:
        return "default"
    if isinstance(value, str) and value.lower() == "olora":
        return "olora"
    if value == "pissa":
        return value
    if isinstance(value, str) and value.startswith("pissa_niter"):
        raise ValueError(
            f'{path}: "init_lora_weights": "{value}": what this adapter sits on was drawn at random, and its files do '
            "not hold it; save it with path_initial_model_for_weight_conversion"
        )
    raise _refusal(path, "init_lora_weights", value, 'those that leave the base alone, "pissa" and "olora"')


def _refusal(path: Path, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f'{path}: "{key}": {json.dumps(value)} is not supported, only {allowed}')


def load_adapter(directory: Path, conv1d: bool = False) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Read a PEFT adapter -> its config, and its arrays by their names without PEFT's prefix.

    Every key must be a LoRA matrix or, with DoRA, a magnitude. Whether they fit a model is checked where they are put
    on one.
    """
    directory = Path(directory)
    config, fan_in_fan_out = _read_config(directory / CONFIG)
    if fan_in_fan_out and not conv1d:
        raise _refusal(directory / CONFIG, "fan_in_fan_out", True, "for GPT-2; here it is false")
    path = directory / WEIGHTS
    params = {}
    kinds = (_A, _B, _MAGNITUDE) if config.dora else (_A, _B)
    for key, tensor in read_weights(path):
        name = key.removeprefix(PEFT_PREFIX)
        if name == key or not name.endswith(kinds):
            expected = ", ".join(PEFT_PREFIX + "<linear>" + kind for kind in kinds)
            raise ValueError(f"{path}: {key} is not a LoRA matrix ({expected})")
        params[name] = tensor
    return config, params
