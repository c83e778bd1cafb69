"""A model's directory as Hugging Face writes it, read strictly: config.json, and model.safetensors or its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import FLOATS, read_json, read_weights

INDEX = "model.safetensors.index.json"
BUNDLED = Path(__file__).parent / "assets"  # the directory of the bundled base model


def read_model(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a Hugging Face model directory, file after file.

    Raises FileNotFoundError where there is no safetensors file, and ValueError for one that cannot be read, a tensor
    that is not of `dtypes` (floats of 16, 32 or 64 bits), or an index that names a tensor its file lacks.
    """
    directory = Path(directory)
    index = weights_file(directory)
    if index.name != INDEX:
        yield from read_weights(index, dtypes)
        return
    for shard, wanted in read_index(index).items():
        found = set()
        for name, tensor in read_weights(directory / shard, dtypes):
            found.add(name)
            yield name, tensor
        missing = sorted(wanted - found)
        if missing:
            raise ValueError(f"{directory / shard}: lacks {missing[0]}, which {index.name} says it holds")


def weights_file(directory: Path) -> Path:
    """The file that makes a directory a model: model.safetensors, or the index of its shards."""
    single, index = directory / "model.safetensors", directory / INDEX
    return single if single.is_file() or not index.is_file() else index


def read_index(path: Path) -> dict[str, set[str]]:
    """The shards that an index names, in their order, and the tensors that it says each holds."""
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(shard, str) for shard in wanted.values()):
        raise ValueError(f'{path}: has no "weight_map" of tensors to files')
    shards: dict[str, set[str]] = {shard: set() for shard in sorted(set(wanted.values()))}
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
