"""The linear layer with a low-rank adapter: y = x W^T + s (x A^T) B^T, W frozen or trained, dense or quantised.

    LoRA     W (out, in) stays as it is; A (r, in) and B (out, r) learn its change, s B A (Hu et al. 2021, section 4.1)
    QLoRA    W is quantised, and dequantised for each product (Dettmers et al. 2023, eq. 5)
    DoRA     the rows of W + s B A are scaled to lengths m (out,), which are learnt as well (Liu et al. 2024, eq. 5)

s is alpha / r. Names and orientation are PEFT's. minimal.py has the QLoRA linear in its plainest form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .backend import Array, array_module, uniform
from .checks import check, check_array, number, shown
from .quantization import QuantizedTensor, dequantize

Weight = Array | QuantizedTensor  # (out, in)


class LoRA(NamedTuple):
    """One linear's adapter: A (r, in), B (out, r), the scale s, the rate of its dropout, and for DoRA the magnitude m
    (out,)."""

    A: Array
    B: Array
    scale: float
    dropout: float = 0.0
    magnitude: Array | None = None


def linear_forward(
    x: Array,
    weight: Weight,
    bias: Array | None = None,
    lora: LoRA | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Array, tuple]:
    """y = x W^T + bias + s (dropout(x) A^T) B^T. x (..., in) -> y (..., out).

    Dropout is on if `rng` is given: each element of the adapter's input is zeroed with probability
    `lora.dropout`, and the others are divided by 1 - dropout. The cache keeps the mask.

    DoRA: v = x W^T + s (x A^T) B^T and y = v m/norm + bias, where norm (out,) holds the lengths of the rows of
    W + s B A. With dropout, as in PEFT, v is computed from dropout(x), and
    y = x W^T - dropout(x) W^T + v m/norm + bias.
    """
    rows = x.reshape(-1, x.shape[-1])  # (N, in): one matrix product, not B of them
    w = dense(weight, x.dtype)
    y = rows @ w.T  # (N, out)
    keep = z = dora = None
    if lora is not None:
        if rng is not None and lora.dropout > 0:
            keep = uniform(rng, rows) >= lora.dropout  # (N, in)
        dropped = _drop(rows, keep, lora)  # (N, in)
        if lora.magnitude is not None:
            norm = row_norms(w, lora)  # (out,)
            base = y if keep is None else dropped @ w.T  # (N, out): dropout(x) W^T
        del w  # frees a dequantised W
        z = dropped @ lora.A.T  # (N, r)
        change = (z * lora.scale) @ lora.B.T  # (N, out)
        if lora.magnitude is None:
            y += change
        else:
            v = base + change
            change = v * (lora.magnitude / norm)
            change -= base
            y += change
            dora = v, norm
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias, lora, keep, z, dora)


def linear_backward(dy: Array, cache: tuple, train_weight: bool = False) -> tuple[Array, dict[str, Array]]:
    """dy (..., out) -> dx (..., in), grads.

    With an adapter grads has "lora_A.weight" (r, in) and "lora_B.weight" (out, r), with DoRA "lora_magnitude_vector"
    (out,) as well. Only `train_weight` adds "weight" (out, in) and "bias" (out,): for a frozen W neither is formed.

        y = x W^T + bias                     dx = dy W, dW = dy^T x, dbias = sum of dy's rows
        z = x A^T, y += s z B^T              dB = s dy^T z, dz = s dy B, dA = dz^T x, dx += dz A
        y += v m/norm - base, with DoRA      dm = sum of (dy v)'s rows / norm, dv = dy m/norm, dbase = dv - dy

    DoRA's norm is treated as a constant, as its paper proposes (section 4.3) and PEFT does.
    """
    x, weight, bias, lora, keep, z, dora = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (N, in), (N, out)
    grads: dict[str, Array] = {}
    dv, dbase = drows, None
    if dora is not None:
        v, norm = dora
        dv = drows * (lora.magnitude / norm)  # y += v m/norm - base: (N, out)
        grads["lora_magnitude_vector"] = (drows * v).sum(axis=0) / norm  # (out,)
        if keep is not None:
            dbase = dv - drows
    through_w = dv if keep is None else drows  # the gradient of x W^T: without dropout that is `base`
    w = dense(weight, x.dtype)
    dx = through_w @ w  # y = x W^T: (N, in)
    through_base = None if dbase is None else dbase @ w  # base = dropout(x) W^T: (N, in)
    del w
    if lora is not None:
        dropped = _drop(rows, keep, lora)
        dz = dv @ lora.B  # y += s z B^T: (N, r)
        dz *= lora.scale
        grads["lora_B.weight"] = dv.T @ (z * lora.scale)  # y += s z B^T: (out, r)
        grads["lora_A.weight"] = dz.T @ dropped  # z = dropout(x) A^T: (r, in)
        ddropped = dz @ lora.A  # z = dropout(x) A^T: (N, in)
        if through_base is not None:
            ddropped += through_base
        dx += _drop(ddropped, keep, lora)
    if train_weight:
        grads["weight"] = through_w.T @ rows  # y = x W^T: (out, in)
        if dbase is not None:
            grads["weight"] += dbase.T @ dropped  # base = dropout(x) W^T
        if bias is not None:
            grads["bias"] = drows.sum(axis=0)
    return dx.reshape(x.shape), grads


def dense(weight: Weight, dtype: np.dtype) -> Array:
    """The weight as an array of `dtype`: itself if it is one, otherwise dequantised or cast for this product only."""
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, dtype)
    return weight.astype(dtype, copy=False)


def row_norms(w: Array, lora: LoRA) -> Array:
    """The lengths (out,) of the rows of W + s B A, which DoRA divides by. (Its paper's columns are those of W^T.)"""
    changed = (lora.scale * lora.B) @ lora.A  # (out, in)
    changed += w
    changed *= changed
    return array_module(w).sqrt(changed.sum(axis=1))


def merge(weight: Weight, lora: LoRA) -> Array:
    """W + s B A, with DoRA its rows scaled to the lengths m: a new array (out, in) of W's dtype, or float32 for a
    quantised W. It is computed in float32 or float64, and rounded once.

        >>> from refqlora.lora import LoRA
        >>> A, B = np.ones((1, 2), np.float32), np.ones((2, 1), np.float32)
        >>> rq.merge(np.eye(2, dtype=np.float32), LoRA(A, B, scale=0.5))
        array([[1.5, 0.5],
               [0.5, 1.5]], dtype=float32)
    """
    if not isinstance(weight, QuantizedTensor):
        check_array("weight", weight, "fV")
    if not isinstance(lora, LoRA) or len(weight.shape) != 2:
        raise ValueError(f"merge: expected a weight (out, in) and its LoRA, got {shown(weight)} and {shown(lora)}")
    check_array("lora.A", lora.A, "fV")
    rank = lora.A.shape[0] if lora.A.ndim else 0
    check_array("lora.A", lora.A, "fV", (rank, weight.shape[1]))
    check_array("lora.B", lora.B, "fV", (weight.shape[0], rank))
    check("lora.scale", lora.scale, number(0, math.inf))
    if lora.magnitude is not None:
        check_array("lora.magnitude", lora.magnitude, "fV", weight.shape[:1])
    dtype = np.dtype(np.float32) if isinstance(weight, QuantizedTensor) else weight.dtype
    w = dense(weight, np.promote_types(dtype, np.float32))
    merged = w + lora.scale * (lora.B @ lora.A)
    if lora.magnitude is not None:
        merged = merged * (lora.magnitude / row_norms(w, lora))[:, None]
    return merged.astype(dtype, copy=False)


def _drop(x: Array, keep: Array | None, lora: LoRA) -> Array:
    """dropout(x), and its backward: the elements outside `keep` are zeroed, the others divided by 1 - dropout."""
    if keep is None:
        return x
    x = x * keep
    x /= 1 - lora.dropout
    return x
