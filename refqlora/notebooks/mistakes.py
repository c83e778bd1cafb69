"""Backward passes with a mistake in them, and a test too weak to notice, for the walkthrough of backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..attention import attention_forward
from ..backend import Array
from ..functional import rmsnorm_forward
from ..lora import LoRA, linear_backward, linear_forward
from .gradients import numeric_gradient


def attention_by_definition(
    dy: Array, cache: tuple, *, scale: bool = True, mask: bool = True, groups: bool = True
) -> tuple[Array, Array, Array]:
    """attention_backward without tiles, the formulas as they stand in a book: dy (B, T, H, h) -> dq, dk, dv.

    A switch that is off is a mistake: dq and dk without 1/sqrt(h); P without the causal mask; dk and dv of the first
    query head of each group, not of all.
    """
    q, k, v, factor = *cache[:3], cache[5]
    (_, t, heads, _), (b, s, kv_heads, h) = q.shape, k.shape
    ks, vs = (x.repeat(heads // kv_heads, axis=2) for x in (k, v))  # of each query head: (B, S, H, h)
    scores = np.einsum("bthi,bshi->bhts", q, ks) * factor  # (B, H, T, S)
    if mask:
        scores += np.triu(np.full((t, s), -np.inf), s - t + 1)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)

    dp = np.einsum("bthi,bshi->bhts", dy, vs)  # y = p v
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))  # p = softmax(s)
    ds *= factor if scale else 1
    dq = np.einsum("bhts,bshi->bthi", ds, ks)  # s = q k^T * factor
    dk, dv = np.einsum("bhts,bthi->bshi", ds, q), np.einsum("bhts,bthi->bshi", p, dy)  # of each query head
    dk, dv = (x.reshape(b, s, kv_heads, -1, h) for x in (dk, dv))  # the last but one: the heads of a group
    return (dq, dk.sum(axis=3), dv.sum(axis=3)) if groups else (dq, dk[:, :, :, 0], dv[:, :, :, 0])


def rmsnorm_over_rows(dy: Array, cache: tuple) -> tuple[Array, Array]:
    """rmsnorm_backward with the sum over a row divided by the number of rows, not by that of columns."""
    x, inv, weight = cache
    n, dn = x * inv, dy * weight
    return inv * (dn - n * (dn * n).sum(axis=-1, keepdims=True) / len(x)), (dy * n).sum(axis=0)


def lora_without_scale(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """linear_backward with s left out of dA."""
    dx, grads = linear_backward(dy, cache)
    return dx, grads["lora_A.weight"] / cache[3].scale, grads["lora_B.weight"]


def careless_test(forward: Callable[..., tuple], backward: Callable[..., Any], **inputs: Array) -> bool:
    """Whether a backward passes a test such as many write: the loss is mean(y), and `allclose` compares, with the
    tolerances that torch.autograd.gradcheck has by default."""
    y, cache = forward(*inputs.values())

    def loss(_: Array) -> float:
        return forward(*inputs.values())[0].mean()

    pairs = zip(inputs.values(), backward(np.full_like(y, 1 / y.size), cache), strict=True)
    return all(np.allclose(numeric_gradient(loss, x), gradient, rtol=1e-3, atol=1e-5) for x, gradient in pairs)


class Mistake(NamedTuple):
    """A wrong backward, inputs with which any check sees that, and inputs with which it cannot be seen."""

    name: str
    forward: Callable[..., tuple]
    backward: Callable[..., Any]
    inputs: dict[str, Array]
    weak: str  # what is weak about the others
    weak_inputs: dict[str, Array]


def planted() -> list[Mistake]:
    """One mistake for each way in which a test can be weak."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    def heads(time: int, queries: int, keys: int, size: float = 1.0) -> dict[str, Array]:
        shapes = {"q": (2, time, queries, 4), "k": (2, time, keys, 4), "v": (2, time, keys, 4)}
        return {name: size * draw(*shape) for name, shape in shapes.items()}

    def norm(x: Array, weight: Array) -> tuple[Array, tuple]:
        return rmsnorm_forward(x, weight, 1e-2)

    w = draw(7, 5)

    def linear(x: Array, a: Array, b: Array) -> tuple[Array, tuple]:
        return linear_forward(x, w, lora=LoRA(a, b, 1.7))

    def attention(name: str, weak: str, weak_inputs: dict[str, Array], **switch: Any) -> Mistake:
        wrong = partial(attention_by_definition, **switch)
        return Mistake(f"attention: {name}", attention_forward, wrong, heads(5, 6, 3), weak, weak_inputs)

    adapter = {"x": draw(4, 5), "A": draw(3, 5), "B": draw(7, 3)}
    return [
        attention("dq, dk without 1/√h", "inputs of size 0.02", heads(5, 6, 3, 0.02), scale=False),
        attention("dk, dv of a group's first head", "as many key heads as heads", heads(5, 3, 3), groups=False),
        attention("P without the mask", "a single token", heads(1, 6, 3), mask=False),
        Mistake(
            "RMSNorm: divided by N, not by D",
            norm,
            rmsnorm_over_rows,
            {"x": draw(4, 7), "weight": draw(7)},
            "as many rows as columns",
            {"x": draw(7, 7), "weight": draw(7)},
        ),
        Mistake(
            "LoRA: dA without s",
            linear,
            lora_without_scale,
            adapter,
            "a new adapter, B = 0",
            adapter | {"B": np.zeros((7, 3))},
        ),
    ]
