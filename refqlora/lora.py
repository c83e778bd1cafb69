"""The linear layer with a low-rank adapter: y = x W^T + s (x A^T) B^T, W frozen or trained, dense or quantised.

LoRA (Hu et al. 2021, section 4.1): W (out, in) stays as it is; A (r, in) and B (out, r) learn the change s B A.
A quantised W (QLoRA, Dettmers et al. 2023, eq. 5) is dequantised for each product and let go.
DoRA (Liu et al. 2024, eq. 5): the rows of W + s B A are brought to the lengths m (out,), which are learnt too.
Names and orientation are PEFT's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .backend import Array, array_module
from .quantize import QuantizedTensor, dequantize, quantize

Weight = Array | QuantizedTensor  # (out, in)


class LoRA(NamedTuple):
    """One linear's adapter, as its forward takes it: A (r, in), B (out, r), the scale s, the dropout's rate; and for
    DoRA the magnitude m (out,)."""

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

    Dropout is on when `rng` is given: each element of the adapter's input is zeroed with probability
    `lora.dropout` and the rest divided by 1 - dropout; the mask is kept for the backward.

    DoRA: v = x W^T + s (x A^T) B^T, and y = v m/norm + bias, where norm (out,) holds the lengths of the rows of
    W + s B A. Under dropout PEFT's way: v is made from dropout(x), and y = x W^T - dropout(x) W^T + v m/norm + bias.
    """
    xp = array_module(x)
    rows = x.reshape(-1, x.shape[-1])  # (N, in): one matrix product, not B of them
    w = dense(weight, x.dtype)
    y = rows @ w.T  # (N, out)
    keep = z = dora = None
    if lora is not None:
        if rng is not None and lora.dropout > 0:
            keep = xp.asarray(rng.random(rows.shape, np.float32) >= lora.dropout)
        dropped = _drop(rows, keep, lora)
        if lora.magnitude is not None:
            norm = row_norms(w, lora)  # (out,)
            base = y if keep is None else dropped @ w.T  # (N, out)
        del w  # a dequantised one is not needed any longer
        z = dropped @ lora.A.T  # (N, r)
        change = (z * lora.scale) @ lora.B.T  # (N, out)
        if lora.magnitude is None:
            y += change
        else:
            v = base + change
            y += v * (lora.magnitude / norm) - base
            dora = v, norm
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias, lora, keep, z, dora)


def linear_backward(dy: Array, cache: tuple, train_weight: bool = False) -> tuple[Array, dict[str, Array]]:
    """dy (..., out) -> dx (..., in), grads.

    grads holds "lora_A.weight" (r, in) and "lora_B.weight" (out, r) where there is an adapter, and with DoRA
    "lora_magnitude_vector" (out,); "weight" (out, in) and "bias" (out,) only with `train_weight`: for a frozen W
    neither is ever formed.

        y = x W^T + bias             so  dx = dy W,  dW = dy^T x,  dbias = sum of dy's rows
        z = x A^T, y += s z B^T      so  dB = s dy^T z,  dz = s dy B,  dA = dz^T x,  dx += dz A
        y += v m/norm - base         so  dm = sum of (dy v)'s rows / norm,  dv = dy m/norm,  dbase = dv - dy

    The norm counts as a constant, as DoRA's paper proposes (section 4.3) and PEFT does.
    """
    x, weight, bias, lora, keep, z, dora = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (N, in), (N, out)
    grads = {}
    dv = dbase = None
    if dora is not None:
        v, norm = dora
        dv = drows * (lora.magnitude / norm)  # (N, out)
        grads["lora_magnitude_vector"] = (drows * v).sum(axis=0) / norm
        if keep is not None:
            dbase = dv - drows
    through_w = drows if dora is None or keep is not None else dv  # without dropout `base` is x W^T itself
    w = dense(weight, x.dtype)
    dx = through_w @ w  # (N, in)
    ddropped = 0 if dbase is None else dbase @ w  # (N, in)
    del w
    if lora is not None:
        dropped = _drop(rows, keep, lora)
        dv = drows if dora is None else dv
        dz = (dv @ lora.B) * lora.scale  # (N, r)
        grads["lora_A.weight"] = dz.T @ dropped
        grads["lora_B.weight"] = dv.T @ (z * lora.scale)
        dx += _drop(ddropped + dz @ lora.A, keep, lora)
    if train_weight:
        grads["weight"] = through_w.T @ rows
        if dbase is not None:
            grads["weight"] += dbase.T @ dropped
        if bias is not None:
            grads["bias"] = drows.sum(axis=0)
    return dx.reshape(x.shape), grads


def dense(weight: Weight, dtype: np.dtype) -> Array:
    """The weight as an array of `dtype`: itself if it is one, otherwise dequantised or cast for this product only."""
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, dtype)
    return weight.astype(dtype, copy=False)


def row_norms(w: Array, lora: LoRA) -> Array:
    """The lengths (out,) of the rows of W + s B A: what DoRA divides by (its norm "of each column" is of W^T)."""
    changed = w + (lora.scale * lora.B) @ lora.A  # (out, in)
    changed *= changed
    return array_module(w).sqrt(changed.sum(axis=1))


def merge(weight: Weight, lora: LoRA) -> Array:
    """W + s B A, with DoRA its rows brought to the lengths m, as a new array (out, in) of W's dtype (float32 for a
    quantised W, from its dequantised values). Rounded once, to a 16-bit dtype too."""
    dtype = np.dtype(np.float32) if isinstance(weight, QuantizedTensor) else weight.dtype
    w = dense(weight, np.promote_types(dtype, np.float32))
    merged = w + lora.scale * (lora.B @ lora.A)
    if lora.magnitude is not None:
        merged = merged * (lora.magnitude / row_norms(w, lora))[:, None]
    return merged.astype(dtype, copy=False)


def _drop(x: Array, keep: Array | None, lora: LoRA) -> Array:
    return x if keep is None else x * keep / (1 - lora.dropout)


# ---- how an adapter starts -------------------------------------------------------------------------------------
# PiSSA and OLoRA put the largest part of W into B A; the adapter then sits on what is left, the residual W - s B A.


def init_lora(
    weight: Weight,
    rank: int,
    rng: np.random.Generator,
    dtype: np.dtype,
    init: str = "default",
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) of a new adapter on `weight` (out, in), as PEFT makes them.

    default          A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt(5)), B zero
    gaussian         A normal with std 1/r, B zero (the LoRA paper's)
    pissa            W = U S V^T, of which the top r: B = U sqrt(S/s), A = sqrt(S/s) V^T (Meng et al. 2024, eq. 2-4)
    pissa_niter_N    the same from a randomised decomposition with N power iterations (Halko et al. 2011, alg. 4.4)
    olora            W = Q R: B the first r columns of Q, A the first r rows of R (Buyukakyuz 2024)

    Raises ValueError for a start from the weight whose rank is larger than the weight's, and for PiSSA on a quantised
    weight: it is the dense weight that is to be taken apart.
    """
    out_features, in_features = weight.shape
    xp = array_module(weight.packed if isinstance(weight, QuantizedTensor) else weight)
    if init in ("default", "gaussian"):
        bound = in_features**-0.5
        shape = (rank, in_features)
        a = rng.uniform(-bound, bound, shape) if init == "default" else rng.standard_normal(shape) / rank
        return xp.asarray(a.astype(dtype)), xp.zeros((out_features, rank), dtype)

    if rank > min(weight.shape):
        raise ValueError(f"{init} takes rank {min(weight.shape)} at most from a weight of shape {weight.shape}")
    if init == "olora":
        q, r = xp.linalg.qr(dense(weight, dtype))  # (out, k), (k, in)
        return xp.ascontiguousarray(r[:rank]), xp.ascontiguousarray(q[:, :rank])
    if isinstance(weight, QuantizedTensor):
        raise ValueError(
            f"{init} takes the dense weight apart, and it is quantised already: "
            "load the model dense, add the adapter, then quantize()"
        )
    if init == "pissa":
        u, s, vt = xp.linalg.svd(dense(weight, dtype), full_matrices=False)
    else:
        u, s, vt = _randomised_svd(dense(weight, dtype), rank, int(init.removeprefix("pissa_niter_")), rng)
    root = xp.sqrt(s[:rank] / dtype.type(scale))  # (r,)
    return xp.ascontiguousarray(root[:, None] * vt[:rank]), xp.ascontiguousarray(u[:, :rank] * root)


def residual(weight: Weight, a: Array, b: Array, scale: float) -> Weight:
    """W - s B A in W's dtype; of a quantised W what it dequantises to less s B A, quantised again in the same way
    (as PEFT does for OLoRA)."""
    rest = dense(weight, a.dtype) - (scale * b) @ a  # (out, in)
    return requantize(rest, weight) if isinstance(weight, QuantizedTensor) else rest.astype(weight.dtype)


def requantize(w: Array, like: QuantizedTensor) -> QuantizedTensor:
    """w quantised with the codebook, block size and double quantisation of `like`."""
    return quantize(w, like.codebook, like.block_size, like.nested_absmax is not None)


def _randomised_svd(w: Array, rank: int, iterations: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """U (out, r), S (r,), V^T (r, in): the SVD of w on a subspace that power iterations turn towards its largest r."""
    xp = array_module(w)
    if len(w) < w.shape[1]:
        u, s, vt = _randomised_svd(w.T, rank, iterations, rng)
        return vt.T, s, u.T
    q, _ = xp.linalg.qr(w @ xp.asarray(rng.standard_normal((w.shape[1], rank)).astype(w.dtype)))  # (out, r)
    for _ in range(iterations):
        q, _ = xp.linalg.qr(w.T @ q)  # (in, r)
        q, _ = xp.linalg.qr(w @ q)  # (out, r)
    u, s, vt = xp.linalg.svd(q.T @ w, full_matrices=False)  # (r, r), (r,), (r, in)
    return q @ u, s, vt
