"""Forward and backward of every operation of the decoder, side by side.

The legend, used in every shape comment of the project:

    B batch     T time (query positions)     S source (key positions, S >= T)     V vocabulary
    D model     H query heads                K key/value heads                    h head size
    F feed-forward                           r rank                               N rows: B*T, or any shape

Each pair reads the same way: `f_forward(inputs) -> (output, cache)` and `f_backward(doutput, cache) -> dinputs`.
`dx` is the gradient of the loss with respect to `x` and has its shape. The cache is explicit: what the backward
needs, and nothing else. Everything is computed in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .backend import Array, array_module

IGNORE = -100  # the label of a position that does not count (the convention of torch and transformers)


# ---- embedding: y[n] = W[token[n]] -----------------------------------------------------------------------------


def embedding_forward(tokens: Array, weight: Array) -> tuple[Array, tuple]:
    """Look up rows. tokens (B, T) integers, weight (V, D) -> y (B, T, D)."""
    return weight[tokens], (tokens, weight.shape)


def embedding_backward(dy: Array, cache: tuple) -> Array:
    """dy (B, T, D) -> dweight (V, D): a row of W gathers the gradient of every place it was copied to."""
    tokens, shape = cache
    xp = array_module(dy)
    dweight = xp.zeros(shape, dy.dtype)
    xp.add.at(dweight, tokens.reshape(-1), dy.reshape(-1, shape[1]))
    return dweight


# ---- RMSNorm (Zhang and Sennrich 2019, eq. 4): y = x / sqrt(mean(x^2) + eps) * w -------------------------------


def rmsnorm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, tuple]:
    """Scale each row to root mean square 1, then by `weight`. x (..., D), weight (D,) -> y (..., D)."""
    xp = array_module(x)
    mean_square = xp.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]  # (..., 1)
    inv = 1 / xp.sqrt(mean_square + eps)
    return x * inv * weight, (x, inv, weight)


def rmsnorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """dy (..., D) -> dx (..., D), dweight (D,).

    With n = x * inv and g = dy * w: y = n * w gives dw = sum(dy * n); and as d inv / dx = -inv^3 x / D,
    dx = inv * (g - n * mean(g * n)).
    """
    x, inv, weight = cache
    xp = array_module(dy)
    n = x * inv
    dweight = xp.einsum("nd,nd->d", dy.reshape(-1, weight.size), n.reshape(-1, weight.size))
    g = dy * weight
    mean_gn = xp.einsum("...d,...d->...", g, n)[..., None] / x.shape[-1]  # (..., 1)
    n *= mean_gn
    g -= n
    g *= inv
    return g, dweight


# ---- RoPE (Su et al. 2021, section 3.4), the halves paired as in transformers' Llama ---------------------------


def rope_tables(positions: Array, frequencies: Array, dtype: type) -> tuple[Array, Array]:
    """cos and sin of position * frequency. positions (T,), frequencies (h/2,) float64 -> two tables (T, h/2).

    The angle is a float32 product, as in transformers: at position 100,000 its rounding shows in the logits.
    A float64 model takes float64 angles.
    """
    xp = array_module(positions)
    angle_dtype = xp.float64 if dtype == xp.float64 else xp.float32
    angles = positions.astype(angle_dtype)[:, None] * xp.asarray(frequencies, angle_dtype)  # (T, h/2)
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pair (x[i], x[i + h/2]) by its position's angle. x (B, T, H, h), cos, sin (T, h/2) -> (B, T, H, h)."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, h/2): the same for every head
    x1, x2 = x[..., :half], x[..., half:]
    y = array_module(x).empty_like(x)
    y[..., :half] = x1 * cos - x2 * sin
    y[..., half:] = x2 * cos + x1 * sin
    return y


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """dy (B, T, H, h) -> dx: a rotation's transpose is the rotation by the negative angle."""
    return rope_forward(dy, cos, -sin)


# ---- causal attention with grouped heads: softmax(q k^T / sqrt(h)) v -------------------------------------------

TILE = 128  # query positions handled at once: the scores of a tile stay in the cache, and keys after it are skipped


def attention_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    """Causal attention (Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023).

    q (B, T, H, h); k, v (B, S, K, h) with H a multiple of K -> y (B, T, H, h). Query t stands at position S - T + t
    and sees the keys up to it. The definition, for one batch element and one head, is three lines:

        scores = q @ k.T / sqrt(h)                      # (T, S), -inf above the diagonal
        p = exp(scores - logsumexp(scores))             # rows sum to 1
        y = p @ v                                       # (T, h)

    Of p, only each row's logsumexp is kept; the backward makes p again from it (Dao et al. 2022, algorithm 4), so
    that what is stored grows with T and not with T^2.
    """
    xp = array_module(q)
    y = xp.empty_like(q)
    logsumexp = []
    for b, rows, cols in _tiles(q.shape, k.shape):
        qt, kt, vt = _fold(q[b, rows], k.shape[2]), k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)
        scores = _masked_scores(qt, kt, rows.stop - rows.start)  # (K, G*t, s)
        top = scores.max(axis=-1, keepdims=True)
        scores -= top
        p = xp.exp(scores, out=scores)
        total = p.sum(axis=-1, keepdims=True)
        y[b, rows] = _unfold(p @ vt / total, rows.stop - rows.start)
        logsumexp.append(top + xp.log(total))
    return y, (q, k, v, y, logsumexp)


def attention_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dy (B, T, H, h) -> dq (B, T, H, h), dk (B, S, K, h), dv (B, S, K, h).

    With P the weights: dV = P^T dY; dP = dY V^T; softmax gives dS = P * (dP - rowsum(dP * P)), where the row sum
    equals rowsum(dY * Y); then dQ = dS K / sqrt(h) and dK = dS^T Q / sqrt(h). Heads of a group add up in dK and dV.
    """
    q, k, v, y, logsumexp = cache
    xp = array_module(dy)
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    groups = k.shape[2]
    for (b, rows, cols), lse in zip(_tiles(q.shape, k.shape), logsumexp, strict=True):
        t = rows.stop - rows.start
        qt, kt, vt = _fold(q[b, rows], groups), k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)
        dyt, yt = _fold(dy[b, rows], groups), _fold(y[b, rows], groups)  # (K, G*t, h)
        p = _masked_scores(qt, kt, t)
        p -= lse
        xp.exp(p, out=p)  # (K, G*t, s)
        dv[b, cols] += (p.swapaxes(1, 2) @ dyt).swapaxes(0, 1)
        ds = dyt @ vt.swapaxes(1, 2)
        ds -= (dyt * yt).sum(axis=-1, keepdims=True)
        ds *= p
        ds *= q.shape[-1] ** -0.5
        dq[b, rows] = _unfold(ds @ kt, t)
        dk[b, cols] += (ds.swapaxes(1, 2) @ qt).swapaxes(0, 1)
    return dq, dk, dv


def _tiles(q_shape: tuple, k_shape: tuple) -> Iterator[tuple[int, slice, slice]]:
    """(batch element, its query rows, the keys that those rows can see), tile after tile."""
    batch, time, source = q_shape[0], q_shape[1], k_shape[1]
    for b in range(batch):
        for start in range(0, time, TILE):
            stop = min(start + TILE, time)
            yield b, slice(start, stop), slice(0, source - time + stop)


def _fold(x: Array, groups: int) -> Array:
    """(t, H, h) -> (K, G*t, h): the G = H/K query heads that share a key head become rows of one matrix."""
    t, heads, size = x.shape
    return x.reshape(t, groups, heads // groups, size).transpose(1, 2, 0, 3).reshape(groups, -1, size)


def _unfold(x: Array, t: int) -> Array:
    """(K, G*t, h) -> (t, H, h)."""
    groups, _, size = x.shape
    return x.reshape(groups, -1, t, size).transpose(2, 0, 1, 3).reshape(t, -1, size)


def _masked_scores(q: Array, k: Array, t: int) -> Array:
    """q (K, G*t, h), k (K, s, h) -> scores (K, G*t, s), -inf where the key comes after the query."""
    xp = array_module(q)
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(1, 2)
    diagonal = scores.reshape(k.shape[0], -1, t, k.shape[1])[..., -t:]  # only the last t keys can come too late
    diagonal += xp.triu(xp.full((t, t), -xp.inf, q.dtype), 1)
    return scores


# ---- SwiGLU (Shazeer 2020, eq. 6): y = silu(gate) * up, silu(x) = x * sigmoid(x) --------------------------------


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple]:
    """gate, up (..., F) -> y (..., F)."""
    y = _sigmoid(gate)
    y *= gate
    y *= up
    return y, (gate, up)


def swiglu_backward(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """dy (..., F) -> dgate, dup (..., F): silu'(x) = sigmoid(x) * (1 + x * (1 - sigmoid(x)))."""
    gate, up = cache
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    dup = dy * silu
    dgate = 1 + gate
    dgate -= silu
    dgate *= sigmoid
    dgate *= up
    dgate *= dy
    return dgate, dup


def _sigmoid(x: Array) -> Array:
    xp = array_module(x)
    y = -x
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the sigmoid is 0
        xp.exp(y, out=y)
    y += 1
    return xp.reciprocal(y, out=y)


# ---- cross entropy: the mean over the counted positions of -log softmax(logits)[label] -------------------------


def cross_entropy(logits: Array, labels: Array, denominator: float | None = None) -> tuple[float, Array]:
    """The loss and its gradient in one go.

    logits (..., V); labels (...) integers: the token that each position must predict, -100 where none counts
    (labels are *not* shifted here) -> loss (float), dlogits (..., V). The definition, a row at a time:

        p = exp(logits - logsumexp(logits));  loss = -log(p[label]);  dlogits = p - onehot(label)

    The sum is divided by `denominator`, by default the number of labels that count, as torch does. For
    accumulation, pass the count over *all* micro-batches: then losses and gradients simply add up, whatever the
    share of each (dividing each by its own count is the classic mistake).

    Raises ValueError for shapes that do not match, a label outside the vocabulary, or no label that counts.
    """
    xp = array_module(logits)
    vocabulary = logits.shape[-1]
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels have shape {labels.shape}, logits {logits.shape}: expected {logits.shape[:-1]}")
    counted = labels != IGNORE
    bad = counted & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        at = tuple(int(i[0]) for i in xp.nonzero(bad))
        raise ValueError(f"label {int(labels[at])} at {at} is neither -100 nor a token below {vocabulary}")
    if denominator is None:
        denominator = int(counted.sum())
    if not denominator > 0:
        raise ValueError("no label counts: every one is -100, so there is nothing to learn from")

    dlogits = xp.zeros(logits.shape, logits.dtype)  # contiguous, so that dflat is a view of it
    flat, dflat = logits.reshape(-1, vocabulary), dlogits.reshape(-1, vocabulary)
    rows = xp.flatnonzero(counted)
    loss = 0.0
    step = max(1, 2**17 // vocabulary)  # rows at a time, to stay in the cache
    for start in range(0, rows.size, step):
        row = rows[start : start + step]
        label = labels.reshape(-1)[row]
        i = xp.arange(row.size)
        z = flat[row]  # (n, V)
        z -= z.max(axis=-1, keepdims=True)
        z_label = z[i, label]
        p = xp.exp(z, out=z)
        total = p.sum(axis=-1, keepdims=True)
        loss += float((xp.log(total[:, 0]) - z_label).sum(dtype=xp.float64))
        p /= total * denominator
        p[i, label] -= 1 / denominator
        dflat[row] = p
    return loss / denominator, dlogits
