"""Files, whole or not at all: JSON and safetensors, read strictly and written atomically.

Nothing is ever unpickled. A file is written under a temporary name and renamed, so that a killed run leaves the old
file or the new one and never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # safetensors reads bfloat16 only where this was imported
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))  # what a weight may be


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


def read_weights(path: Path, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """`read_tensors` of a file that others made: no pickle stands in for it, and every tensor is of floats; those whose
    name ends in one of `skip` are left out."""
    pickled = sorted(path.parent.glob("*.bin"))
    if pickled and not path.is_file():
        raise ValueError(f"{pickled[0]}: is pickled, which is never opened; save it as safetensors")
    for name, tensor in read_tensors(path):
        if name.endswith(skip):
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        yield name, tensor
