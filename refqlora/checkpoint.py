"""Files in and out, strictly: Hugging Face model directories and PEFT adapters, as plain dicts of arrays.

Everything is safetensors and JSON; nothing is ever unpickled. A file is written under a temporary name and renamed,
so that a killed run leaves the old file or the new one and never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .lora import LoraConfig

BUNDLED = Path(__file__).parent / "assets"  # the directory of the bundled base model
PEFT_PREFIX = "base_model.model."
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))  # what a weight may be


# ---- files, whole or not at all --------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Arrays of any dtype that safetensors knows, contiguous or not."""
    arrays = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(arrays, temporary, {"format": "pt", **(metadata or {})})


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name for `path`, in a directory beside it. What was written there is put onto the disk and renamed to
    `path`, unless an error came. The directory goes in any case; one that a killed run left goes first."""
    directory = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    temporary = directory / path.name
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or ValueError that name the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of a safetensors file, one tensor in memory at a time. Raises an error that names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in a safetensors file's header."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


# ---- a model's directory: config.json, model.safetensors or shards with an index --------------------------------


def read_model(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a Hugging Face model directory, file after file.

    Raises FileNotFoundError where there is no safetensors file, and ValueError for one that cannot be read, a tensor
    that is not of 16, 32 or 64 bit floats, or an index that names a tensor its file lacks.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file() or not index.is_file():
        yield from _read_weights(directory / "model.safetensors")
        return
    wanted = read_json(index).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(shard, str) for shard in wanted.values()):
        raise ValueError(f'{index}: has no "weight_map" of tensors to files')
    for shard in sorted(set(wanted.values())):
        found = set()
        for name, tensor in _read_weights(directory / shard):
            found.add(name)
            yield name, tensor
        missing = sorted(name for name, file in wanted.items() if file == shard and name not in found)
        if missing:
            raise ValueError(f"{directory / shard}: lacks {missing[0]}, which {index.name} says it holds")


def _read_weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """`read_tensors` of a file that others made: no pickle stands in for it, and every tensor is of floats."""
    pickled = sorted(path.parent.glob("*.bin"))
    if pickled and not path.is_file():
        raise ValueError(f"{pickled[0]}: is pickled, which is never opened; save it as safetensors")
    for name, tensor in read_tensors(path):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        yield name, tensor


def check_shapes(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError that names the first missing, unexpected or misshapen tensor, if there is one."""
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"{where}: {name} {shape} is missing")
        if tuple(params[name].shape) != tuple(shape):
            raise ValueError(f"{where}: {name} has shape {tuple(params[name].shape)}, expected {tuple(shape)}")
    for name in params:
        if name not in shapes:
            raise ValueError(f"{where}: {name} is not expected in this model")


# ---- PEFT adapters ---------------------------------------------------------------------------------------------


def save_adapter(directory: Path, config: LoraConfig, params: Mapping[str, np.ndarray], base: str = "") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    params: `<linear>.lora_A.weight` (r, in) and `<linear>.lora_B.weight` (out, r). `base` is recorded as
    base_model_name_or_path. "all-linear" is written out as the names it stood for, as PEFT does.
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
            "fan_in_fan_out": False,
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


def load_adapter(directory: Path) -> tuple[LoraConfig, dict[str, np.ndarray]]:
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
    for key, tensor in _read_weights(path):
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
