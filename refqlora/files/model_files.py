"""The weights in a model's directory: model.safetensors, or shards and their index, as Hugging Face names them; and the
files beside them. Read strictly, written tensor by tensor."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..checks import cut, shown
from .reading import FLOATS, PICKLED, UNPICKLE, Entry, read_json, read_tensor, read_weights_header
from .writing import copy_file, naming, raw, safetensors_header, target, write_json

# Tensors that older writers store although they follow from the config: RoPE's frequencies, GPT-2's mask. Not read.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors")
# The files of a model besides config.json and the weights that are copied to a model made from it. Not its README: that
# describes the old weights.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip


# ---- reading ---------------------------------------------------------------------------------------------------


def read_model(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a Hugging Face model directory, file after file, one in memory at a time.

    The headers of all files are read first. Raises FileNotFoundError if there is no safetensors file, and ValueError
    for one that cannot be read, for a tensor whose dtype is not in `dtypes` (by default floats of 16, 32 or 64 bits),
    and for an index and shards that disagree.
    """
    for name, (path, entry) in locate(Path(directory), dtypes).items():
        yield name, read_tensor(path, entry)


def outline(directory: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """`read_model` from the headers alone: arrays of the right shapes and dtypes, all zeros, that take no memory."""
    for name, (_, entry) in locate(Path(directory), dtypes).items():
        yield name, np.broadcast_to(np.zeros((), entry.dtype), entry.shape)


def locate(directory: Path, dtypes: Sequence[np.dtype]) -> dict[str, tuple[Path, Entry]]:
    """The file and Entry of each tensor, from the headers of all files, which must agree with the index."""
    file = weights_file(directory)
    if file.name == WEIGHTS:
        if not file.is_file() and any(directory.glob("model-*-of-*.safetensors")):
            index = directory / INDEX
            raise FileNotFoundError(f"{index}: no such file; without it the shards may be incomplete")
        return {name: (file, entry) for name, entry in read_weights_header(file, dtypes, BUFFERS).items()}
    found: dict[str, tuple[Path, Entry]] = {}
    for shard, names in read_index(file).items():
        path = directory / shard
        entries = read_weights_header(path, dtypes, BUFFERS)
        for name, entry in entries.items():
            if name in found:
                raise ValueError(f"{path}: contains {name}, which {found[name][0].name} contains too")
            if name not in names:
                raise ValueError(f"{path}: contains {name}, which {INDEX} does not name")
            found[name] = path, entry
        missing = sorted(name for name in names - entries.keys() if not name.endswith(BUFFERS))
        if missing:
            raise ValueError(f"{path}: {cut(missing[0], 200)} is missing, although {INDEX} names it")
    return found


def weights_file(directory: Path) -> Path:
    """The directory's model.safetensors, or the index of its shards if only that exists."""
    single, index = directory / WEIGHTS, directory / INDEX
    return single if single.is_file() or not index.is_file() else index


def read_index(path: Path) -> dict[str, set[str]]:
    """{shard: its tensors}, sorted, as the index at `path` has them.

    Raises ValueError for an index without a weight_map, and for a shard that is not a safetensors file beside it.
    """
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted or not all(isinstance(shard, str) for shard in wanted.values()):
        raise ValueError(f'{path}: expected a "weight_map" of tensors to files')
    shards: dict[str, set[str]] = {shard: set() for shard in sorted(set(wanted.values()))}
    for shard in shards:
        if Path(shard).suffix in PICKLED:
            raise ValueError(f"{path.parent / shard}: {UNPICKLE}")
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path}: weight_map: expected safetensors files beside it, got {shown(shard)}")
    for name, shard in wanted.items():
        shards[shard].add(name)
    return shards


# ---- writing ---------------------------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """The bytes in a size: a whole number, or text such as "5GB" or "500MB" (decimal, as in transformers).

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).upper())
    n = int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]] if match else 0
    if n < 1 or isinstance(size, bool):
        raise ValueError(f'max_shard_size: expected a number of bytes, or text such as "5GB", got {shown(size)}')
    return n


def write_model(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD) -> int:
    """Write (name, array) as model.safetensors, or as shards of at most `shard_bytes` and an index; -> the bytes of all
    tensors.

    `directory` comes from `writing.together` or `writing.new_directory`. A tensor whose name begins with that of the
    one before it, like bitsandbytes' parts, goes into the same shard. Raises ValueError for a name that appears twice.
    """
    shards, weight, seen = [_Shard(directory / "0.part")], "", set()
    for name, array in tensors:
        if name in seen:
            raise ValueError(f"{target(directory)}: {name} appears twice")
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
    """A safetensors file that is being written.

    The header, which lists all sizes, comes first, then the tensors with the widest items. So tensors are gathered by
    the size of their items, each size in a file of its own, and these are put behind the header at the end.
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


def copy_companions(directory: Path, new: Path) -> None:
    """Copy the COMPANIONS of the model in `directory` to the directory `new`."""
    for pattern in COMPANIONS:
        for file in sorted(directory.glob(pattern)):
            if file.is_file() and file.suffix not in PICKLED:
                (new / file.relative_to(directory)).parent.mkdir(exist_ok=True)
                copy_file(file, new / file.relative_to(directory))
