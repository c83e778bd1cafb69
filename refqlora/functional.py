"""Forward and backward of the decoder's operations, side by side (rope.py, attention.py and lora.py have others).

The legend, used in every shape comment of the project:

    B batch     T time (query positions)     S source (key positions, S >= T)     V vocabulary
    D model     H query heads                K key/value heads                    h head size
    F feed-forward                           r rank                               N rows: B*T, or any shape

Each pair reads the same way: `f_forward(inputs) -> (output, cache)` and `f_backward(doutput, cache) -> dinputs`.
`dx` is the gradient of the loss with respect to `x` and has its shape. The cache is explicit: what the backward
needs, and nothing else. A backward's docstring has the forward's lines on the left, the gradients that follow from
them on the right. Everything is computed in the dtype of the inputs, long chains in place (`y *= gate`): a fresh array
costs more than the arithmetic, and what is held at any moment can be read off the lines.
"""

from __future__ import annotations

import math

import numpy as np

from .backend import Array, array_module, pieces
from .checks import check, check_array, number

CHUNK = 2**17  # elements of the logits that cross_entropy handles at once: 512 KiB of float32 stay in the L2 cache
IGNORE = -100  # the label of a position that does not count (the convention of torch and transformers)


# ---- embedding: y[n] = W[token[n]] -----------------------------------------------------------------------------


def embedding_forward(tokens: Array, weight: Array) -> tuple[Array, tuple]:
    """Look up rows. tokens (B, T) integers, weight (V, D) -> y (B, T, D)."""
    return weight[tokens], (tokens, weight.shape)


def embedding_backward(dy: Array, cache: tuple) -> Array:
    """dy (B, T, D) -> dweight (V, D).

    y[n] = W[token[n]]        dW[token[n]] += dy[n], for every n
    """
    tokens, shape = cache
    xp = array_module(dy)
    dweight = xp.zeros(shape, dy.dtype)
    xp.add.at(dweight, tokens.reshape(-1), dy.reshape(-1, shape[1]))  # (N,), (N, D)
    return dweight


# ---- RMSNorm (Zhang and Sennrich 2019, eq. 4): y = x / sqrt(mean(x^2) + eps) * w -------------------------------


def rmsnorm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, tuple]:
    """Scale each row to root mean square 1, then by `weight`. x (..., D), weight (D,) -> y (..., D)."""
    inv = 1 / array_module(x).sqrt(_mean_product(x, x) + eps)  # (..., 1)
    y = x * inv
    y *= weight
    return y, (x, inv, weight)


def rmsnorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """dy (..., D) -> dx (..., D), dweight (D,).

    y = n * w                                       dw = sum of (dy * n)'s rows, dn = dy * w
    n = x * inv, inv = 1 / sqrt(mean(x^2) + eps)    dx = inv * (dn - n * mean(dn * n)), as dinv/dx = -inv^3 x / D
    """
    x, inv, weight = cache
    n = x * inv  # (..., D)
    dweight = _sum_product(dy, n)
    dx = dn = dy * weight  # one array: dx takes the place of dn
    n *= _mean_product(dn, n)  # (..., D) times (..., 1)
    dx -= n
    dx *= inv
    return dx, dweight


def _mean_product(x: Array, y: Array) -> Array:
    """The mean of x * y over each row, (..., D) -> (..., 1): einsum forms no array of the products."""
    return array_module(x).einsum("...d,...d->...", x, y)[..., None] / x.shape[-1]


def _sum_product(x: Array, y: Array) -> Array:
    """The sum of x * y over all rows, (..., D) -> (D,)."""
    return array_module(x).einsum("nd,nd->d", x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))


# ---- LayerNorm (Ba et al. 2016, eq. 3): y = (x - mean(x)) / sqrt(var(x) + eps) * w + b ---------------------------


def layernorm_forward(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, tuple]:
    """Shift each row to mean 0, scale it to variance 1, then by `weight`, and add `bias`.

    x (..., D), weight (D,), bias (D,) -> y (..., D).
    """
    n = x - x.mean(axis=-1, keepdims=True)  # (..., D)
    inv = 1 / array_module(x).sqrt(_mean_product(n, n) + eps)  # (..., 1): the mean of n^2 is the variance
    n *= inv
    y = n * weight
    y += bias
    return y, (n, inv, weight)


def layernorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dy (..., D) -> dx (..., D), dweight (D,), dbias (D,).

    y = n * w + b               dw = sum of (dy * n)'s rows, db = sum of dy's rows, dn = dy * w
    n = (x - mean(x)) * inv     dx = inv * (dn - mean(dn) - n * mean(dn * n)), as mean and inv depend on all of x
    """
    n, inv, weight = cache
    dweight, dbias = _sum_product(dy, n), dy.reshape(-1, weight.size).sum(axis=0)
    dx = dn = dy * weight  # one array: dx takes the place of dn
    mean = _mean_product(dn, n)  # (..., 1)
    dx -= dn.mean(axis=-1, keepdims=True)
    dx -= n * mean
    dx *= inv
    return dx, dweight, dbias


# ---- SwiGLU (Shazeer 2020, eq. 6): y = silu(gate) * up, silu(x) = x * sigmoid(x) --------------------------------


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple]:
    """gate, up (..., F) -> y (..., F)."""
    y = _sigmoid(gate)
    y *= gate
    y *= up
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """dy (..., F) -> dgate, dup (..., F).

    y = silu(gate) * up           dup = dy * silu(gate), dgate = dy * up * silu'(gate)
    silu(x) = x * sigmoid(x)      silu'(x) = sigmoid(x) * (1 + x - silu(x))
    """
    gate, up = cache
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    dup = dy * silu
    dgate = 1 + gate
    dgate -= silu
    dgate *= sigmoid  # silu'(gate)
    dgate *= up
    dgate *= dy
    return dgate, dup


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    xp = array_module(x)
    y = -x
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the sigmoid is 0
        xp.exp(y, out=y)
    y += 1
    return xp.reciprocal(y, out=y)


# ---- GELU (Hendrycks and Gimpel 2016), by its tanh approximation: y = x (1 + tanh(u)) / 2 -----------------------
# u = sqrt(2/pi) (x + 0.044715 x^3). transformers calls it gelu_new or gelu_pytorch_tanh.

_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    """x (..., F) -> y (..., F)."""
    y = _gelu_share(x)
    y *= x
    return y, (x,)


def gelu_backward(dy: Array, cache: tuple) -> Array:
    """dy (..., F) -> dx (..., F).

    y = x s, s = (1 + tanh(u)) / 2        dx = dy * (s + x ds/dx), ds/dx = 2 s (1 - s) du/dx
    """
    (x,) = cache
    dx = _gelu_slope(x, _gelu_share(x))
    dx *= dy
    return dx


# ---- GeGLU (Shazeer 2020, eq. 6): y = gelu(gate) * up -----------------------------------------------------------


def geglu_forward(gate: Array, up: Array) -> tuple[Array, tuple]:
    """gate, up (..., F) -> y (..., F)."""
    y = _gelu_share(gate)
    y *= gate
    y *= up
    return y, (gate, up)


def geglu_backward(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """dy (..., F) -> dgate, dup (..., F).

    y = gelu(gate) * up        dup = dy * gelu(gate), dgate = dy * up * gelu'(gate)
    """
    gate, up = cache
    share = _gelu_share(gate)
    dgate = _gelu_slope(gate, share)
    dgate *= up
    dgate *= dy
    dup = share
    dup *= gate  # gelu(gate)
    dup *= dy
    return dgate, dup


def _gelu_share(x: Array) -> Array:
    """s = (1 + tanh(u)) / 2, the share of x that gelu lets through. x (..., F) -> s (..., F)."""
    xp = array_module(x)
    u = x * x
    u *= _GELU_CUBIC
    u += 1
    u *= x
    u *= _GELU_SCALE
    s = xp.tanh(u, out=u)
    s += 1
    s *= 0.5
    return s


def _gelu_slope(x: Array, s: Array) -> Array:
    """gelu'(x) = s + x 2 s (1 - s) du/dx, with du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2)."""
    slope = x * x
    slope *= 3 * _GELU_CUBIC
    slope += 1
    slope *= x
    slope *= 2 * _GELU_SCALE
    slope *= s
    slope *= 1 - s
    slope += s
    return slope


# ---- softcap (Gemma 2, Riviere et al. 2024, section 2): y = cap * tanh(x / cap) ----------------------------------


def softcap_forward(x: Array, cap: float) -> tuple[Array, tuple]:
    """Squeeze x, of any shape, smoothly between -cap and cap -> y of the same shape."""
    t = x / cap
    array_module(x).tanh(t, out=t)
    return t * cap, (t,)


def softcap_backward(dy: Array, cache: tuple) -> Array:
    """dy -> dx, both of the shape of x.

    y = cap * t, t = tanh(x / cap)        dx = dy * (1 - t^2)
    """
    (t,) = cache
    dx = t * t
    array_module(t).subtract(1, dx, out=dx)
    dx *= dy
    return dx


# ---- cross entropy: the mean over the counted positions of -log softmax(logits)[label] -------------------------


def cross_entropy(logits: Array, labels: Array, denominator: float | None = None) -> tuple[float, Array]:
    """The mean cross entropy and its gradient, computed together.

    logits (..., V); labels (...) integers: the token that each position must predict, or -100 for a position that
    does not count (labels are *not* shifted here) -> loss (float), dlogits (..., V). For one row:

        p = exp(logits - logsumexp(logits))     (V,)
        loss = -log(p[label])
        dlogits = p - onehot(label)             (V,), zeros for -100

    The sum over rows is divided by `denominator`, by default the number of labels that count, as in torch. To
    accumulate over micro-batches, pass the count of *all* of them: losses and gradients then simply add up. (Dividing
    each by its own count is the classic mistake.)

        >>> loss, dlogits = rq.cross_entropy(np.zeros((1, 3, 8), np.float32), np.array([[5, 2, -100]]))
        >>> round(loss, 4), dlogits.shape, dlogits[0, :, 2].tolist()
        (2.0794, (1, 3, 8), [0.0625, -0.4375, 0.0])

    Raises ValueError for labels of another shape or dtype, or outside the vocabulary, and if no label counts.
    """
    xp = array_module(logits)
    labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
    check_array("logits", logits, "f")
    if logits.ndim == 0:
        raise ValueError("logits: expected shape (..., V), got ()")
    if denominator is not None:
        check("denominator", denominator, number(0, 1e300))
    counted = _check_labels(logits, labels)
    vocabulary = logits.shape[-1]
    if denominator is None:
        denominator = int(counted.sum())
    if not denominator > 0:
        raise ValueError("labels: no label counts, as all are -100: there is nothing to learn from")

    dlogits = xp.zeros(logits.shape, logits.dtype)  # contiguous, so that dflat is a view of it
    flat, dflat = logits.reshape(-1, vocabulary), dlogits.reshape(-1, vocabulary)  # (N, V)
    rows = xp.flatnonzero(counted)  # those that count
    loss = 0.0
    step = max(1, CHUNK // vocabulary)  # rows at a time
    for start, stop in pieces(rows.size, step, xp):
        row = rows[start:stop]  # (n,)
        label = labels.reshape(-1)[row]  # (n,)
        i = xp.arange(row.size)
        z = flat[row]  # (n, V)
        z -= z.max(axis=-1, keepdims=True)
        z_label = z[i, label]
        p = xp.exp(z, out=z)
        total = p.sum(axis=-1, keepdims=True)  # (n, 1): logsumexp is log(total) + the row's maximum
        loss += float((xp.log(total[:, 0]) - z_label).sum(dtype=xp.float64))
        p /= total * denominator
        p[i, label] -= 1 / denominator
        dflat[row] = p
    return loss / denominator, dlogits


def _check_labels(logits: Array, labels: Array) -> Array:
    """Which labels count, (...) bool. Raises ValueError as `cross_entropy` says."""
    vocabulary = logits.shape[-1]
    if labels.dtype.kind not in "iu" or labels.shape != logits.shape[:-1]:
        found = f"got {labels.dtype} of shape {labels.shape}"
        raise ValueError(f"labels: expected integers of shape {logits.shape[:-1]}, as the logits have, {found}")
    counted = labels != IGNORE
    bad = counted & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        at = tuple(int(i[0]) for i in array_module(logits).nonzero(bad))
        raise ValueError(f"labels: expected -100 or a token below {vocabulary}, got {int(labels[at])} at {at}")
    return counted
