"""A safetensors file mapped into memory: the header says what is there, and data are read where they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from .files import read_metadata

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class Mapped(NamedTuple):
    """A tensor: the file that holds it and from which byte, the dtype's name in the header, the shape, the bytes, and
    the array over them; None where NumPy has no such dtype."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    array: np.ndarray | None

    def read(self) -> np.ndarray:
        """A copy, for whoever goes through it all: pages of the map count as the process's own while it is open."""
        data = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.start)
        return data.view(self.array.dtype).reshape(self.shape)


def map_tensors(path: Path) -> tuple[dict[str, Mapped], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their data, and its metadata.

    Raises FileNotFoundError, or ValueError that names the file, where it is not there or its header is not valid.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    metadata = read_metadata(path)  # the library checks the header: sizes, offsets, that they fill the file
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, mode="r")
    tensors = {}
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        array = None
        if dtype in _DTYPES:
            array = np.ndarray(shape, _DTYPES[dtype], data, 8 + length + start)
        tensors[name] = Mapped(path, 8 + length + start, dtype, shape, stop - start, array)
    return tensors, metadata
