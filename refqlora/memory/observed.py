"""A model that is watched while it takes a step: what the forward keeps, and where in the step the bytes are held.

The same eyes watch real arrays and hollow ones, so that a prediction and a measurement have the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import Array
from ..lora import LoRA
from ..model import Model
from ..quantization import QuantizedTensor
from .hollow import Hollow

Kept = dict[tuple[str, str], list[Array]]  # (operation, what of it): an array of each layer


class Observed(Model):
    """A model that calls `before_backward(cache)` when the first forward of a step is done and the loss is known."""

    before_backward: Callable[[dict], None] | None = None

    @classmethod
    def of(cls, model: Model, before_backward: Callable[[dict], None]) -> Observed:
        """The same model, watched."""
        watched = cls.__new__(cls)
        watched.__dict__.update(model.__dict__)
        watched.before_backward = before_backward
        return watched

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        if self.before_backward is not None:
            self.before_backward(cache)
            self.before_backward = None
        return super().backward(dlogits, cache)


# What the tuples in a layer's cache hold, in their order; None is what belongs to the model and not to the step.
_LINEAR = ("x", None, None, None, "dropout's mask", "z = x A^T", "DoRA's v, norm")
_PARTS = {
    "linear": _LINEAR,
    "rmsnorm": ("x", "1 / rms", "1 + weight"),
    "layernorm": ("n", "1 / std", None),
    "attention": ("q", "k", "v", "y", "logsumexp"),
    "activation": ("gate", "up"),
}


def kept_arrays(model: Model, cache: Mapping[str, Any]) -> Kept:
    """The arrays that a forward keeps for its backward, each once, though two operations may share it: {(operation, what):
    the arrays of the layers}. The logits are not among them."""
    config, seen = model.config, {id(base(p)) for p in _weights(model)}
    linears = {name.rsplit(".", 1)[-1] for name in config.linears()}
    kept: Kept = {}

    def add(operation: str, what: str, found: Any) -> None:
        for array in _arrays(found):
            whole = base(array)
            if id(whole) not in seen:
                seen.add(id(whole))
                kept.setdefault((operation, what), []).append(whole)

    for layer in cache["layers"]:
        if cache["recompute"]:
            add("layer", "x", layer[0])
            continue
        for name, parts in layer.items():
            operation = name.rsplit(".", 1)[-1]
            kind = "linear" if operation in linears else operation if operation in _PARTS else _norm(config)
            for what, part in zip(_PARTS[kind], parts, strict=False):
                if what is not None:
                    add(operation, what, part)
    add("rope", "cos, sin", cache["rope"])
    add("final norm", "x", cache["norm"])
    add("head", "x", cache["head"])
    return kept


def _norm(config: Any) -> str:
    return "layernorm" if config.architecture.layernorm else "rmsnorm"


def _weights(model: Model) -> Iterator[Array]:
    for weight in (*model.params.values(), *(p for a in model.adapters.values() for p in a.params.values())):
        if isinstance(weight, QuantizedTensor):
            yield from (weight.packed, weight.absmax)
        else:
            yield weight


def _arrays(found: Any) -> Iterator[Array]:
    """The arrays in nested tuples and lists."""
    if isinstance(found, np.ndarray | Hollow):
        yield found
    elif isinstance(found, tuple | list) and not isinstance(found, LoRA):
        for part in found:
            yield from _arrays(part)


def base(array: Array) -> Array:
    """What holds the array's bytes: itself, or what it is a view of; for hollow arrays, the buffer."""
    if isinstance(array, Hollow):
        return array.buffer
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
