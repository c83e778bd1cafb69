"""JSON and safetensors files, read strictly: files that break the format are refused, and nothing is ever unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..checks import cut, shown

_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
STORED_DTYPES = {name: np.dtype(dtype) for name, dtype in _TYPES.items()}  # by their names in a safetensors file
STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
UNPICKLE = (
    "pickled files are never opened, as they may run code; if you trust it, transformers converts it: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))  # dtypes of weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, or ValueError as `parse_object` does; both name the file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ValueError, beginning with `where`, for anything else, and for a key that appears
    twice."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8. Raises ValueError for anything else, and for a key that appears twice in an object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = set()
        for key, _ in pairs:
            if key in keys:
                raise ValueError(f"the key {shown(key)} appears twice")
            keys.add(key)
        return dict(pairs)

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _UnknownDtype(ValueError):
    """The file may be valid, but NumPy has no such dtype."""


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file: it begins at byte `start`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a safetensors file holds: an Entry for each tensor, in the order of their data, and the metadata.

    The format (huggingface/safetensors, README): 8 bytes with the header's length; the header, in JSON; the tensors'
    bytes, without gaps. Raises FileNotFoundError, or ValueError that names the file and the tensor at fault, unless
    the names, dtypes, shapes and offsets in the header agree and fill the file to its last byte.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 8 + length <= size and length <= MAX_HEADER else None
    try:
        if header is None:
            raise ValueError(f"{size} bytes cannot hold a header" + (f" of {length}" if size >= 8 else ""))
        return _check_header(parse_json(header), 8 + length, size)
    except _UnknownDtype as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


def _check_header(header: Any, start: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check a header parsed from JSON, for tensors in the bytes from `start` to `size`; -> as `read_header`."""
    if not isinstance(header, dict):
        raise ValueError(f"header: expected an object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata: expected an object of texts")
    for name, fields in header.items():
        if len(name) > 1000:
            raise ValueError(f"{cut(name, 60)}: expected a name of at most 1000 characters, got {len(name)}")
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name}: expected the fields dtype, shape and data_offsets, got {shown(fields)}")
        for field in ("shape", "data_offsets"):
            numbers = fields[field] if isinstance(fields[field], list) else [None]
            if len(numbers) > 32 or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(f"{name} has {field} {shown(fields[field])}")
        if not isinstance(fields["dtype"], str) or fields["dtype"] not in STORED_DTYPES:
            raise _UnknownDtype(f"{name} is {shown(fields['dtype'])}, expected one of {', '.join(STORED_DTYPES)}")
        if math.prod(n or 1 for n in fields["shape"]) >= 2**59:  # NumPy refuses such shapes, even with 0 elements
            raise ValueError(f"{name} has shape {shown(fields['shape'])}")
    entries, at = {}, 0
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = STORED_DTYPES[fields["dtype"]], tuple(fields["shape"])
        stop = at + math.prod(shape) * dtype.itemsize
        if fields["data_offsets"] != [at, stop]:
            found = f"{shown(fields['data_offsets'])} instead of {[at, stop]}"
            raise ValueError(f"{name}, {dtype} of shape {shape}, takes the bytes {found}")
        entries[name] = Entry(dtype, shape, start + at)
        at = stop
    if start + at != size:
        raise ValueError(f"its tensors end at byte {start + at}, the file at {size}")
    return entries, metadata


def read_tensor(path: Path, entry: Entry) -> np.ndarray:
    """One tensor of a safetensors file, at an Entry of `read_header`. The file is read, not mapped: the pages of a
    mapped file count as the process's memory for as long as it is open."""
    flat = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.start)
    if flat.size != entry.nbytes:
        raise ValueError(f"{path}: the file became shorter while it was being read")
    return flat.view(entry.dtype).reshape(entry.shape)


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of a safetensors file, one tensor in memory at a time. Raises what `read_header` raises."""
    for name, entry in read_header(path)[0].items():
        yield name, read_tensor(path, entry)


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in a safetensors file's header."""
    return read_header(path)[1]


def read_weights_header(
    path: Path, dtypes: Sequence[np.dtype] = FLOATS, skip: tuple[str, ...] = ()
) -> dict[str, Entry]:
    """The tensors in a weights file, without those whose names end in one of `skip`.

    Raises what `read_header` raises, and ValueError for a tensor whose dtype is not in `dtypes`, or if there is only a
    pickled file.
    """
    path = Path(path)
    if not path.is_file():
        pickled = sorted(file for file in path.parent.glob("*") if file.suffix in PICKLED)
        if pickled:
            raise ValueError(f"{pickled[0]}: {UNPICKLE}")
    entries = {name: entry for name, entry in read_header(path)[0].items() if not name.endswith(skip)}
    for name, entry in entries.items():
        if entry.dtype not in dtypes:
            raise ValueError(f"{path}: {name} is {entry.dtype}, expected one of {', '.join(map(str, dtypes))}")
    return entries


def read_weights(path: Path, dtypes: Sequence[np.dtype] = FLOATS) -> Iterator[tuple[str, np.ndarray]]:
    """`read_tensors` of a weights file, by the rules of `read_weights_header`."""
    for name, entry in read_weights_header(path, dtypes).items():
        yield name, read_tensor(path, entry)


class Mapped(NamedTuple):
    """The file that holds a tensor, and where in it."""

    path: Path
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """The dtype's name in the file's header, such as "BF16"."""
        return STORED_NAMES[self.entry.dtype]

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    @property
    def array(self) -> np.ndarray:
        """The tensor, mapped and read-only."""
        data = np.memmap(self.path, np.uint8, mode="r")
        return np.ndarray(self.shape, self.entry.dtype, data, self.entry.start)

    def read(self) -> np.ndarray:
        """The tensor as a copy. Prefer it to `array` to go through all elements: see `read_tensor`."""
        return read_tensor(self.path, self.entry)


def map_tensors(path: Path) -> tuple[dict[str, Mapped], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their data, and its metadata."""
    entries, metadata = read_header(path)
    return {name: Mapped(Path(path), entry) for name, entry in entries.items()}, metadata
