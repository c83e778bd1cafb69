"""Causal attention with grouped heads, forward and backward, in tiles of queries: softmax(q k^T * scale) v."""

from __future__ import annotations

from collections.abc import Iterator

from .backend import Array, array_module
from .functional import softcap_backward, softcap_forward

TILE = 128  # query positions handled at once: the scores of a tile stay in the cache, and keys after it are skipped


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Array, tuple]:
    """Causal attention (Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023).

    q (B, T, H, h); k, v (B, S, K, h) with H a multiple of K -> y (B, T, H, h). Query t stands at position S - T + t
    and sees the keys up to it: all, or with `window` the last so many (Beltagy et al. 2020, section 3.1). The
    definition, for one batch element and one head, is a few lines:

        scores = q @ k.T * scale                        # (T, S); scale is 1 / sqrt(h) unless given
        scores = softcap * tanh(scores / softcap)       # if there is one
        scores[not seen] = -inf                         # key > query, or key <= query - window
        p = exp(scores - logsumexp(scores))             # rows sum to 1
        y = p @ v                                       # (T, h)

    Of p only the logsumexp of each row is kept, from which the backward computes p again (Dao et al. 2022,
    algorithm 4): what is stored grows with T and not with T^2.
    """
    xp = array_module(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y = xp.empty_like(q)
    logsumexp = []
    for b, rows, cols in _tiles(q.shape, k.shape, window):
        t = rows.stop - rows.start
        qt, kt, vt = _fold(q[b, rows], k.shape[2]), k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)
        scores = (qt * scale) @ kt.swapaxes(1, 2)  # (K, G*t, s)
        if softcap is not None:
            scores, _ = softcap_forward(scores, softcap)
        _mask(scores, t, window)
        top = scores.max(axis=-1, keepdims=True)
        scores -= top
        p = xp.exp(scores, out=scores)
        total = p.sum(axis=-1, keepdims=True)
        y[b, rows] = _unfold(p @ vt / total, t)
        logsumexp.append(top + xp.log(total))
    return y, (q, k, v, y, logsumexp, scale, window, softcap)


def attention_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dy (B, T, H, h) -> dq (B, T, H, h), dk (B, S, K, h), dv (B, S, K, h). A tile at a time, and from the last line
    of the forward to the first:

        y = p @ v                   dv = p^T dy, dp = dy v^T
        p = softmax(scores)         dscores = p * (dp - rowsum(dp * p)), and that row sum equals rowsum(dy * y)
        softcap                     dscores *= 1 - tanh(...)^2
        scores = q @ k^T * scale    dq = dscores k * scale, dk = dscores^T q * scale

    The query heads of a group add up in dk and dv.
    """
    q, k, v, y, logsumexp, scale, window, softcap = cache
    xp = array_module(dy)
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    groups = k.shape[2]
    for (b, rows, cols), lse in zip(_tiles(q.shape, k.shape, window), logsumexp, strict=True):
        t = rows.stop - rows.start
        qt, kt, vt = _fold(q[b, rows], groups), k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)
        dyt, yt = _fold(dy[b, rows], groups), _fold(y[b, rows], groups)  # (K, G*t, h)
        p = (qt * scale) @ kt.swapaxes(1, 2)
        if softcap is not None:
            p, cap = softcap_forward(p, softcap)
        _mask(p, t, window)
        p -= lse
        xp.exp(p, out=p)  # (K, G*t, s): p again, as in the forward
        dv[b, cols] += (p.swapaxes(1, 2) @ dyt).swapaxes(0, 1)  # y = p @ v
        ds = dyt @ vt.swapaxes(1, 2)  # y = p @ v: this is dp
        ds -= (dyt * yt).sum(axis=-1, keepdims=True)  # p = softmax(scores)
        ds *= p
        if softcap is not None:
            ds = softcap_backward(ds, cap)  # scores = softcap * tanh(scores / softcap)
        ds *= scale
        dq[b, rows] = _unfold(ds @ kt, t)  # scores = q @ k^T * scale
        dk[b, cols] += (ds.swapaxes(1, 2) @ qt).swapaxes(0, 1)
    return dq, dk, dv


def _tiles(q_shape: tuple, k_shape: tuple, window: int | None) -> Iterator[tuple[int, slice, slice]]:
    """Tile after tile: the batch element, its query rows, and the keys that any of those rows sees."""
    batch, time, source = q_shape[0], q_shape[1], k_shape[1]
    for b in range(batch):
        for start in range(0, time, TILE):
            stop = min(start + TILE, time)
            first = 0 if window is None else max(0, source - time + start - window + 1)
            yield b, slice(start, stop), slice(first, source - time + stop)


def _fold(x: Array, groups: int) -> Array:
    """(t, H, h) -> (K, G*t, h): the G = H/K query heads that share a key head become rows of one matrix."""
    t, heads, size = x.shape
    return x.reshape(t, groups, heads // groups, size).transpose(1, 2, 0, 3).reshape(groups, -1, size)


def _unfold(x: Array, t: int) -> Array:
    """(K, G*t, h) -> (t, H, h)."""
    groups, _, size = x.shape
    return x.reshape(groups, -1, t, size).transpose(2, 0, 1, 3).reshape(t, -1, size)


def _mask(scores: Array, t: int, window: int | None) -> None:
    """Set scores (K, G*t, s) to -inf, in place, where a query does not see a key. The last key is the last query's."""
    xp = array_module(scores)
    s = scores.shape[-1]
    scores = scores.reshape(scores.shape[0], -1, t, s)  # a view: query i of the tile sees keys up to s - t + i
    scores[..., s - t :] += xp.triu(xp.full((t, t), -xp.inf, scores.dtype), 1)  # only the last t can come too late
    if window is not None and s > window:  # and only the first s - window too early
        scores[..., : s - window] += xp.tril(xp.full((t, s - window), -xp.inf, scores.dtype), s - t - window)
