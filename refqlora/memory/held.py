"""Bytes, by category, of the arrays that a training step holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..backend import Array
from ..model import Model
from ..optim import AdamW
from ..quantization import QuantizedTensor


def training_bytes(model: Model, grads: Mapping[str, Array], optimizer: AdamW) -> dict[str, int]:
    """The bytes of the arrays that a training run holds, without activations, which come and go in each step.

    codes: the 4-bit weights; constants: their quantisation constants; dense: the weights that are not quantised;
    adapter; gradients; optimizer: AdamW's two moments; total: the sum. The residual weights of PiSSA and OLoRA adapters
    are counted too.
    """
    weights = [*model.params.values(), *(w for a in model.adapters.values() for w in a.residual.values())]
    quantized = [p for p in weights if isinstance(p, QuantizedTensor)]
    adapter = model.trainable().values() if model.active is not None else ()
    parts = {
        "codes": sum(q.packed.nbytes for q in quantized),
        "constants": sum(q.constants_nbytes for q in quantized),
        "dense": sum(p.nbytes for p in weights if not isinstance(p, QuantizedTensor)),
        "adapter": sum(p.nbytes for p in adapter),
        "gradients": sum(g.nbytes for g in grads.values()),
        "optimizer": optimizer.nbytes,
    }
    return {**parts, "total": sum(parts.values())}


def cache_bytes(model: Model, cache: Mapping[str, Any]) -> dict[str, int]:
    """{part: bytes} of what a forward keeps for its backward: `cache` is that of `model.forward`, or of one layer.

    Each array is counted once, in the first part that has it, and a view as the array that it views. The model's own
    weights and adapters are not counted: the cache only refers to them.
    """
    adapters = model.adapters.values()
    weights = [model.params, *(a.params for a in adapters), *(a.residual for a in adapters)]
    seen = {id(array) for array in _arrays(weights)}
    parts = {}
    for part, held in cache.items():
        new = {id(array): array.nbytes for array in _arrays(held)}
        parts[part] = sum(size for key, size in new.items() if key not in seen)
        seen |= set(new)
    return parts


def _arrays(held: Any) -> Iterator[Any]:
    """The arrays and quantised tensors in nested tuples, lists and dicts; for a view, what it is a view of."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, list | tuple):
        for one in held:
            yield from _arrays(one)
    elif hasattr(held, "nbytes"):
        while hasattr(getattr(held, "base", None), "nbytes"):
            held = held.base
        yield held
