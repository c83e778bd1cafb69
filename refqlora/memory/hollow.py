"""Hollow arrays: they have a shape and a dtype but no numbers. The engine runs on them as on NumPy's, and every byte
that it would hold is counted, from the moment it would be allocated until it would be freed.

So the memory of a step is predicted by the code that takes the step: there is no second description of it to keep in
agreement, a model of 70 billion parameters needs no memory, and what is freed when is Python's own doing. What a hollow
array knows of its layout is a NumPy array without memory behind it (`skeleton`): NumPy itself decides what is a view.

    with recording() as record:
        x = hollow((4096, 4096), np.float32)
        y = x @ x.T
    record.live                                  # 128 MiB: x and y

An array may have one value that all of its elements share, as tokens and labels do; what is computed from such values
alone has one too. Any other number reads as 1, and is finite, so that checks for NaN pass.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.lib.stride_tricks import as_strided

_PACKAGE = str(Path(__file__).parents[1])
_OUTER = {"layer_forward", "layer_backward", "decoder_forward", "decoder_backward", "loss_and_gradients"}
_NOTHING = np.zeros(1, np.complex128)  # what every skeleton pretends to view; it is never read


class Made(NamedTuple):
    """A buffer: its shape and dtype, and the engine's functions that were being run when it was made."""

    shape: tuple[int, ...]
    dtype: np.dtype
    functions: tuple[str, ...]


class Record:
    """What was allocated and freed, in order.

    events: (buffer's number, bytes): positive when it was allocated, negative when it was freed.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.buffers: list[Made] = []
        self.live = 0
        self.peak = 0

    def add(self, shape: tuple[int, ...], dtype: np.dtype, nbytes: int) -> int:
        number = len(self.buffers)
        self.buffers.append(Made(shape, dtype, _functions()))
        self.events.append((number, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        return number

    def drop(self, number: int, nbytes: int) -> None:
        self.events.append((number, -nbytes))
        self.live -= nbytes


_records: list[Record] = []


@contextmanager
def recording() -> Iterator[Record]:
    """Count the bytes of hollow arrays that are made or freed inside."""
    _records.append(Record())
    try:
        yield _records[-1]
    finally:
        _records.pop()


def _functions() -> tuple[str, ...]:
    """The engine's functions that are being run, from the inside out, up to the layer or the decoder."""
    names: list[str] = []
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and not (names and names[-1] in _OUTER):
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            names.append(code.co_name)
        frame = frame.f_back
    return tuple(names)


class _Buffer:
    """Memory that a hollow array and its views share: counted until the last of them is gone."""

    __slots__ = ("nbytes", "number", "record")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.record = _records[-1] if _records else None
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.number = self.record.add(shape, dtype, self.nbytes) if self.record is not None else -1

    def __del__(self) -> None:
        if self.record is not None:
            self.record.drop(self.number, self.nbytes)


class Hollow(NDArrayOperatorsMixin):
    """An array of a shape and dtype, without numbers, or with one `value` in every place."""

    __slots__ = ("buffer", "skeleton", "value")
    array_module: Any  # set below, to HOLLOW

    def __init__(self, buffer: _Buffer, skeleton: np.ndarray, value: Any = None) -> None:
        self.buffer, self.skeleton, self.value = buffer, skeleton, value

    shape = property(lambda self: self.skeleton.shape)
    dtype = property(lambda self: self.skeleton.dtype)
    ndim = property(lambda self: self.skeleton.ndim)
    size = property(lambda self: self.skeleton.size)
    nbytes = property(lambda self: self.skeleton.nbytes)
    flags = property(lambda self: self.skeleton.flags)
    T = property(lambda self: self._view(self.skeleton.T))

    def __len__(self) -> int:
        return len(self.skeleton)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _view(self, skeleton: np.ndarray) -> Hollow:
        return Hollow(self.buffer, skeleton, self.value)

    # ---- layout: views where NumPy makes views ----

    def reshape(self, *shape: Any) -> Hollow:
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        try:
            return self._view(np.reshape(self.skeleton, shape, copy=False))
        except ValueError:
            if self.flags.c_contiguous:  # the shape does not fit
                raise
            return self.copy().reshape(shape)

    def transpose(self, *axes: int) -> Hollow:
        return self._view(self.skeleton.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> Hollow:
        return self._view(self.skeleton.swapaxes(a, b))

    def view(self, dtype: Any) -> Hollow:
        return self._view(self.skeleton.view(dtype))

    def astype(self, dtype: Any, copy: bool = True) -> Hollow:
        return self if not copy and self.dtype == dtype else hollow(self.shape, dtype, self.value)

    def copy(self) -> Hollow:
        return self.astype(self.dtype)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Hollow | np.ndarray) for part in parts):  # arrays index the first axes
            shape = np.broadcast_shapes(*(part.shape for part in parts))
            return hollow((*shape, *self.shape[len(parts) :]), self.dtype, self.value)
        skeleton = self.skeleton[index]
        if isinstance(skeleton, np.ndarray):
            return self._view(skeleton)
        return self.dtype.type(1 if self.value is None else self.value)

    def __setitem__(self, index: Any, value: object) -> None:
        pass  # what is computed beforehand is counted where it is computed

    # ---- reductions ----

    def sum(self, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Any:
        return self._reduced(np.sum, axis, keepdims, dtype or (np.int64 if self.dtype.kind in "bi" else self.dtype))

    def mean(self, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Any:
        return self._reduced(np.mean, axis, keepdims, dtype or self.dtype)

    def max(self, axis: Any = None, keepdims: bool = False) -> Any:
        return self._reduced(np.max, axis, keepdims, self.dtype)

    def min(self, axis: Any = None, keepdims: bool = False) -> Any:
        return self._reduced(np.min, axis, keepdims, self.dtype)

    def any(self) -> bool:
        return bool(self.value)

    def all(self) -> bool:
        return self.value is None or bool(self.value)

    def _reduced(self, function: Callable[..., Any], axis: Any, keepdims: bool, dtype: Any) -> Any:
        if axis is None:
            if self.value is None:
                return np.dtype(dtype).type(1)
            return self.value * self.size if function is np.sum else self.value
        gone = axis % self.ndim
        shape = [1 if i == gone else n for i, n in enumerate(self.shape) if keepdims or i != gone]
        return hollow(tuple(shape), dtype)

    # ---- NumPy's functions ----

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if method == "at":
            return None
        if method != "__call__":
            raise NotImplementedError(f"hollow arrays: {ufunc.__name__}.{method}")
        if out is not None:
            return out[0]
        if ufunc is np.matmul:
            return hollow(_product_shape(*inputs), np.result_type(*(x.dtype for x in inputs)))
        values = [x.value if isinstance(x, Hollow) else x if np.ndim(x) == 0 else None for x in inputs]
        value = None if any(value is None for value in values) else ufunc(*values)
        kinds = tuple(type(x) if type(x) in (bool, int, float) else x.dtype for x in inputs)
        dtype = ufunc.resolve_dtypes((*kinds, *[None] * ufunc.nout))[-1]
        return hollow(np.broadcast_shapes(*(getattr(x, "shape", ()) for x in inputs)), dtype, value)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            raise NotImplementedError(f"hollow arrays: numpy.{function.__name__}")
        return _FUNCTIONS[function](*args, **kwargs)

    def __array__(self, *args: object, **options: object) -> np.ndarray:
        raise TypeError("a hollow array has no numbers")

    def __float__(self) -> float:
        return 1.0


def hollow(shape: tuple[int, ...], dtype: Any, value: Any = None) -> Hollow:
    """A new hollow array, C-contiguous, whose bytes count from now on; `value` is that of every element."""
    shape, dtype = tuple(map(int, shape)), np.dtype(dtype)
    strides, step = [], dtype.itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    nothing = np.frombuffer(_NOTHING, dtype, count=1)
    return Hollow(_Buffer(shape, dtype), as_strided(nothing, shape, tuple(reversed(strides))), value)


def _product_shape(a: Any, b: Any) -> tuple[int, ...]:
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: {a.shape} and {b.shape} do not fit")
    return (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _like(x: Any, dtype: Any = None, shape: Any = None) -> Hollow:
    return hollow(x.shape if shape is None else shape, dtype or x.dtype)


def _einsum(formula: str, *arrays: Any) -> Hollow:
    inputs, output = formula.split("->")
    sizes: dict[str, Any] = {}
    for letters, x in zip(inputs.split(","), arrays, strict=True):
        named = letters.replace("...", "")
        sizes |= dict(zip(named, x.shape[x.ndim - len(named) :], strict=True))
        if "..." in letters:
            sizes["..."] = x.shape[: x.ndim - len(named)]
    rest = tuple(sizes[letter] for letter in output.replace("...", ""))
    return hollow((*sizes["..."], *rest) if "..." in output else rest, np.result_type(*(x.dtype for x in arrays)))


def _concatenate(parts: Sequence[Any], axis: int = 0) -> Hollow:
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return hollow(tuple(shape), parts[0].dtype)


def _split(x: Hollow, at: Sequence[int], axis: int = 0) -> list[Hollow]:
    bounds = [0, *at, x.shape[axis]]
    axis %= x.ndim
    return [x[(slice(None),) * axis + (slice(a, b),)] for a, b in pairwise(bounds)]


def _take(x: Any, index: Any, out: Any = None, mode: str = "raise") -> Hollow:
    index = index.astype(np.intp, copy=False)  # as NumPy does before it begins
    return hollow((*index.shape, *x.shape[1:]), x.dtype) if out is None else out


def _triangle(x: Any, k: int = 0) -> Hollow:
    _mask = _like(x, np.bool_)  # which elements stay, as NumPy has it for a moment
    return _like(x)


def as_hollow(x: Any, dtype: Any = None) -> Hollow:
    """A hollow array of the shape of x; x itself if it is one."""
    if isinstance(x, Hollow):
        return x.astype(dtype or x.dtype, copy=False)
    return hollow(np.shape(x), dtype or x.dtype)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.empty_like: _like,
    np.zeros_like: _like,
    np.ones_like: _like,
    np.einsum: _einsum,
    np.concatenate: _concatenate,
    np.split: _split,
    np.take: _take,
    np.flatnonzero: lambda x: hollow((x.size if x.all() else 0,), np.intp),
    np.triu: _triangle,
    np.tril: _triangle,
    np.dot: lambda a, b: 1.0,
}


class _Module:
    """What `array_module` gives for a hollow array: NumPy, but arrays that are made from nothing are hollow too."""

    __name__ = "hollow"

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any = np.float64) -> Hollow:
        return hollow(shape if isinstance(shape, tuple) else (shape,), dtype)

    zeros = ones = empty

    @staticmethod
    def full(shape: Any, value: object, dtype: Any) -> Hollow:
        return hollow(shape, dtype)

    @staticmethod
    def arange(*range_: int) -> Hollow:
        return hollow((len(range(*range_)),), np.int64)

    asarray = ascontiguousarray = staticmethod(as_hollow)


HOLLOW = Hollow.array_module = _Module()
