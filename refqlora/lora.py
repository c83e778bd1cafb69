"""The linear layer with a low-rank adapter: y = x W^T + s (x A^T) B^T, W frozen or trained, dense or quantised.

LoRA (Hu et al. 2021, section 4.1): W (out, in) stays as it is; A (r, in) and B (out, r) learn the change s B A.
A quantised W (QLoRA, Dettmers et al. 2023, eq. 5) is dequantised for each product and let go.
Names, orientation and initialisation are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np

from .backend import Array, array_module
from .quantize import QuantizedTensor, dequantize

Weight = Array | QuantizedTensor  # (out, in)


class LoRA(NamedTuple):
    """One linear's adapter, as its forward takes it: A (r, in), B (out, r), the scale s, the dropout's rate."""

    A: Array
    B: Array
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: `adapter_config.json` holds these fields under PEFT's names (r, lora_alpha, ...).

    targets: "all-linear" (every linear but the output head), or names such as ("q_proj", "v_proj").
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | np.integer) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of 1 or more, not {self.rank!r}")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not isinstance(self.alpha, Real) or not 0 < self.alpha < np.inf:
            raise ValueError(f"alpha must be a positive number, not {self.alpha!r}")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora must be true or false, not {self.rslora!r}")
        if not isinstance(self.targets, str):
            if not isinstance(self.targets, tuple | list) or not all(isinstance(t, str) for t in self.targets):
                raise ValueError(f"targets must be a string or names, not {self.targets!r}")
        elif self.targets != "all-linear":
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(f"target {self.targets!r} is no regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """s: alpha/r (LoRA, section 4.1), or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return float(self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank)

    def matches(self, linears: Iterable[str]) -> list[str]:
        """Those of `linears` (names such as model.layers.0.self_attn.q_proj) that get an adapter.

        PEFT's rule: a name in a list matches a linear of that very name or one that ends in `.name`; a string other
        than "all-linear" is a regular expression for the whole name. Raises ValueError for a target that matches none.
        """
        linears = list(linears)
        if self.targets == "all-linear":
            return linears
        if isinstance(self.targets, str):
            found = [name for name in linears if re.fullmatch(self.targets, name)]
            missing = [] if found else [f"{self.targets!r}, a regular expression for the whole name,"]
        else:
            found = [name for name in linears if any(_ends_in(name, target) for target in self.targets)]
            missing = [target for target in self.targets if not any(_ends_in(name, target) for name in found)]
        if missing or not found:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"target {', '.join(missing) or '()'} matches no linear; there are: {', '.join(kinds)}")
        return found


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def init_lora(weight: Weight, rank: int, rng: np.random.Generator, dtype: np.dtype) -> tuple[Array, Array]:
    """A uniform in +-1/sqrt(in), B zero, so that an untrained adapter changes nothing. -> A (r, in), B (out, r).

    PEFT's default (kaiming_uniform with a = sqrt(5)); the paper drew A from a Gaussian.
    """
    out_features, in_features = weight.shape
    bound = in_features**-0.5
    a = rng.uniform(-bound, bound, (rank, in_features)).astype(dtype)
    return a, np.zeros((out_features, rank), dtype)


def linear_forward(
    x: Array,
    weight: Weight,
    bias: Array | None = None,
    lora: LoRA | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Array, tuple]:
    """y = x W^T + bias + s (dropout(x) A^T) B^T. x (..., in) -> y (..., out).

    Dropout is on when `rng` is given: each element of the adapter's input is zeroed with probability
    `lora.dropout` and the rest divided by 1 - dropout; the mask is kept for the backward.
    """
    xp = array_module(x)
    rows = x.reshape(-1, x.shape[-1])  # (N, in): one matrix product, not B of them
    y = rows @ dense(weight, x.dtype).T  # (N, out)
    if bias is not None:
        y += bias
    keep = z = None
    if lora is not None:
        if rng is not None and lora.dropout > 0:
            keep = xp.asarray(rng.random(rows.shape, np.float32) >= lora.dropout)
        z = _drop(rows, keep, lora) @ lora.A.T  # (N, r)
        y += (z * lora.scale) @ lora.B.T
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias, lora, keep, z)


def linear_backward(dy: Array, cache: tuple, train_weight: bool = False) -> tuple[Array, dict[str, Array]]:
    """dy (..., out) -> dx (..., in), grads.

    grads holds "lora_A.weight" (r, in) and "lora_B.weight" (out, r) where there is an adapter; "weight" (out, in)
    and "bias" (out,) only with `train_weight`: for a frozen W neither is ever formed.

        z = x A^T, y += s z B^T      so  dB = s dy^T z,  dz = s dy B,  dA = dz^T x,  dx += dz A
        y = x W^T + bias             so  dx += dy W,  dW = dy^T x,  dbias = sum of dy's rows
    """
    x, weight, bias, lora, keep, z = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (N, in), (N, out)
    grads = {}
    dx = drows @ dense(weight, x.dtype)  # (N, in)
    if lora is not None:
        dz = (drows @ lora.B) * lora.scale  # (N, r)
        grads["lora_A.weight"] = dz.T @ _drop(rows, keep, lora)
        grads["lora_B.weight"] = drows.T @ (z * lora.scale)
        dx += _drop(dz @ lora.A, keep, lora)
    if train_weight:
        grads["weight"] = drows.T @ rows
        if bias is not None:
            grads["bias"] = drows.sum(axis=0)
    return dx.reshape(x.shape), grads


def dense(weight: Weight, dtype: np.dtype) -> Array:
    """The weight as an array of `dtype`: itself if it is one, otherwise dequantised or cast for this product only."""
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, dtype)
    return weight.astype(dtype, copy=False)


def merge(weight: Weight, lora: LoRA) -> Array:
    """W + s B A as a new array (out, in) of W's dtype (float32 for a quantised W, from its dequantised values)."""
    dtype = np.dtype(np.float32) if isinstance(weight, QuantizedTensor) else weight.dtype
    return (dense(weight, dtype) + lora.scale * (lora.B @ lora.A)).astype(dtype)  # rounded once, to a 16-bit dtype too


def _drop(x: Array, keep: Array | None, lora: LoRA) -> Array:
    return x if keep is None else x * keep / (1 - lora.dropout)
