"""A model's safetensors written tensor by tensor: one in memory at a time, one file or shards with their index."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .model_files import INDEX
from .reading import NAMES
from .writing import write_json

SHARD = 5 * 10**9  # bytes of a shard


def parse_size(size: int | str) -> int:
    """Bytes of a shard's size: a whole number, or text such as "5GB" or "500MB" (decimal, as in transformers).

    Raises ValueError for any other.
    """
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).upper())
    n = int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]] if match else 0
    if n < 1 or isinstance(size, bool):
        raise ValueError(f'a shard\'s size must be a number of bytes or such as "5GB", not {size!r}')
    return n


def write_model(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD) -> int:
    """Write (name, array) as model.safetensors, or as shards of at most `shard_bytes` and an index -> bytes of tensors.

    Weights that were in `directory` go when the new ones are whole. What follows a tensor and carries its name, as
    bitsandbytes' parts do, stays in its shard. Raises ValueError for a name that comes twice.
    """
    scratch = directory / ".model.safetensors.tmp"  # as files.write_tensors has it: either clears what a kill left
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        shards, weight, seen = [_Shard(scratch / "0")], "", set()
        for name, array in tensors:
            if name in seen:
                raise ValueError(f"{directory}: {name} comes twice")
            seen.add(name)
            if not name.startswith(weight + "."):
                weight = name
                if shards[-1].nbytes and shards[-1].nbytes + array.nbytes > shard_bytes:
                    shards[-1].finish()
                    shards.append(_Shard(scratch / str(len(shards))))
            shards[-1].add(name, array)
            del array  # before the next is made
        shards[-1].finish()
        _put(directory, shards)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(shard.nbytes for shard in shards)


def _put(directory: Path, shards: list[_Shard]) -> None:
    """Rename the shards into place and remove those of an older model. With shards, what makes them a model is the
    index, which goes first and comes last."""
    n = len(shards)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    if n > 1:
        (directory / INDEX).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        os.replace(shard.path, directory / name)
    if n > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
        total = sum(shard.nbytes for shard in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (directory / INDEX).unlink(missing_ok=True)
    for old in {directory / "model.safetensors", *directory.glob("model-*-of-*.safetensors")}:
        if old.name not in names:
            old.unlink(missing_ok=True)


class _Shard:
    """One file in the making.

    In a safetensors file the header, which knows all sizes, comes first; a tensor must start at a multiple of its
    item's size, and there may be no hole before it. So tensors are gathered by that size, each size in a file of its
    own, and put behind the header, the widest first, when the last has come.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}  # name: dtype, shape, bytes an item
        self.nbytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        size = array.dtype.itemsize
        self.tensors[name] = (NAMES[array.dtype], array.shape, size)
        self.nbytes += array.nbytes
        with open(f"{self.path}.{size}", "ab") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def finish(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape, size) in sorted(self.tensors.items(), key=lambda item: -item[1][2]):  # a stable sort
            stop = start + size * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(self.path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size in sorted({size for _, _, size in self.tensors.values()}, reverse=True):
                gathered = Path(f"{self.path}.{size}")
                with open(gathered, "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 18)
                gathered.unlink()
            file.flush()
            os.fsync(file.fileno())
