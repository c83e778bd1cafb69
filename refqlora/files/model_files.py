"""A model's directory as Hugging Face writes it, read strictly: config.json, generation_config.json, and
model.safetensors or its shards with their index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .reading import FLOATS, PICKLED, UNPICKLE, Entry, read_json, read_tensor, read_weights_header

# What older writers keep although it follows from the config: RoPE's frequencies, GPT-2's causal mask. It is not read.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors")


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
