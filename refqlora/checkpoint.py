"""A model's directory as Hugging Face writes it, in and out, strictly: config.json, generation_config.json, and
model.safetensors or its shards with their index."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .architectures import BUFFERS
from .files import (
    FLOATS,
    PICKLED,
    UNPICKLE,
    Entry,
    read_json,
    read_tensor,
    read_weights_header,
    write_json,
    write_tensors,
)

BUNDLED = Path(__file__).parent / "assets"  # the directory of the bundled base model
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a shard


# ---- reading -----------------------------------------------------------------------------------------------


def read_model(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a Hugging Face model directory, file after file, one in memory at a time.

    Nothing is read before every file's header was and they agree. Raises FileNotFoundError where there is no
    safetensors file, and ValueError for one that cannot be read, a tensor that is not of `dtypes` (floats of 16, 32
    or 64 bits), or an index and shards that do not say the same.
    """
    for name, (path, entry) in _locate(Path(directory), dtypes).items():
        yield name, read_tensor(path, entry)


def outline(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """`read_model` without the numbers: arrays of the right shapes and dtypes that take no memory, all zeros. What a
    model's tensors are is known from the headers, before the first of them is read."""
    for name, (_, entry) in _locate(Path(directory), dtypes).items():
        yield name, np.broadcast_to(np.zeros((), entry.dtype), entry.shape)


def _locate(directory: Path, dtypes: Sequence[np.dtype]) -> dict[str, tuple[Path, Entry]]:
    """The file that holds each tensor, and where in it: from the headers of all files, held against the index."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file() or not index.is_file():
        if not single.is_file() and any(directory.glob("model-*-of-*.safetensors")):
            raise FileNotFoundError(f"{index}: no such file; without it the shards beside it cannot be told whole")
        return {name: (single, entry) for name, entry in read_weights_header(single, dtypes, BUFFERS).items()}
    found: dict[str, tuple[Path, Entry]] = {}
    for shard, names in read_index(index).items():
        path = directory / shard
        entries = read_weights_header(path, dtypes, BUFFERS)
        for name, entry in entries.items():
            if name in found:
                raise ValueError(f"{path}: holds {name}, which {found[name][0].name} holds too")
            if name not in names:
                raise ValueError(f"{path}: holds {name}, which {INDEX} does not say")
            found[name] = path, entry
        missing = sorted(name for name in names - entries.keys() if not name.endswith(BUFFERS))
        if missing:
            raise ValueError(f"{path}: lacks {missing[0]}, which {INDEX} says it holds")
    return found


def read_index(path: Path) -> dict[str, set[str]]:
    """The shards that an index names, sorted, and the tensors that it says each holds.

    Raises ValueError for one without a weight_map, and for a shard that is no safetensors file in the same directory.
    """
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted or not all(isinstance(shard, str) for shard in wanted.values()):
        raise ValueError(f'{path}: has no "weight_map" of tensors to files')
    shards: dict[str, set[str]] = {shard: set() for shard in sorted(set(wanted.values()))}
    for shard in shards:
        if Path(shard).suffix in PICKLED:
            raise ValueError(f"{path.parent / shard}: {UNPICKLE}")
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path}: {shard!r} is no safetensors file beside it")
    for name, shard in wanted.items():
        shards[shard].add(name)
    return shards


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


def read_config(directory: Path) -> dict[str, Any]:
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


# ---- writing -----------------------------------------------------------------------------------------------


def shard_bytes(size: int | str) -> int:
    """Bytes of a shard's size: a whole number, or text such as "5GB" or "500MB" (decimal, as in transformers).

    Raises ValueError for any other.
    """
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).upper())
    n = int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]] if match else 0
    if n < 1 or isinstance(size, bool):
        raise ValueError(f'a shard\'s size must be a number of bytes or such as "5GB", not {size!r}')
    return n


def write_model(directory: Path, params: Mapping[str, np.ndarray], dtype: Any, shard_bytes: int = SHARD) -> None:
    """Write dense parameters in `dtype` as model.safetensors, or as shards of at most `shard_bytes` and their index.

    A tensor larger than that has a shard to itself. In memory there is one shard at the most beside the model, and
    nothing where `dtype` is the model's own. What was there before is replaced when all that is new is on the disk:
    one file in one go; of shards, the index goes first and comes last, so that a killed run leaves the old model, the
    new one, or one without an index, which is no model, and never parts of both.
    """
    shards: list[list[str]] = [[]]
    total = filled = 0
    for name, param in params.items():
        nbytes = param.size * np.dtype(dtype).itemsize
        if filled and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
        total += nbytes
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    stage = directory / f".{WEIGHTS}.tmp"
    shutil.rmtree(stage, ignore_errors=True)  # a killed run, of write_tensors too, may have left it
    stage.mkdir()
    try:
        for file, names in zip(files, shards, strict=True):
            write_tensors(stage / file, {name: params[name].astype(dtype, copy=False) for name in names})
        if len(shards) > 1:
            (directory / INDEX).unlink(missing_ok=True)
        for file in files:
            os.replace(stage / file, directory / file)
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _remove_others(directory, {*files, INDEX} if len(shards) > 1 else set(files))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_others(directory: Path, kept: Iterable[str]) -> None:
    """Remove the weights of an older model."""
    for path in [directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
