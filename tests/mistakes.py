"""Mistakes that people make in a backward: a scale or a mask left out, a sum too short, a path forgotten.

Each is planted in the engine while `planted` lasts, and the gradient checks must catch it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from refqlora import functional, lora, model
from refqlora.model import Model


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
):
    """No tiles, and a copy of k and v for each query head; the switches plant mistakes."""
    q, k, v = cache[:3]
    (_, t, heads, size), (_, s, groups, _) = q.shape, k.shape
    head = np.arange(heads)
    kv_head = head // (heads // groups) if blocks else head % groups
    ks, vs = k[:, :, kv_head], v[:, :, kv_head]  # (B, S, H, h)
    scores = np.einsum("bthi,bshi->bhts", q, ks) / size**0.5
    scores += np.triu(np.full((t, s), -np.inf if mask else 0.0), s - t + 1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthi,bshi->bhts", dy, vs)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True) * row_sum)
    dq = np.einsum("bhts,bshi->bthi", ds, ks) / (size**0.5 if scale_q else 1)
    start = 0 if all_tiles else (t - 1) // functional.TILE * functional.TILE
    last = slice(start, t)  # the query rows that reach dk and dv
    dk_heads = np.einsum("bhts,bthi->bshi", ds[:, :, last], q[:, last]) / (size**0.5 if scale_k else 1)
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
    order = np.concatenate([np.arange(0, dy.shape[-1], 2), np.arange(1, dy.shape[-1], 2)])
    dx = np.empty_like(dy)
    dx[..., order] = functional.rope_forward(dy[..., order], cos, -sin)
    return dx


def silu_without_its_second_term(_, dy, cache):
    gate, up = cache
    return dy * up / (1 + np.exp(-gate))


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


def forgotten_residual(of_mlp):
    """In the layer's backward, dx + dn becomes dn, at the MLP or at the attention."""

    def plant(right):
        def layer_backward(self, i, dx, *rest):
            norm, branches = model.rmsnorm_backward, []

            def recording(dy, cache):
                dn, dweight = norm(dy, cache)
                branches.append(dn)
                return (dn - dx if of_mlp and len(branches) == 1 else dn), dweight

            with patch.object(model, "rmsnorm_backward", recording):
                out = right(self, i, dx, *rest)
            return out if of_mlp else branches[1]

        return layer_backward

    return plant


def wrong_use(layer, keep):
    """In the model's backward, the linear `layer` gives keep(dx, grads) in place of (dx, grads)."""

    def plant(right):
        def backward(self, dlogits, cache):
            residuals = {} if self.active is None else self.adapters[self.active].residual
            names = {id(p): name for name, p in [*self.params.items(), *residuals.items()]}
            inner = model.linear_backward

            def forgetful(dy, cache, train_weight=False):
                dx, grads = inner(dy, cache, train_weight)
                return keep(dx, grads) if names[id(cache[1])].endswith(layer) else (dx, grads)

            with patch.object(model, "linear_backward", forgetful):
                return right(self, dlogits, cache)

        return backward

    return plant


def new_masks_on_recomputing(right):
    def backward(self, dlogits, cache):
        if cache["recompute"]:
            cache["layers"] = [(x, seed and seed + 1) for x, seed in cache["layers"]]
        return right(self, dlogits, cache)

    return backward


def without_the_weight(right):
    def backward(dy, cache):
        x, inv, weight = cache
        return right(dy, (x, inv, np.ones_like(weight)))[0], right(dy, cache)[1]

    return backward


def no_head_part(dx, grads):
    return dx, {name: grad * 0 for name, grad in grads.items()}


def no_mask(adapter, keep):
    return adapter, None


PLANTS: dict[str, dict[str, Callable]] = {  # the function that is changed: what is wrong, and how it is planted
    "embedding_backward": {
        "embedding: a repeated token overwrites": overwriting_embedding,
        "model: tied embedding without the lookup's part": lambda right: lambda dy, cache: right(dy, cache) * 0,
    },
    "rmsnorm_backward": {
        "rmsnorm: dx without the mean term": wrong_gradient(0, lambda _, dy, c: dy * c[2] * c[1]),
        "rmsnorm: dx without the weight": without_the_weight,
        "rmsnorm: dweight from x, not the normed x": wrong_gradient(
            1, lambda dweight, dy, cache: (dy * cache[0]).reshape(-1, len(dweight)).sum(0)
        ),
    },
    "rope_backward": {
        "rope: turned the wrong way": lambda right: functional.rope_forward,
        "rope: interleaved pairs": lambda right: interleaved,
        "rope: not turned back": lambda right: lambda dy, cos, sin: dy,
    },
    "attention_backward": {
        "attention: dq without 1/sqrt(h)": attention_mistake(scale_q=False),
        "attention: dk without 1/sqrt(h)": attention_mistake(scale_k=False),
        "attention: dk, dv of the group's first head only": attention_mistake(group_sum=False),
        "attention: heads grouped by remainder": attention_mistake(blocks=False),
        "attention: softmax without the row sum": attention_mistake(row_sum=False),
        "attention: no causal mask": attention_mistake(mask=False),
        "attention: dk, dv of the last tile only": attention_mistake(all_tiles=False),
    },
    "swiglu_backward": {
        "swiglu: silu' without x (1 - sigmoid)": wrong_gradient(0, silu_without_its_second_term),
        "swiglu: dup from gate, not silu(gate)": wrong_gradient(1, lambda _, dy, cache: dy * cache[0]),
        "swiglu: dgate and dup exchanged": lambda right: lambda dy, cache: right(dy, cache)[::-1],
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
    "_layer_backward": {
        "model: residual around attention forgotten": forgotten_residual(of_mlp=False),
        "model: residual around the MLP forgotten": forgotten_residual(of_mlp=True),
    },
    "backward": {
        "model: v's share of dn forgotten": wrong_use("v_proj.weight", lambda dx, grads: (dx * 0, grads)),
        "model: tied embedding without the head's part": wrong_use("embed_tokens.weight", no_head_part),
        "model: recomputation draws other dropout masks": new_masks_on_recomputing,
    },
}
MISTAKES = {what: (function, plant) for function, plants in PLANTS.items() for what, plant in plants.items()}


@contextmanager
def planted(mistake: str) -> Iterator[None]:
    """The engine with one mistake in it."""
    function, plant = MISTAKES[mistake]
    owners = [owner for owner in (functional, lora, model, Model) if hasattr(owner, function)]
    assert owners, f"the engine has no {function}"
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patch.object(owner, function, plant(getattr(owner, function))))
        yield
