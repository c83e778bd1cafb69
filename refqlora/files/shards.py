"""A model's safetensors written tensor by tensor: one in memory at a time, one file or shards with their index."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .model_files import INDEX, WEIGHTS
from .writing import naming, raw, safetensors_header, write_json

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

    `directory` is one of `writing.together` or `writing.new_directory`. A tensor that follows another and begins with
    its name, as bitsandbytes' parts do, is put in the same shard. Raises ValueError for a name that comes twice.
    """
    shards, weight, seen = [_Shard(directory / "0.part")], "", set()
    for name, array in tensors:
        if name in seen:
            raise ValueError(f"{directory}: {name} comes twice")
        seen.add(name)
        if not name.startswith(weight + "."):
            weight = name
            if shards[-1].nbytes and shards[-1].nbytes + array.nbytes > shard_bytes:
                shards[-1].finish()
                shards.append(_Shard(directory / f"{len(shards)}.part"))
        shards[-1].add(name, array)
        del array  # before the next is made
    shards[-1].finish()
    n, total = len(shards), sum(shard.nbytes for shard in shards)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        os.replace(shard.path, directory / name)
    if n > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


class _Shard:
    """One file in the making.

    In a safetensors file the header, which knows all sizes, comes first, and the widest items come first after it. So
    tensors are gathered by the size of their items, each size in a file of its own, which are put behind the header
    when the last tensor has come.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.nbytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        self.tensors[name] = array.dtype, array.shape
        self.nbytes += array.nbytes
        with naming(self.path.with_name(WEIGHTS)), open(f"{self.path}.{array.dtype.itemsize}", "ab") as file:
            file.write(raw(array))

    def finish(self) -> None:
        with naming(self.path.with_name(WEIGHTS)), open(self.path, "wb") as file:
            file.write(safetensors_header(self.tensors, {})[0])
            for size in sorted({dtype.itemsize for dtype, _ in self.tensors.values()}, reverse=True):
                gathered = Path(f"{self.path}.{size}")
                with open(gathered, "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 18)
                gathered.unlink()
