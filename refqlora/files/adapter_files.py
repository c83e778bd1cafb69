"""PEFT's adapter files in and out, strictly: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import MAGNITUDE, A, B
from ..checks import shown
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
# Every other key of PEFT's LoraConfig (0.21). Those that would change the numbers, and the values under which they do
# not: anything else is refused by name.
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
# Those that change no number once A and B are there.
IGNORED = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_NEEDED = ("r", "lora_alpha", "target_modules")
# Starts that leave the base alone: what A and B were before training no longer matters.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


# ---- out -------------------------------------------------------------------------------------------------------


def save_adapter(
    directory: Path, config: LoraConfig, params: Mapping[str, np.ndarray], base: str = "", conv1d: bool = False
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    Both are replaced together: a killed run leaves the old adapter, the new one, or weights without a config, which
    nothing loads. `base` is recorded as base_model_name_or_path. "all-linear" is written out as the names it stood for,
    as PEFT does. conv1d: the model stores its weights (in, out), as GPT-2 does.

    PEFT makes a PiSSA or OLoRA adapter's residual again from the base when it loads the file. But that of
    "pissa_niter_N" it draws anew, which is another model, and OLoRA fails on a Conv1D: these raise ValueError, and can
    be written as plain LoRA (adapter_sums.as_lora).
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
    """rank_pattern or alpha_pattern as a file can hold it. PEFT takes the first key that fits, but sorts the keys when
    it writes: where two keys compete, every linear is named instead."""
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
    """Read a PEFT adapter -> its config, and its arrays by their names without PEFT's prefix.

    Every key must be a LoRA matrix or, with DoRA, a magnitude. Whether they fit a model is checked where they are put
    on one (adapters.adapter_from_file). Raises FileNotFoundError, or ValueError that names the file and the field or
    tensor at fault.
    """
    directory = Path(directory)
    config, fan_in_fan_out = _read_config(directory)
    if fan_in_fan_out and not conv1d:
        raise _unexpected(directory / CONFIG, "fan_in_fan_out", "false; it is true for GPT-2 only", True)
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

    Raises FileNotFoundError, or ValueError that names the file and the field, for what is not there, and for every
    option that would change the numbers and is not supported.
    """
    return _read_config(Path(directory))[0]


def _read_config(directory: Path) -> tuple[LoraConfig, bool]:
    """The config, and whether the base stores its weights (in, out)."""
    path = directory / CONFIG
    if not path.is_file():
        raise _missing(path)
    found = read_json(path)
    fields: dict[str, Any] = {}
    for key, value in sorted(found.items(), key=lambda item: item[0] != "peft_type"):  # another kind has other keys
        if key in FIELDS:
            if value is not None:  # the default, but for the keys that are needed
                fields[FIELDS[key]] = tuple(value) if isinstance(value, list) else value
        elif key in MUST_BE:
            if not any(value == allowed and type(value) is type(allowed) for allowed in MUST_BE[key]):
                raise _unexpected(path, key, " or ".join(map(json.dumps, MUST_BE[key])), value)
        elif key not in IGNORED and value not in (None, False, [], {}):
            raise ValueError(f"{path}: {shown(key)} is not known: it might change the numbers")
    for key in ("peft_type", *_NEEDED):
        if found.get(key) is None:
            raise ValueError(f"{path}: {key} is missing")
    fields["init"] = _init(path, found.get("init_lora_weights"))
    if not fields.get("layers"):  # PEFT: an empty list of layers is none
        fields.pop("layers", None) if fields.get("layers") == () else None
        fields.pop("layers_pattern", None)
    try:
        return LoraConfig(**fields), bool(found.get("fan_in_fan_out"))
    except ValueError as error:
        said = str(error)  # it begins with the field
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
            f"{path}: init_lora_weights: {shown(value)}: what this adapter sits on was drawn at random, and "
            "its files do not hold it; save it with path_initial_model_for_weight_conversion"
        )
    raise _unexpected(path, "init_lora_weights", 'a start that leaves the base alone, "pissa" or "olora"', value)


def _unexpected(path: Path, key: str, expected: str, value: Any) -> ValueError:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = shown(value)
    return ValueError(f"{path}: {key}: expected {expected}, got {text if len(text) <= 60 else text[:57] + '...'}")


def _missing(path: Path) -> ValueError | FileNotFoundError:
    """The error for a file that is not there, with what is there instead."""
    directory = path.parent
    if directory.is_file():
        return ValueError(f"{directory}: expected an adapter's directory, got a file")
    for file in sorted(directory.glob("adapter_model*")):
        if file.suffix in PICKLED:
            return ValueError(
                f"{file}: is pickled, which is never opened, as it may run code; where you trust it, PEFT converts it: "
                f'PeftModel.from_pretrained(BASE, "{directory}").save_pretrained(OUT)'
            )
    there = ""
    if inner := sorted(config.parent.name for config in directory.glob(f"*/{CONFIG}")):
        there = f"; there are adapters in its subdirectories {', '.join(inner[:20])}"
    elif other := sorted(file.name for file in directory.glob("*.gguf")):
        there = f"; {other[0]} is llama.cpp's format, which is not read: expected PEFT's {CONFIG} and {WEIGHTS}"
    return FileNotFoundError(f"{path}: no such file{there}")
