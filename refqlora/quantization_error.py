"""How far a quantised tensor is from the original."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .backend import Array, array_module
from .blockwise import CHUNK
from .quantization import QuantizedTensor, dequantize


@dataclass(frozen=True)
class Error:
    """How far w' is from w: the sums of (w' - w)^2 and of w^2, and the largest |w' - w|. Errors of several tensors add
    up: `a + b`."""

    squares: float = 0.0
    weight_squares: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Error) -> Error:
        a, b = self, other
        return Error(a.squares + b.squares, a.weight_squares + b.weight_squares, max(a.largest, b.largest))

    @property
    def relative(self) -> float:
        """The root mean square error, divided by the root mean square of w; 0 if w is 0."""
        return (self.squares / self.weight_squares) ** 0.5 if self.weight_squares else 0.0


def quantization_error(w: Array, q: QuantizedTensor) -> Error:
    """The error of q, a quantisation of w, summed in float64."""
    xp = array_module(w)
    flat, back, total = w.reshape(-1), dequantize(q).reshape(-1), Error()
    for start in range(0, flat.size, CHUNK):
        v = flat[start : start + CHUNK].astype(np.float64)
        e = back[start : start + CHUNK] - v
        total += Error(float(e @ e), float(v @ v), float(xp.abs(e).max()))
    return total
