"""PEFT's adapter files in and out, strictly: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .files import read_json, read_weights, write_json, write_tensors
from .lora import LoraConfig

PEFT_PREFIX = "base_model.model."


def save_adapter(
    directory: Path,
    config: LoraConfig,
    params: Mapping[str, np.ndarray],
    base: str = "",
    conv1d: bool = False,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    params: `<linear>.lora_A.weight` (r, in) and `<linear>.lora_B.weight` (out, r). `base` is recorded as
    base_model_name_or_path. "all-linear" is written out as the names it stood for, as PEFT does. conv1d: the base's
    files hold its weights as (in, out), GPT-2's; A and B are the same with it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    targets = config.targets
    if targets == "all-linear":
        targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in params})
    write_tensors(directory / "adapter_model.safetensors", {PEFT_PREFIX + name: p for name, p in params.items()})
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": int(config.rank),
            "lora_alpha": float(config.alpha),
            "lora_dropout": float(config.dropout),
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "use_rslora": config.rslora,
            "bias": "none",
            "fan_in_fan_out": conv1d,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        },
    )


# What a PEFT config may ask for that would change the numbers, and the values under which it does not.
_MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "exclude_modules": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base
}


def load_adapter(directory: Path, conv1d: bool = False) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Read a PEFT adapter -> its config and `<linear>.lora_A.weight`, `<linear>.lora_B.weight` arrays.

    Stricter than PEFT, which goes on with defaults or without the tensor: r, lora_alpha and target_modules must be
    there, an option that would change the numbers and is not supported is refused by name, every key must be a LoRA
    matrix of the right rank. Whether it fits a model is checked where it is added to one.
    """
    directory = Path(directory)
    path = directory / "adapter_config.json"
    config = read_json(path)
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise ValueError(f'{path}: has no "{key}"')
    for key, allowed in _MUST_BE.items():
        if key == "fan_in_fan_out" and conv1d:
            continue  # it is of no consequence: PEFT sets it by itself
        if key in config and config[key] not in allowed:
            raise ValueError(
                f'{path}: "{key}": {json.dumps(config[key])} is not supported, only {json.dumps(allowed[0])}'
            )
    targets = config["target_modules"]
    try:
        lora = LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=tuple(targets) if isinstance(targets, list) else targets,
            rslora=config.get("use_rslora", False),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    path = directory / "adapter_model.safetensors"
    params = {}
    for key, tensor in read_weights(path):
        name = key.removeprefix(PEFT_PREFIX)
        if name == key or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"{path}: {key} is not a LoRA matrix ({PEFT_PREFIX}<linear>.lora_A.weight or .lora_B.weight)"
            )
        rank = tensor.shape[0 if name.endswith("lora_A.weight") else -1] if tensor.ndim == 2 else None
        if rank != lora.rank:
            raise ValueError(f"{path}: {key} has shape {tensor.shape}, which does not fit r = {lora.rank}")
        params[name] = tensor
    return lora, params
