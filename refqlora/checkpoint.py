"""A model's directory as Hugging Face writes it, read strictly: config.json, and model.safetensors or its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .architectures import BUFFERS
from .files import read_json, read_weights

BUNDLED = Path(__file__).parent / "assets"  # the directory of the bundled base model


def read_model(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every parameter of a Hugging Face model directory, file after file.

    Raises FileNotFoundError where there is no safetensors file, and ValueError for one that cannot be read, a tensor
    that is not of 16, 32 or 64 bit floats, or an index that names a tensor its file lacks.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file() or not index.is_file():
        yield from read_weights(directory / "model.safetensors", skip=BUFFERS)
        return
    wanted = read_json(index).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(shard, str) for shard in wanted.values()):
        raise ValueError(f'{index}: has no "weight_map" of tensors to files')
    for shard in sorted(set(wanted.values())):
        found = set()
        for name, tensor in read_weights(directory / shard, skip=BUFFERS):
            found.add(name)
            yield name, tensor
        missing = sorted(name for name, file in wanted.items() if file == shard and name not in found)
        missing = [name for name in missing if not name.endswith(BUFFERS)]
        if missing:
            raise ValueError(f"{directory / shard}: lacks {missing[0]}, which {index.name} says it holds")


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
