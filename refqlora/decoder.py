"""The decoder: all layers, forward and backward.

    x = embedding(tokens)                 (B, T, D)
    x = layer(x), for each layer          (B, T, D): layer.py
    logits = norm(x) W_head^T             (B, T, V): lm_head.py

Parameters are a plain dict by their Hugging Face names, and gradients carry the same names. A Llama's:

    model.embed_tokens.weight                             (V, D)
    model.layers.0.input_layernorm.weight                 (D,)
    model.layers.0.self_attn.q_proj.weight                (H*h, D)     an array or a QuantizedTensor
    model.layers.0.self_attn.q_proj.lora_A.weight         (r, D)       in an adapter
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .adapters import Adapter
from .backend import Array, array_module
from .config import Config
from .functional import embedding_backward, embedding_forward, softcap_backward, softcap_forward
from .kv_cache import KVCache
from .layer import Rope, layer_backward, layer_forward, norm_backward, norm_forward
from .lm_head import head_backward, head_forward
from .lora import Weight
from .rope import rope_frequencies, rope_tables


def decoder_forward(
    config: Config,
    params: Mapping[str, Weight],
    tokens: Array,
    dtype: np.dtype,
    adapter: Adapter | None = None,
    *,
    rng: np.random.Generator | None = None,
    recompute: bool = False,
    kv: KVCache | None = None,
) -> tuple[Array, dict]:
    """tokens (B, T) integers -> logits (B, T, V), cache. Everything is computed in `dtype`.

    rng: turns the adapter's dropout on. recompute: keep only each layer's input and compute the rest again in the
    backward (gradient checkpointing, Chen et al. 2016): the same gradients to the bit, for one more forward.
    kv: continue after the positions that it holds, and add the new ones.
    """
    a = config.architecture
    start = 0 if kv is None else kv.length
    length = start + tokens.shape[1]
    positions = array_module(tokens).arange(start, length)  # (T,)

    x, embedding = embedding_forward(tokens, params[a.embedding + ".weight"])  # (B, T, D)
    x = x.astype(dtype, copy=False)
    if a.scaled_embedding:
        x *= _embedding_scale(config, x)
    rope = learned = None
    if a.positions:
        p, learned = embedding_forward(positions, params[a.positions + ".weight"])  # (T, D)
        x += p
    else:
        rope = _rope(config, positions, length, dtype)

    layers = []
    for i in range(config.layers):
        # A layer draws its dropout masks from a seed of its own, so that they are the same when it is recomputed.
        seed = None if rng is None else int(rng.integers(2**63))
        y, cache = layer_forward(config, params, adapter, i, x, rope, seed, kv)
        layers.append((x, seed) if recompute else cache)
        x = y
    if kv is not None:
        kv.length = length

    x, norm = norm_forward(config, params, a.final_norm, x)
    logits, head = head_forward(x, params[config.head])  # (B, T, V)
    softcap = None
    if config.final_logit_softcapping is not None:
        logits, softcap = softcap_forward(logits, config.final_logit_softcapping)
    return logits, {
        "embedding": embedding, "positions": learned, "layers": layers, "norm": norm, "head": head,
        "softcap": softcap, "rope": rope, "recompute": recompute, "adapter": adapter, "shape": logits.shape,
    }  # fmt: skip


def decoder_backward(config: Config, params: Mapping[str, Weight], dlogits: Array, cache: dict) -> dict[str, Array]:
    """The lines of `decoder_forward` in reverse: dlogits (B, T, V) -> {name: gradient}.

    If the forward had an adapter, these are the gradients of its arrays and no others; if not, of every parameter.
    The cache can be used once: each layer's part is freed on the way, for the layers before it to use the memory.
    """
    a, adapter, layers = config.architecture, cache["adapter"], cache["layers"]
    full = adapter is None
    grads: dict[str, Array] = {}

    if config.final_logit_softcapping is not None:  # logits = cap * tanh(logits / cap)
        dlogits = softcap_backward(dlogits, cache["softcap"])
    dx, dhead = head_backward(dlogits, cache["head"], train_weight=full)  # logits = x W_head^T
    dx, dnorm = norm_backward(config, dx, cache["norm"])  # x = norm(x)

    for i in reversed(range(config.layers)):  # x = layer(x)
        layer = layers.pop()
        if cache["recompute"]:
            x, seed = layer
            _, layer = layer_forward(config, params, adapter, i, x, cache["rope"], seed)
        dx = layer_backward(config, i, dx, layer, cache["rope"], grads, full)  # (B, T, D)
        del layer

    if full:
        grads |= {f"{a.final_norm}.{key}": grad for key, grad in dnorm.items()}
        if a.positions:  # x = embedding(tokens) + p[positions], the same p for every batch element
            grads[a.positions + ".weight"] = embedding_backward(dx.sum(axis=0), cache["positions"])
        if a.scaled_embedding:
            dx = dx * _embedding_scale(config, dx)  # x = scale * embedding(tokens)
        dembedding = embedding_backward(dx, cache["embedding"])  # (V, D)
        if config.padding is not None:
            dembedding[config.padding] = 0  # as torch's padding_idx
        if config.tied:  # the embedding is also W_head
            dembedding += dhead["weight"]
        else:
            grads[config.head] = dhead["weight"]
        grads[a.embedding + ".weight"] = dembedding
    return grads


def _rope(config: Config, positions: Array, length: int, dtype: np.dtype) -> Rope:
    """cos and sin (T, n) of the positions (T,), in a text of `length` positions so far."""
    frequencies, factor = rope_frequencies(
        config.rope_theta, config.rotary_dim, dtype, config.rope_scaling, length, config.max_positions
    )
    return rope_tables(positions, frequencies, dtype, factor)


def _embedding_scale(config: Config, x: Array) -> np.floating:
    """sqrt(D), rounded to the dtype of x as in transformers."""
    return x.dtype.type(config.hidden_size**0.5)
