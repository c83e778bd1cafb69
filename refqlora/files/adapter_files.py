"""PEFT's adapter files in and out, strictly: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import MAGNITUDE, A, B
from ..checks import cut, shown
from ..lora_config import LoraConfig
from .reading import PICKLED, read_json, read_weights
from .writing import together, write_json, write_tensors

PEFT_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

FIELDS = {  # PEFT's key: the field of LoraConfig
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_rslora": "rslora",
    "use_dora": "dora", "init_lora_weights": "init", "exclude_modules": "exclude", "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
# The other keys of PEFT's LoraConfig (0.21) that change the numbers, and the values for which they do not. Any other
# value is refused by name.
MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, True, None),
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
# The keys that change no number once A and B exist.
IGNORED = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_NEEDED = ("r", "lora_alpha", "target_modules")
# Initialisations that leave the base alone: how A and B started no longer matters.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


# ---- out -------------------------------------------------------------------------------------------------------


def save_adapter(
    directory: Path, config: LoraConfig, params: Mapping[str, np.ndarray], base: str = "", conv1d: bool = False
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    Both are replaced together: a killed run leaves the old adapter, the new one, or weights without a config, which
    nothing loads. `base` is recorded as base_model_name_or_path. "all-linear" is written as the names it stands for,
    as PEFT does. conv1d: the model stores its weights (in, out), as GPT-2 does.

    When PEFT loads a PiSSA or OLoRA adapter, it computes the residual from the base again. For "pissa_niter_N" that
    draws random numbers anew, which gives another model, and for OLoRA on a Conv1D it fails. Both raise ValueError, but
    can be written as plain LoRA (adapter_sums.as_lora).
    """
    init = config.init
    if init.startswith("pissa_niter") or (init == "olora" and conv1d):
        raise ValueError(f"init {init!r} cannot be written: PEFT would make another residual; write it as plain LoRA")
    linears = [name.removesuffix(A) for name in params if name.endswith(A)]
    targets = config.targets
    if targets == "all-linear":
        targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in linears}))
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": int(config.rank),
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": float(config.dropout),
        "target_modules": targets,
        "exclude_modules": config.exclude or None,
        "layers_to_transform": config.layers,
        "layers_pattern": config.layers_pattern or None,
        "rank_pattern": _unordered(config, "rank_pattern", linears),
        "alpha_pattern": _unordered(config, "alpha_pattern", linears),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": {"default": True}.get(init, init),
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with together(Path(directory), last=CONFIG) as new:
        write_tensors(new / WEIGHTS, {PEFT_PREFIX + name: p for name, p in params.items()})
        write_json(new / CONFIG, fields)


def _unordered(config: LoraConfig, pattern: str, linears: list[str]) -> dict[str, float]:
    """rank_pattern or alpha_pattern, so that the order of its keys does not matter: PEFT uses the first key that fits,
    but sorts the keys when it writes. If two keys fit a linear, every linear is named instead."""
    values: Mapping[str, float] = getattr(config, pattern)
    if any(config.rivals(pattern, linear) for linear in linears):
        value_of = config.rank_of if pattern == "rank_pattern" else config.alpha_of
        values = {f"^{re.escape(linear)}": value_of(linear) for linear in linears}
    return {key: _plain(value) for key, value in sorted(values.items())}


def _plain(number: float) -> int | float:
    """A whole number as PEFT writes it."""
    return int(number) if float(number).is_integer() else float(number)


# ---- in --------------------------------------------------------------------------------------------------------


def load_adapter(directory: Path, conv1d: bool = False) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Read a PEFT adapter; -> its config, and its arrays under their names without PEFT's prefix.

    Every key must be a LoRA matrix or, with DoRA, a magnitude. adapters.adapter_from_file checks that they fit a model.
    Raises FileNotFoundError, or ValueError that names the file and the field or tensor at fault.
    """
    directory = Path(directory)
    config, fan_in_fan_out = _read_config(directory)
    if fan_in_fan_out and not conv1d:
        raise _unexpected(directory / CONFIG, "fan_in_fan_out", "false (only GPT-2 has true)", True)
    path = directory / WEIGHTS
    if not path.is_file():
        raise _missing(path)
    params = {}
    kinds = (A, B, MAGNITUDE) if config.dora else (A, B)
    for key, tensor in read_weights(path):
        name = key.removeprefix(PEFT_PREFIX)
        for part, sign in {"an embedding": ".lora_embedding_", "the output head": "lm_head.lora_"}.items():
            if sign in name:
                raise ValueError(
                    f"{path}: {shown(key, 150)} is on {part}: expected adapters on the layers' linears only"
                )
        if name == key or not name.endswith(kinds):
            expected = ", ".join(PEFT_PREFIX + "<linear>" + kind for kind in kinds)
            raise ValueError(f"{path}: {shown(key, 150)} is not a LoRA matrix ({expected})")
        params[name] = tensor
    return config, params


def read_config(directory: str | Path) -> LoraConfig:
    """adapter_config.json as a LoraConfig.

    Raises FileNotFoundError, or ValueError that names the file and the field, for a missing field, and for an
    unsupported option that would change the numbers.
    """
    return _read_config(Path(directory))[0]


def _read_config(directory: Path) -> tuple[LoraConfig, bool]:
    """The config, and fan_in_fan_out: whether the base stores its weights (in, out)."""
    path = directory / CONFIG
    if not path.is_file():
        raise _missing(path)
    found = read_json(path)
    fields: dict[str, Any] = {}
    for key, value in sorted(found.items(), key=lambda item: item[0] != "peft_type"):  # other types have other keys
        if key in FIELDS:
            if value is not None:  # null means the default
                fields[FIELDS[key]] = tuple(value) if isinstance(value, list) else value
        elif key in MUST_BE:
            if not any(value == allowed and type(value) is type(allowed) for allowed in MUST_BE[key]):
                raise _unexpected(path, key, " or ".join(map(json.dumps, MUST_BE[key])), value)
        elif key not in IGNORED and value not in (None, False, [], {}):
            raise ValueError(f"{path}: {shown(key)} is unknown and might change the numbers")
    for key in ("peft_type", *_NEEDED):
        if found.get(key) is None:
            raise ValueError(f"{path}: {key} is missing")
    fields["init"] = _init(path, found.get("init_lora_weights"))
    if fields.get("layers") == ():  # PEFT: an empty list means all layers
        del fields["layers"]
    if not fields.get("layers"):
        fields.pop("layers_pattern", None)
    try:
        return LoraConfig(**fields), bool(found.get("fan_in_fan_out"))
    except ValueError as error:
        said = str(error)  # it begins with the name of the field
        key = next((key for key, ours in FIELDS.items() if re.match(rf"{ours}\b", said)), "")
        raise ValueError(f"{path}: {key}{said.removeprefix(FIELDS.get(key, ''))}") from None


def _init(path: Path, value: Any) -> str:
    if isinstance(value, bool | None) or value in _HARMLESS_INITS:
        return "default"
    if isinstance(value, str) and value.lower() == "olora":
        return "olora"
    if value == "pissa":
        return value
    if isinstance(value, str) and value.startswith("pissa_niter"):
        raise ValueError(
            f"{path}: init_lora_weights: {shown(value)} changed the base at random, and the files do not contain the "
            "changed base; save the adapter with path_initial_model_for_weight_conversion"
        )
    expected = 'an initialisation that leaves the base alone, "pissa" or "olora"'
    raise _unexpected(path, "init_lora_weights", expected, value)


def _unexpected(path: Path, key: str, expected: str, value: Any) -> ValueError:
    try:
        text = json.dumps(value)  # as the file spells it
    except RecursionError:
        text = shown(value)
    return ValueError(f"{path}: {key}: expected {expected}, got {cut(text, 60)}")


def _missing(path: Path) -> ValueError | FileNotFoundError:
    """The error for a missing file, with a hint if there is something else instead."""
    directory = path.parent
    if directory.is_file():
        return ValueError(f"{directory}: expected an adapter's directory, got a file")
    for file in sorted(directory.glob("adapter_model*")):
        if file.suffix in PICKLED:
            return ValueError(
                f"{file}: pickled files are never opened, as they may run code; if you trust it, PEFT converts it: "
                f'PeftModel.from_pretrained(BASE, "{directory}").save_pretrained(OUT)'
            )
    there = ""
    if inner := sorted(config.parent.name for config in directory.glob(f"*/{CONFIG}")):
        there = f"; there are adapters in its subdirectories {', '.join(inner[:20])}"
    elif other := sorted(file.name for file in directory.glob("*.gguf")):
        there = f"; expected PEFT's {CONFIG} and {WEIGHTS}, got llama.cpp's format ({other[0]})"
    return FileNotFoundError(f"{path}: no such file{there}")
