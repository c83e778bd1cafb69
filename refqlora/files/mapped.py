"""A tensor of a safetensors file, mapped into memory: data are read where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .reading import NAMES, Entry, read_header, read_tensor


class Mapped(NamedTuple):
    """The file that holds a tensor, and where in it."""

    path: Path
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """Its name in the file's header, such as "BF16"."""
        return NAMES[self.entry.dtype]

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    @property
    def array(self) -> np.ndarray:
        """The tensor, mapped and not writeable."""
        data = np.memmap(self.path, np.uint8, mode="r")
        return np.ndarray(self.shape, self.entry.dtype, data, self.entry.start)

    def read(self) -> np.ndarray:
        """A copy, for whoever goes through it all: pages of a map count as the process's own while it is open."""
        return read_tensor(self.path, self.entry)


def map_tensors(path: Path) -> tuple[dict[str, Mapped], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their data, and its metadata."""
    entries, metadata = read_header(path)
    return {name: Mapped(Path(path), entry) for name, entry in entries.items()}, metadata
