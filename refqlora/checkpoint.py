"""A model's directory as Hugging Face writes it, read strictly: config.json, generation_config.json, and
model.safetensors or its shards with their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
)

BUNDLED = Path(__file__).parent / "assets"  # the directory of the bundled base model
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_model(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a Hugging Face model directory, file after file, one in memory at a time.

    Nothing is read before every file's header was and they agree. Raises FileNotFoundError where there is no
    safetensors file, and ValueError for one that cannot be read, a tensor that is not of `dtypes` (floats of 16, 32
    or 64 bits), or an index and shards that do not say the same.
    """
    for name, (path, entry) in locate(Path(directory), dtypes).items():
        yield name, read_tensor(path, entry)


def outline(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """`read_model` without the numbers: arrays of the right shapes and dtypes that take no memory, all zeros. What a
    model's tensors are is known from the headers, before the first of them is read."""
    for name, (_, entry) in locate(Path(directory), dtypes).items():
        yield name, np.broadcast_to(np.zeros((), entry.dtype), entry.shape)


def locate(directory: Path, dtypes: Sequence[np.dtype]) -> dict[str, tuple[Path, Entry]]:
    """The file that holds each tensor, and where in it: from the headers of all files, held against the index."""
    file = weights_file(directory)
    if file.name == WEIGHTS:
        if not file.is_file() and any(directory.glob("model-*-of-*.safetensors")):
            index = directory / INDEX
            raise FileNotFoundError(f"{index}: no such file; without it the shards beside it cannot be told whole")
        return {name: (file, entry) for name, entry in read_weights_header(file, dtypes, BUFFERS).items()}
    found: dict[str, tuple[Path, Entry]] = {}
    for shard, names in read_index(file).items():
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


def weights_file(directory: Path) -> Path:
    """The file that makes a directory a model: model.safetensors, or the index of its shards."""
    single, index = directory / WEIGHTS, directory / INDEX
    return single if single.is_file() or not index.is_file() else index


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
