"""The memory of a training step, predicted from shapes before anything is allocated.

The largest arrays of a step, in elements, by the legend in functional.py with N = B*T rows:

    a layer's cache     N (4D + 2Hh + 2Kh + 3F + ...)    for its backward; with recompute only its input, N D
    logits              2 N V                            with their gradient
    scratch             5 N F, 2 H 128 T, ...            the most that one operation holds at once
    a weight            out * in                         while it is dequantised

A step's peak is either at the loss, where all caches and the logits are held, or in a layer's backward, where the
caches of the layers below it, the gradient of the logits and the scratch are held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..attention import TILE
from ..config import Config
from ..functional import CHUNK
from ..lm_head import TILE as HEAD_TILE
from ..lora_config import LoraConfig


def step_bytes(
    config: Config,
    lora: LoraConfig | None,
    length: int,
    batch: int,
    *,
    micro_batch: int | None = None,
    recompute: bool = False,
    quantized: bool = True,
    half_head: bool = False,
    itemsize: int = 4,
) -> int:
    """The peak of `loss_and_gradients`, in bytes, on top of weights, adapter and optimiser.

    lora: None for full training. length: T, tokens in the longest sequence. batch: sequences in a step; micro_batch of
    them go through the model at once (None: all). quantized: linears have 4 bits; half_head: embedding and output head
    have 16. itemsize: of the dtype of all computation.
    """
    at_once = min(batch, micro_batch or batch)
    rows, logits = at_once * length, at_once * length * config.vocab_size
    shapes = config.shapes()
    ranks = {name: lora.rank_of(name) for name in lora.matches(config.linears())} if lora else {}
    gradients = sum(ranks[name] * sum(shapes[name + ".weight"]) for name in ranks) if lora else _size(shapes)
    head = 0 if lora else config.vocab_size * config.hidden_size  # the gradient of its weight
    body = gradients - head * (1 if config.tied else 2)

    inner = max(_layer_cache(config, lora, ranks, i) for i in range(config.layers)) * rows
    kept = config.layers * (config.hidden_size * rows if recompute else inner)
    kept += 2 * rows * config.hidden_size  # the last norm
    scratch = _layer_scratch(config, lora, ranks, at_once, length, quantized)
    capped = config.final_logit_softcapping is not None
    copies, after = (3, 3) if capped else (2, 1)  # of the logits or their gradient: at the loss, in the backward
    tile = min(config.vocab_size, max(1, HEAD_TILE // config.hidden_size))
    cast = tile * config.hidden_size if half_head else 0
    at_head = max(
        logits + tile * rows + cast,  # a tile's logits, before they are copied
        logits * copies + min(CHUNK, logits),
        logits * after + config.hidden_size * rows * 2 + cast + head,
        logits * after + scratch + head + (inner if recompute else 0),
    )
    at_bottom = logits * after + scratch + head + body + inner
    at_end = logits * after + 2 * head + body
    accumulated = gradients if at_once < batch else 0
    integers = 16 * batch * (length + 1) + 8 * rows  # tokens and labels
    return int(itemsize * (accumulated + max(kept + at_head, at_bottom, at_end)) + integers)


def _layer_cache(config: Config, lora: LoraConfig | None, ranks: Mapping[str, int], i: int) -> float:
    """Elements for each row that a layer's forward keeps for its backward."""
    a, d, f = config.architecture, config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    total: float = 2 * (2 * d + 1)  # two norms: their input and output
    total += sum(d + 1 for name in (a.attention_post_norm, a.mlp_post_norm) if name)
    fused = len(a.qkv) == 1
    total += (q + k + v if fused else v) + (0 if a.positions else q + k)  # RoPE copies q and k
    total += q + k + config.heads + config.kv_heads if a.qk_norm else 0
    total += q + config.heads  # attention's output, and each row's logsumexp
    total += (len(config.mlp_sizes) + 1) * f
    shapes = config.shapes()
    for name in ranks:
        if name.startswith(f"{a.layers}{i}."):
            out_features, in_features = shapes[name + ".weight"]
            total += ranks[name]
            total += in_features / 4 if lora and lora.dropout else 0  # the mask, a byte for each element
            total += out_features if lora and lora.dora else 0
    return total


def _layer_scratch(
    config: Config, lora: LoraConfig | None, ranks: Mapping[str, int], batch: int, length: int, quantized: bool
) -> int:
    """The most elements that one operation of a layer holds at once, besides the caches."""
    d, f = config.hidden_size, config.intermediate_size
    rows, (q, k, v) = batch * length, config.qkv_sizes
    shapes = config.shapes()
    weight = max(out * into for out, into in (shapes[name + ".weight"] for name in config.linears()))
    weight = (weight if quantized else 0) + (2 * weight if lora and lora.dora else 0)
    drop = 1 if lora and lora.dropout else 0
    tile = min(TILE, length)
    scores = config.heads * tile * length * (5 if config.attn_logit_softcapping is not None else 2)
    scores += 2 * tile * tile
    activation = rows * (d + 5 * f)
    down = rows * (2 * d + (2 + 2 * drop) * f) + weight
    into = rows * ((len(config.mlp_sizes) + 1) * f + (3 + 2 * drop) * d) + weight
    attention = rows * (d + 2 * q + k + v) + scores
    return max(activation, down, into, attention)


def _size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
