"""One decoder layer: the forward, and the backward that follows it line by line in reverse.

All architectures share these lines. Where one differs from Llama, a condition on the line says how; architectures.py
says which parts each has and what they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .adapters import Adapter, linear_of
from .attention import attention_backward, attention_forward
from .backend import Array, array_module
from .config import Config
from .functional import (
    geglu_backward,
    geglu_forward,
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    swiglu_backward,
    swiglu_forward,
)
from .kv_cache import KVCache
from .lora import Weight, linear_backward, linear_forward
from .rope import rope_backward, rope_forward

Rope = tuple[Array, Array]  # cos and sin (T, n) of the positions


def layer_forward(
    config: Config,
    params: Mapping[str, Weight],
    adapter: Adapter | None,
    i: int,
    x: Array,
    rope: Rope | None,
    seed: int | None = None,
    kv: KVCache | None = None,
) -> tuple[Array, dict]:
    """Layer `i`. x (B, T, D) -> (B, T, D), cache. For a Llama, and for most others, it is these lines:

        n = rmsnorm(x, input_layernorm)                      (B, T, D)
        q, k, v = q_proj(n), k_proj(n), v_proj(n)            (B, T, H*h) and twice (B, T, K*h), then by heads
        q, k = rope(q), rope(k)                              (B, T, H, h), (B, T, K, h)
        y = attention(q, k, v)                               (B, T, H, h)
        x = x + o_proj(y)                                    (B, T, D)

        n = rmsnorm(x, post_attention_layernorm)             (B, T, D)
        y = silu(gate_proj(n)) * up_proj(n)                  (B, T, F)
        x = x + down_proj(y)                                 (B, T, D)

    adapter: has the LoRAs of the linears; None for none. seed: draws their dropout masks; None turns dropout off.
    kv: holds the keys and values of earlier positions, and receives those of the new ones.
    """
    a, layer = config.architecture, f"{config.architecture.layers}{i}."
    rng = None if seed is None else np.random.default_rng(seed)
    cache: dict[str, tuple] = {}

    def linear(name: str, x: Array) -> Array:
        weight, lora = linear_of(params, adapter, layer + name)
        y, cache[name] = linear_forward(x, weight, params.get(layer + name + ".bias"), lora, rng)
        return y

    def project(names: Sequence[str], x: Array, sizes: Sequence[int]) -> list[Array]:
        """One linear for each size, or one for all: its output has the parts side by side."""
        if len(names) == len(sizes):
            return [linear(name, x) for name in names]
        return array_module(x).split(linear(names[0], x), np.cumsum(sizes)[:-1].tolist(), axis=-1)

    def norm(name: str, x: Array) -> Array:
        y, cache[name] = norm_forward(config, params, layer + name, x)
        return y

    n = norm(a.attention_norm, x)
    q, k, v = project(a.qkv, n, config.qkv_sizes)
    q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))  # (B, T, H or K, h)
    if a.qk_norm:
        q, k = norm(a.qk_norm[0], q), norm(a.qk_norm[1], k)
    if rope is not None:
        q, k = rope_forward(q, *rope), rope_forward(k, *rope)
    if kv is not None:
        k, v = kv.extend(i, k, v)  # (B, S, K, h)
    scale, window, softcap = config.attention_scale(i), config.window(i), config.attn_logit_softcapping
    y, cache["attention"] = attention_forward(q, k, v, scale=scale, window=window, softcap=softcap)  # (B, T, H, h)
    y = linear(a.attention_out, y.reshape(*x.shape[:2], -1))  # (B, T, D)
    if a.attention_post_norm:
        y = norm(a.attention_post_norm, y)
    y += x  # x = x + y
    x = y

    n = norm(a.mlp_norm, x)
    y, cache["activation"] = activation_forward(config, *project(a.mlp_in, n, config.mlp_sizes))  # (B, T, F)
    y = linear(a.mlp_out, y)  # (B, T, D)
    if a.mlp_post_norm:
        y = norm(a.mlp_post_norm, y)
    y += x
    return y, cache


def layer_backward(
    config: Config, i: int, dx: Array, cache: dict, rope: Rope | None, grads: dict[str, Array], full: bool
) -> Array:
    """The lines of `layer_forward` in reverse: dx (B, T, D) of the layer's output -> dx (B, T, D) of its input.

    The gradients of its parameters go into `grads`: the adapter's, and with `full` the base's.
    """
    a, layer = config.architecture, f"{config.architecture.layers}{i}."

    def linear(name: str, dy: Array) -> Array:
        dx, dparams = linear_backward(dy, cache[name], full)
        grads.update({f"{layer}{name}.{key}": value for key, value in dparams.items()})
        return dx

    def project(names: Sequence[str], dparts: Sequence[Array]) -> Array:
        """The gradients of the parts -> dn (B, T, D), the sum over the linears."""
        if len(names) < len(dparts):
            dparts = [array_module(dx).concatenate(dparts, axis=-1)]
        dn = linear(names[0], dparts[0])
        for name, dpart in zip(names[1:], dparts[1:], strict=True):
            dn += linear(name, dpart)
        return dn

    def norm(name: str, dy: Array) -> Array:
        dx, dparams = norm_backward(config, dy, cache[name])
        if full:
            grads.update({f"{layer}{name}.{key}": value for key, value in dparams.items()})
        return dx

    dy = norm(a.mlp_post_norm, dx) if a.mlp_post_norm else dx  # x = x + y: dx is the gradient of both
    dy = linear(a.mlp_out, dy)  # y = down_proj(y): (B, T, F)
    dn = project(a.mlp_in, activation_backward(config, dy, cache["activation"]))  # y = silu(gate_proj(n)) * up_proj(n)
    dy = norm(a.mlp_norm, dn)  # n = rmsnorm(x)
    dy += dx  # x = x + y
    dx = dy

    dy = norm(a.attention_post_norm, dx) if a.attention_post_norm else dx  # x = x + y
    dy = linear(a.attention_out, dy).reshape(*dx.shape[:2], -1, config.head_dim)  # y = o_proj(y): (B, T, H, h)
    dq, dk, dv = attention_backward(dy, cache["attention"])  # y = attention(q, k, v)
    if rope is not None:
        dq, dk = rope_backward(dq, *rope), rope_backward(dk, *rope)  # q, k = rope(q), rope(k)
    if a.qk_norm:
        dq, dk = norm(a.qk_norm[0], dq), norm(a.qk_norm[1], dk)  # q, k = norm(q), norm(k)
    dn = project(a.qkv, [part.reshape(*dx.shape[:2], -1) for part in (dq, dk, dv)])  # q = q_proj(n), ...
    dy = norm(a.attention_norm, dn)  # n = rmsnorm(x)
    dy += dx  # x = x + y
    return dy


def norm_forward(config: Config, params: Mapping[str, Array], name: str, x: Array) -> tuple[Array, tuple]:
    """The architecture's norm, with the parameters called `name`: x (..., D) -> (..., D), cache."""
    weight = params[name + ".weight"]
    if config.architecture.layernorm:
        return layernorm_forward(x, weight, params[name + ".bias"], config.eps)
    return rmsnorm_forward(x, 1 + weight if config.architecture.norm_of_one_plus else weight, config.eps)


def norm_backward(config: Config, dy: Array, cache: tuple) -> tuple[Array, dict[str, Array]]:
    """dy (..., D) -> dx (..., D), and the gradients of "weight" and "bias". (For 1 + w, dw is the same.)"""
    if config.architecture.layernorm:
        dx, dweight, dbias = layernorm_backward(dy, cache)
        return dx, {"weight": dweight, "bias": dbias}
    dx, dweight = rmsnorm_backward(dy, cache)
    return dx, {"weight": dweight}


def activation_forward(config: Config, *parts: Array) -> tuple[Array, tuple]:
    """The MLP's activation: gate and up (..., F), or a single input -> (..., F), cache."""
    if not config.architecture.gated:
        return gelu_forward(*parts)
    return swiglu_forward(*parts) if config.activation == "silu" else geglu_forward(*parts)


def activation_backward(config: Config, dy: Array, cache: tuple) -> tuple[Array, ...]:
    """dy (..., F) -> the gradients of gate and up (..., F), or of the single input."""
    if not config.architecture.gated:
        return (gelu_backward(dy, cache),)
    return swiglu_backward(dy, cache) if config.activation == "silu" else geglu_backward(dy, cache)
