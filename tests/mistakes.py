"""Mistakes that people make in a backward: a scale or a mask left out, a sum too short, a path forgotten.

Each is planted in the engine while `planted` lasts, and the gradient checks must catch it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from refqlora import attention, decoder, functional, layer, lora, model, rope
from refqlora import lm_head as head


def attention_backward_by_definition(
    dy,
    cache,
    *,
    scale_q=True,
    scale_k=True,
    group_sum=True,
    row_sum=True,
    mask=True,
    blocks=True,
    all_tiles=True,
    wider=0,
    cap_slope=True,
):
    """No tiles, and a copy of k and v for each query head; the switches plant mistakes."""
    q, k, v, scale, window, cap = *cache[:3], *cache[5:]
    (_, t, heads, _), (_, s, groups, _) = q.shape, k.shape
    head = np.arange(heads)
    kv_head = head // (heads // groups) if blocks else head % groups
    ks, vs = k[:, :, kv_head], v[:, :, kv_head]  # (B, S, H, h)
    scores = np.einsum("bthi,bshi->bhts", q, ks) * scale
    slope = 1.0
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
        slope = 1 - (scores / cap) ** 2 if cap_slope else 1.0
    distance = (s - t + np.arange(t))[:, None] - np.arange(s)  # of each key from the query, (T, S)
    scores[..., distance < (0 if mask else -s)] = -np.inf
    if window is not None:
        scores[..., distance >= window + wider] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthi,bshi->bhts", dy, vs)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True) * row_sum) * slope
    dq = np.einsum("bhts,bshi->bthi", ds, ks) * (scale if scale_q else 1)
    start = 0 if all_tiles else (t - 1) // attention.TILE * attention.TILE
    last = slice(start, t)  # the query rows that reach dk and dv
    dk_heads = np.einsum("bhts,bthi->bshi", ds[:, :, last], q[:, last]) * (scale if scale_k else 1)
    dv_heads = np.einsum("bhts,bthi->bshi", p[:, :, last], dy[:, last])
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    for head in range(heads) if group_sum else range(0, heads, heads // groups):
        dk[:, :, kv_head[head]] += dk_heads[:, :, head]
        dv[:, :, kv_head[head]] += dv_heads[:, :, head]
    return dq, dk, dv


def attention_mistake(**switches):
    return lambda right: functools.partial(attention_backward_by_definition, **switches)


def wrong_gradient(index, change):
    """One of the gradients that a backward returns is changed: change(gradient, dy, cache)."""

    def plant(right):
        def backward(dy, cache):
            grads = list(right(dy, cache))
            grads[index] = change(grads[index], dy, cache)
            return tuple(grads)

        return backward

    return plant


def wrong_linear(change):
    """change(right, dy, cache, train_weight, dx, grads) may change grads and returns dx."""

    def plant(right):
        def backward(dy, cache, train_weight=False):
            dx, grads = right(dy, cache, train_weight)
            return change(right, dy, cache, train_weight, dx, grads), grads

        return backward

    return plant


def scaled(name, factor):
    """The gradient `name` times factor(cache)."""

    def change(right, dy, cache, train_weight, dx, grads):
        if name in grads:
            grads[name] = grads[name] * factor(cache)
        return dx

    return wrong_linear(change)


def altered_cache(alter, of_dx=True, of_grads=True):
    """dx, the gradients or both as they come out of a cache whose (lora, keep) are altered."""

    def change(right, dy, cache, train_weight, dx, grads):
        x, weight, bias, adapter, keep, z, dora = cache
        if adapter is None:
            return dx
        adapter, keep = alter(adapter, keep)
        dora = None if adapter is None else dora
        wrong_dx, wrong_grads = right(dy, (x, weight, bias, adapter, keep, z, dora), train_weight)
        if of_grads:
            grads.update(wrong_grads)
        return wrong_dx if of_dx else dx

    return wrong_linear(change)


def without_dora(of_dx, of_grads):
    """dx or the gradients of A and B as if the rows were not rescaled."""

    def change(right, dy, cache, train_weight, dx, grads):
        if cache[-1] is None:
            return dx
        wrong_dx, wrong_grads = right(dy, (*cache[:-1], None), train_weight)
        grads.update(wrong_grads if of_grads else {})
        return wrong_dx if of_dx else dx

    return wrong_linear(change)


def magnitude_of_the_base(right, dy, cache, train_weight, dx, grads):
    """dm as if v were x W^T alone."""
    lora, z, dora = cache[3], cache[5], cache[-1]
    if dora is not None:
        base = dora[0] - (z * lora.scale) @ lora.B.T
        grads["lora_magnitude_vector"] = (dy.reshape(base.shape) * base).sum(0) / dora[1]
    return dx


def through_the_norm(right, dy, cache, train_weight, dx, grads):
    """dB with the norm's own part, which is right calculus and not DoRA."""
    (weight, _, adapter), dora = cache[1:4], cache[-1]
    if dora is not None:
        v, norm = dora
        dnorm = -(dy.reshape(v.shape) * v).sum(0) * adapter.magnitude / norm**2
        changed = lora.dense(weight, v.dtype) + adapter.scale * adapter.B @ adapter.A
        grads["lora_B.weight"] = (
            grads["lora_B.weight"] + adapter.scale * (dnorm / norm)[:, None] * changed @ adapter.A.T
        )
    return dx


def transposed_b(right, dy, cache, train_weight, dx, grads):
    if "lora_B.weight" in grads:
        grads["lora_B.weight"] = grads["lora_B.weight"].T
    return dx


def first_batch_element_only(right, dy, cache, train_weight, dx, grads):
    if train_weight:
        x, weight, bias = cache[:3]
        grads |= right(dy[:1], (x[:1], weight, bias, None, None, None, None), True)[1]
    return dx


def interleaved(dy, cos, sin):
    """The pairs taken as (0, 1), (2, 3), ... instead of (i, i + h/2)."""
    turned = 2 * cos.shape[-1]
    order = np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2)])
    dx = dy.copy()
    dx[..., order] = rope.rope_forward(dy[..., order], cos, -sin)
    return dx


def silu_without_its_second_term(_, dy, cache):
    gate, up = cache
    return dy * up / (1 + np.exp(-gate))


def gelu_share(x):
    return (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def wrong_loss(change):
    """dlogits of cross_entropy becomes change(dlogits, logits, labels, denominator)."""

    def plant(right):
        def cross_entropy(logits, labels, denominator=None):
            loss, dlogits = right(logits, labels, denominator)
            return loss, change(dlogits, logits, labels, denominator or (labels != functional.IGNORE).sum())

        return cross_entropy

    return plant


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def overwriting_embedding(right):
    def backward(dy, cache):
        tokens, shape = cache
        dweight = np.zeros(shape)
        dweight[tokens] = dy
        return dweight

    return backward


def in_layer(change):
    """change(norm, dy, of) -> dx: what the backward of a layer's norm gives; `of` is which norm, by its field of
    Architecture, and norm(dy) what is right."""

    def plant(right):
        def layer_backward(config, i, dx, cache, *rest):
            fields = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
            names = {field: getattr(config.architecture, field) for field in fields}
            of = {id(cache[name]): field for field, name in names.items() if name}
            of |= {id(cache[name]): "qk_norm" for name in config.architecture.qk_norm}
            norm_backward = layer.norm_backward

            def changed(config, dy, c):
                dparams = norm_backward(config, dy, c)[1]
                return change(lambda d: norm_backward(config, d, c)[0], dy, of[id(c)], dx), dparams

            with patch.object(layer, "norm_backward", changed):
                return right(config, i, dx, cache, *rest)

        return layer_backward

    return plant


def forgotten_residual(of_mlp):
    """In the layer's backward, dx + dn becomes dn, at the MLP or at the attention."""
    if of_mlp:
        return in_layer(lambda norm, dy, of, dx: norm(dy) - dx if of == "mlp_norm" else norm(dy))

    def plant(right):
        def layer_backward(config, i, dx, cache, *rest):
            branches = []

            def recording(norm, dy, of, _):
                branches.append(norm(dy))
                return branches[-1].copy()  # the backward adds to it

            in_layer(recording)(right)(config, i, dx, cache, *rest)
            return branches[-1]  # of the attention's norm, the last

        return layer_backward

    return plant


def skipped(fields):
    """The gradient passes these norms of the layer as it is."""
    return in_layer(lambda norm, dy, of, _: dy if of in fields else norm(dy))


def one_plus_forgotten(right):
    def norm_backward(config, dy, cache):
        if config.architecture.norm_of_one_plus:
            x, inv, weight = cache
            cache = (x, inv, weight - 1)
        return right(config, dy, cache)

    return norm_backward


def wrong_use(layer_name, keep):
    """In the model's backward, the linear `layer_name` gives keep(dx, grads) in place of (dx, grads)."""

    def plant(right):
        def backward(config, params, dlogits, cache):
            residuals = {} if cache["adapter"] is None else cache["adapter"].residual
            names = {id(p): name for name, p in [*params.items(), *residuals.items()]}
            inner = lora.linear_backward

            def forgetful(dy, cache, train_weight=False):
                dx, grads = inner(dy, cache, train_weight)
                return keep(dx, grads) if names[id(cache[1])].endswith(layer_name) else (dx, grads)

            with patch.object(layer, "linear_backward", forgetful):
                return right(config, params, dlogits, cache)

        return backward

    return plant


def scale_forgotten(right):
    """Of the embedding, in the backward."""

    def backward(config, params, dlogits, cache):
        with patch.object(decoder, "_embedding_scale", lambda config, x: 1.0):
            return right(config, params, dlogits, cache)

    return backward


def whole_head_turned(right):
    """All of a head turned back where RoPE turns a part: the pairs are others, and there is no angle for the rest."""

    def backward(dy, cos, sin):
        missing = dy.shape[-1] // 2 - cos.shape[-1]
        pad = ((0, 0), (0, missing))
        return right(dy, np.pad(cos, pad, constant_values=1), np.pad(sin, pad))

    return backward


def rest_dropped(right):
    """Nothing for the elements that RoPE leaves as they are."""

    def backward(dy, cos, sin):
        dx = right(dy, cos, sin)
        dx[..., 2 * cos.shape[-1] :] = 0
        return dx

    return backward


def mean_over_batch(right):
    """Of the learned positions; tokens are (B, T), positions (T,)."""
    return lambda dy, cache: right(dy, cache) / (3 if cache[0].ndim == 1 else 1)


def new_masks_on_recomputing(right):
    def backward(config, params, dlogits, cache):
        if cache["recompute"]:
            cache["layers"] = [(x, seed and seed + 1) for x, seed in cache["layers"]]
        return right(config, params, dlogits, cache)

    return backward


def without_the_weight(right):
    def backward(dy, cache):
        x, inv, weight = cache
        return right(dy, (x, inv, np.ones_like(weight)))[0], right(dy, cache)[1]

    return backward


def without_the_head_s_part(right):
    def backward(dlogits, cache, train_weight=False):
        dx, grads = right(dlogits, cache, train_weight)
        return dx, {name: grad * 0 for name, grad in grads.items()}

    return backward


def last_tile_only(right):
    def backward(dlogits, cache, train_weight=False):
        (*_, last), dlast = head._tiles(cache[1]), np.zeros_like(dlogits)
        dlast[..., last] = dlogits[..., last]
        return right(dlast, cache)[0], right(dlogits, cache, train_weight)[1]

    return backward


def no_mask(adapter, keep):
    return adapter, None


PLANTS: dict[str, dict[str, Callable]] = {  # the function that is changed: what is wrong, and how it is planted
    "embedding_backward": {
        "embedding: a repeated token overwrites": overwriting_embedding,
        "model: tied embedding without the lookup's part": lambda right: lambda dy, cache: right(dy, cache) * 0,
        "model: learned positions' gradient is the mean over the batch": mean_over_batch,
    },
    "rmsnorm_backward": {
        "rmsnorm: dx without the mean term": wrong_gradient(0, lambda _, dy, c: dy * c[2] * c[1]),
        "rmsnorm: dx without the weight": without_the_weight,
        "rmsnorm: dweight from x, not the normed x": wrong_gradient(
            1, lambda dweight, dy, cache: (dy * cache[0]).reshape(-1, len(dweight)).sum(0)
        ),
    },
    "layernorm_backward": {
        "layernorm: dx without the mean of g": wrong_gradient(
            0, lambda dx, dy, cache: dx + cache[1] * (dy * cache[2]).mean(-1, keepdims=True)
        ),
        "layernorm: dx without the term of the variance": wrong_gradient(
            0, lambda dx, dy, c: dx + c[1] * c[0] * (dy * c[2] * c[0]).mean(-1, keepdims=True)
        ),
        "layernorm: dbias is the mean": wrong_gradient(2, lambda dbias, dy, cache: dbias * dbias.size / dy.size),
    },
    "norm_backward": {
        "model: (1 + w) forgotten": one_plus_forgotten,
    },
    "rope_backward": {
        "rope: turned the wrong way": lambda right: rope.rope_forward,
        "rope: interleaved pairs": lambda right: interleaved,
        "rope: not turned back": lambda right: lambda dy, cos, sin: dy,
        "rope: the whole head turned, not its part": whole_head_turned,
        "rope: no gradient for the part that is not turned": rest_dropped,
    },
    "attention_backward": {
        "attention: dq without 1/sqrt(h)": attention_mistake(scale_q=False),
        "attention: dk without 1/sqrt(h)": attention_mistake(scale_k=False),
        "attention: dk, dv of the group's first head only": attention_mistake(group_sum=False),
        "attention: heads grouped by remainder": attention_mistake(blocks=False),
        "attention: softmax without the row sum": attention_mistake(row_sum=False),
        "attention: no causal mask": attention_mistake(mask=False),
        "attention: dk, dv of the last tile only": attention_mistake(all_tiles=False),
        "attention: a window too wide by one": attention_mistake(wider=1),
        "attention: a window too narrow by one": attention_mistake(wider=-1),
        "attention: no window": attention_mistake(wider=10**9),
        "attention: softcap's derivative missing": attention_mistake(cap_slope=False),
    },
    "swiglu_backward": {
        "swiglu: silu' without x (1 - sigmoid)": wrong_gradient(0, silu_without_its_second_term),
        "swiglu: dup from gate, not silu(gate)": wrong_gradient(1, lambda _, dy, cache: dy * cache[0]),
        "swiglu: dgate and dup exchanged": lambda right: lambda dy, cache: right(dy, cache)[::-1],
    },
    "gelu_backward": {
        "gelu: derivative without its second term": lambda right: lambda dy, cache: dy * gelu_share(cache[0]),
    },
    "geglu_backward": {
        "geglu: gelu' without its second term": wrong_gradient(0, lambda _, dy, c: dy * c[1] * gelu_share(c[0])),
        "geglu: dup from gate, not gelu(gate)": wrong_gradient(1, lambda _, dy, cache: dy * cache[0]),
        "geglu: dgate and dup exchanged": lambda right: lambda dy, cache: right(dy, cache)[::-1],
    },
    "softcap_backward": {
        "softcap: derivative missing": lambda right: lambda dy, cache: dy,
        "softcap: derivative not squared": lambda right: lambda dy, cache: dy * (1 - abs(cache[0])),
    },
    "cross_entropy": {
        "cross_entropy: divided by all positions": wrong_loss(
            lambda dlogits, logits, labels, n: dlogits * n / labels.size
        ),
        "cross_entropy: ignored positions count": wrong_loss(
            lambda dlogits, logits, labels, n: np.where(dlogits == 0, softmax(logits) / n, dlogits)
        ),
        "cross_entropy: softmax without the label": wrong_loss(
            lambda dlogits, logits, labels, n: (dlogits != 0) * softmax(logits) / n
        ),
    },
    "linear_backward": {
        "linear: dA without the scale": scaled("lora_A.weight", lambda c: 1 / c[3].scale),
        "linear: dB without the scale": scaled("lora_B.weight", lambda c: 1 / c[3].scale),
        "linear: dB with the scale twice": scaled("lora_B.weight", lambda c: c[3].scale),
        "linear: dB transposed": wrong_linear(transposed_b),
        "linear: dx without the adapter's path": altered_cache(lambda *_: (None, None), of_grads=False),
        "linear: dropout's mask missing in dA": altered_cache(no_mask, of_dx=False),
        "linear: dropout's mask missing in dx": altered_cache(no_mask, of_grads=False),
        "linear: dropout's 1/(1 - p) missing": altered_cache(lambda a, keep: (a._replace(dropout=0.0), keep)),
        "linear: DoRA's m/norm missing in dA, dB": without_dora(of_dx=False, of_grads=True),
        "linear: DoRA's m/norm missing in dx": without_dora(of_dx=True, of_grads=False),
        "linear: DoRA's dm without 1/norm": scaled("lora_magnitude_vector", lambda c: c[-1][1]),
        "linear: DoRA's dm from x W^T alone": wrong_linear(magnitude_of_the_base),
        "linear: DoRA's norm not detached": wrong_linear(through_the_norm),
        "linear: dbias is the mean": scaled("bias", lambda c: c[0].shape[-1] / c[0].size),
        "linear: dW, dbias of one batch element only": wrong_linear(first_batch_element_only),
    },
    "layer_backward": {
        "model: residual around attention forgotten": forgotten_residual(of_mlp=False),
        "model: residual around the MLP forgotten": forgotten_residual(of_mlp=True),
        "model: norm of q and k skipped": skipped(["qk_norm"]),
        "model: norm of what attention adds skipped": skipped(["attention_post_norm"]),
        "model: norm of what the MLP adds skipped": skipped(["mlp_post_norm"]),
    },
    "head_backward": {
        "head: dx of the last tile only": last_tile_only,
        "model: tied embedding without the head's part": without_the_head_s_part,
    },
    "decoder_backward": {
        "model: v's share of dn forgotten": wrong_use("v_proj.weight", lambda dx, grads: (dx * 0, grads)),
        "model: recomputation draws other dropout masks": new_masks_on_recomputing,
        "model: the embedding's scale forgotten": scale_forgotten,
    },
}
MISTAKES = {what: (function, plant) for function, plants in PLANTS.items() for what, plant in plants.items()}


@contextmanager
def planted(mistake: str) -> Iterator[None]:
    """The engine with one mistake in it."""
    function, plant = MISTAKES[mistake]
    everywhere = (functional, rope, attention, lora, layer, head, decoder, model)
    owners = [owner for owner in everywhere if hasattr(owner, function)]
    assert owners, f"the engine has no {function}"
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patch.object(owner, function, plant(getattr(owner, function))))
        yield
