"""Files written atomically, under a temporary name and then renamed: a killed run leaves the old file or the new."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Arrays of any dtype that safetensors knows, contiguous or not."""
    from safetensors.numpy import save_file

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


def check_new(path: Path) -> None:
    """Raise ValueError unless `path` may become a new directory: it is not there, or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: is there already, and not empty")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory under a temporary name beside `path`, renamed to it unless an error came; gone if one did. One that a
    killed run left goes first. `path` is as `check_new` wants it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
