"""Files written safely: under a temporary name, then renamed, by one process at a time in each directory.

A killed run leaves the old file or the new one, never half of one; the next run that writes there removes its temporary
files. An error names the file that was being written, not the temporary one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .reading import STORED_NAMES

LOCK = ".refqlora.lock"
_STAGING = ".refqlora-"  # tempfile adds eight characters
_STAGED = re.compile(re.escape(_STAGING) + r"[a-z0-9_]{8}")
_held: set[tuple[Path, int]] = set()  # directories locked by this process, and the thread that locked each


# ---- one file --------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    path = Path(path)
    with together(path.parent) as new, naming(path):
        (new / path.name).write_bytes(content)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes to `path`, atomically."""
    path = Path(path)
    with together(path.parent) as new, naming(path):
        shutil.copyfile(source, new / path.name)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically: arrays of the dtypes in `reading.STORED_NAMES`, contiguous or not."""
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_NAMES:
            raise ValueError(
                f"{target(path)}: {name}: expected one of {', '.join(map(str, STORED_NAMES))}, got {tensor.dtype}"
            )
    header, order = safetensors_header({name: (x.dtype, x.shape) for name, x in tensors.items()}, metadata or {})
    with together(path.parent) as new, naming(path), open(new / path.name, "wb") as file:
        file.write(header)
        for name in order:
            file.write(raw(tensors[name]))


def safetensors_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The first bytes of a safetensors file of these dtypes and shapes, and the order in which the tensors follow.

    A tensor must start at a multiple of its item's size, without a gap before it, so the widest come first.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name in order:
        dtype, shape = tensors[name]
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def raw(tensor: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


# ---- several files, a new directory ----------------------------------------------------------------------------


@contextmanager
def together(directory: Path, last: str = "", instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary directory; the files written into it replace those in `directory` when the block ends without error.

    If files make sense only together, name in `last` the one without which nothing reads the others, such as the
    config. The old `last` is removed first and the new one is moved last, so that a killed run leaves all the old
    files, all the new ones, or a directory without `last`: never new weights beside an old config.

        with together(directory, last="adapter_config.json") as new:
            write_tensors(new / "adapter_model.safetensors", tensors)
            write_json(new / "adapter_config.json", config)

    instead_of: patterns of old files to remove. `directory` is created if it does not exist, and is locked meanwhile.
    Inside the temporary directory, the functions of this module write directly.
    """
    directory = Path(directory)
    if _STAGED.fullmatch(directory.name):
        yield directory
        return
    with locked(directory):
        with naming(directory):
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
        try:
            yield staging
            names = sorted(os.listdir(staging), key=lambda name: (name == last, name))
            try:
                _put(staging, directory, names, last, instead_of)
            except KeyboardInterrupt:  # between two renames: finish them
                _put(staging, directory, names, last, instead_of)
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, directory: Path, names: list[str], last: str, instead_of: Sequence[str]) -> None:
    """Move the files from `staging` to `directory`. Called again after an interrupt, it moves those that are left."""
    for path in staging.rglob("*"):
        with naming(directory / path.relative_to(staging)):
            _sync(path)
    if last in names[1:] and (staging / last).exists():
        (directory / last).unlink(missing_ok=True)
        _sync(directory)
    for old in {file for pattern in instead_of for file in directory.glob(pattern)}:
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in names:
        if name == last:
            _sync(directory)
        if (staging / name).exists():
            with naming(directory / name):
                os.replace(staging / name, directory / name)
    _sync(directory)


def _sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, onto the disk; not every system can do the latter."""
    if path.is_file():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    with suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def new_directory(path: Path, last: str = "config.json") -> Iterator[Path]:
    """`together` for a directory that must be new or empty, as `check_new` checks before the block runs. After an error
    the directory is as it was. A link to an empty directory is followed."""
    check_new(path)
    with locked(path):
        check_new(path)  # now that no other process writes there
        with together(path, last) as new:
            yield new


def check_new(path: Path) -> None:
    """Raise ValueError unless `path` does not exist or is an empty directory."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path}: expected a new or empty directory, got a link to nothing")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a new or empty directory, got a file")
    if path.exists() and any(file.name != LOCK and not _STAGED.fullmatch(file.name) for file in path.iterdir()):
        raise ValueError(f"{path}: expected a new or empty directory, got one with files in it")


# ---- one process at a time -------------------------------------------------------------------------------------


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing in `directory` while the block runs.

    The directory is created if it does not exist, and removed again if nothing was written. The system releases the
    lock when the process dies. Temporary files that killed runs left are removed. Blocks may be nested in one thread.
    Raises ValueError at once if another process or another thread holds the lock. On a system without locks nothing is
    locked.
    """
    directory = Path(directory)
    key = (directory.resolve(), threading.get_ident())
    if key in _held:
        yield
        return
    made = not directory.exists()
    lock = directory / LOCK
    with naming(directory):
        number, exclusive = _acquire(directory, lock)
    _held.add(key)
    try:
        if exclusive:
            for left in directory.iterdir():
                if _STAGED.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        _held.discard(key)
        try:
            with suppress(OSError):  # Windows does not remove an open file
                lock.unlink()
        finally:
            os.close(number)
        if made:
            with suppress(OSError):  # it is not empty
                directory.rmdir()


def _acquire(directory: Path, lock: Path) -> tuple[int, bool]:
    """Create and lock the file `lock`; -> its file descriptor, and whether the system has locks."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the other process removed the directory just now
            continue
        try:
            exclusive = _lock(number)
            # The other process removed the file between our opening and our locking it: lock the new one.
            if not exclusive or os.path.samestat(os.fstat(number), os.stat(lock)):
                return number, exclusive
        except BlockingIOError:
            os.close(number)
            raise ValueError(f"{directory}: another process is writing here") from None
        except FileNotFoundError:
            pass
        os.close(number)


def _lock(number: int) -> bool:
    """Lock an open file; -> whether the system has locks. Raises BlockingIOError if another process holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError from None
        return False
    return True


# ---- errors ----------------------------------------------------------------------------------------------------


def target(path: Path) -> Path:
    """The final path of a path in a temporary directory of `together`, or of the directory itself."""
    return Path(*(part for part in Path(path).parts if not _STAGED.fullmatch(part)))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError in the block read "PATH: No space left on device", with the final path of `path`."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it has a message of ours
            raise
        named = type(error)(f"{target(path)}: {error.strerror}")
        named.errno = error.errno
        raise named from None
