"""Causal attention with grouped heads, forward and backward, in tiles of queries: softmax(q k^T * scale) v."""

from __future__ import annotations

from collections.abc import Iterator

from .backend import Array, array_module
from .functional import softcap_backward, softcap_forward

TILE = 128  # query positions at a time: their scores stay in the cache, and keys that none of them sees are skipped


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
    and sees the keys up to there: all of them, or only the last `window` (Beltagy et al. 2020, section 3.1). The
    definition, for one batch element and one head:

        scores = q @ k.T * scale                        # (T, S); scale is 1 / sqrt(h) unless given
        scores = softcap * tanh(scores / softcap)       # with softcap only
        scores[not seen] = -inf                         # key > query, or key <= query - window
        p = exp(scores - logsumexp(scores))             # rows sum to 1
        y = p @ v                                       # (T, h)

    It is computed for one batch element and a tile of t queries at a time. The G = H/K query heads that share a key
    head are rows of one matrix, so products are (K, G*t, ...); s is the number of keys that the tile sees. Of p only
    the logsumexp of each row is kept, from which the backward computes p again (Dao et al. 2022, algorithm 4): memory
    grows with T and not with T^2.
    """
    xp = array_module(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y = xp.empty_like(q)
    logsumexp = []
    for b, rows, cols in _tiles(q.shape, k.shape, window):
        t = rows.stop - rows.start
        qt = _fold(q[b, rows], k.shape[2])  # (K, G*t, h)
        kt, vt = k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)  # (K, s, h)
        scores = (qt * scale) @ kt.swapaxes(1, 2)  # (K, G*t, s)
        if softcap is not None:
            scores, _ = softcap_forward(scores, softcap)
        _mask(scores, t, window)
        top = scores.max(axis=-1, keepdims=True)  # (K, G*t, 1): exp(scores - top) cannot overflow
        scores -= top
        p = xp.exp(scores, out=scores)
        total = p.sum(axis=-1, keepdims=True)  # (K, G*t, 1)
        out = p @ vt  # (K, G*t, h)
        out /= total
        y[b, rows] = _unfold(out, t)  # (t, H, h)
        logsumexp.append(top + xp.log(total))
    return y, (q, k, v, y, logsumexp, scale, window, softcap)


def attention_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dy (B, T, H, h) -> dq (B, T, H, h), dk, dv (B, S, K, h): a tile at a time, the forward's lines in reverse.

        y = p @ v                   dv = p^T dy, dp = dy v^T
        p = softmax(scores)         dscores = p * (dp - rowsum(dp * p)), and that row sum equals rowsum(dy * y)
        softcap * tanh(scores/...)  dscores *= 1 - tanh(scores / softcap)^2
        scores = q @ k^T * scale    dq = dscores k * scale, dk = dscores^T q * scale

    The query heads of a group add up in dk and dv.
    """
    q, k, v, y, logsumexp, scale, window, softcap = cache
    xp = array_module(dy)
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    groups = k.shape[2]
    for (b, rows, cols), lse in zip(_tiles(q.shape, k.shape, window), logsumexp, strict=True):
        t = rows.stop - rows.start
        qt = _fold(q[b, rows], groups)  # (K, G*t, h)
        kt, vt = k[b, cols].swapaxes(0, 1), v[b, cols].swapaxes(0, 1)  # (K, s, h)
        dyt, yt = _fold(dy[b, rows], groups), _fold(y[b, rows], groups)  # (K, G*t, h)
        p = (qt * scale) @ kt.swapaxes(1, 2)  # (K, G*t, s)
        if softcap is not None:
            p, cap = softcap_forward(p, softcap)
        _mask(p, t, window)
        p -= lse
        xp.exp(p, out=p)  # p again, as in the forward
        dv[b, cols] += (p.swapaxes(1, 2) @ dyt).swapaxes(0, 1)  # y = p @ v: (s, K, h)
        dscores = dyt @ vt.swapaxes(1, 2)  # y = p @ v: (K, G*t, s), dp so far
        dscores -= (dyt * yt).sum(axis=-1, keepdims=True)  # p = softmax(scores)
        dscores *= p
        if softcap is not None:
            dscores = softcap_backward(dscores, cap)  # scores = softcap * tanh(scores / softcap)
        dscores *= scale
        dq[b, rows] = _unfold(dscores @ kt, t)  # scores = q @ k^T * scale: (t, H, h)
        dk[b, cols] += (dscores.swapaxes(1, 2) @ qt).swapaxes(0, 1)  # scores = q @ k^T * scale: (s, K, h)
    return dq, dk, dv


def _tiles(q_shape: tuple, k_shape: tuple, window: int | None) -> Iterator[tuple[int, slice, slice]]:
    """For each tile: the batch element, the query positions, and the keys that any of those sees."""
    batch, time, source = q_shape[0], q_shape[1], k_shape[1]
    for b in range(batch):
        for start in range(0, time, TILE):
            stop = min(start + TILE, time)
            first = 0 if window is None else max(0, source - time + start - window + 1)
            yield b, slice(start, stop), slice(first, source - time + stop)


def _fold(x: Array, groups: int) -> Array:
    """(t, H, h) -> (K, G*t, h), as (t, K, G, h) -> (K, G, t, h)."""
    t, heads, size = x.shape
    return x.reshape(t, groups, heads // groups, size).transpose(1, 2, 0, 3).reshape(groups, -1, size)


def _unfold(x: Array, t: int) -> Array:
    """(K, G*t, h) -> (t, H, h), as (K, G, t, h) -> (t, K, G, h)."""
    groups, _, size = x.shape
    return x.reshape(groups, -1, t, size).transpose(2, 0, 1, 3).reshape(t, -1, size)


def _mask(scores: Array, t: int, window: int | None) -> None:
    """Set scores (K, G*t, s) to -inf, in place, where a query does not see a key. The last key is at the last query's
    position, so query i is at key s - t + i: only the last t keys can be too late, the first s - window too early.
    """
    xp = array_module(scores)
    s = scores.shape[-1]
    scores = scores.reshape(scores.shape[0], -1, t, s)  # (K, G, t, s), a view
    scores[..., s - t :] += xp.triu(xp.full((t, t), -xp.inf, scores.dtype), 1)
    if window is not None and s > window:
        scores[..., : s - window] += xp.tril(xp.full((t, s - window), -xp.inf, scores.dtype), s - t - window)
