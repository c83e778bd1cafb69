"""The bytes of arrays that are held: by a model, by a training run, and by a forward for its backward.

Arrays are counted by their shapes, NumPy's as well as hollow ones (hollow.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..backend import Array
from ..config import Config
from ..model import Model
from ..optim import AdamW
from ..quantization import QuantizedTensor
from .ledger import PERSISTENT


def weight_category(config: Config, name: str) -> str:
    """The category of a parameter that is not quantised."""
    a = config.architecture
    if name in (a.embedding + ".weight", f"{a.positions}.weight"):
        return "embeddings"
    if name == config.head:
        return "head"
    return "linears" if name.rpartition(".")[0] in config.linears() else "norms"


def weight_bytes(model: Model) -> dict[str, int]:
    """{category: bytes} of a model's weights and adapters, the residual weights of PiSSA and OLoRA among them."""
    sums, adapters = dict.fromkeys(PERSISTENT, 0), model.adapters.values()
    for name, weight in (*model.params.items(), *(pair for a in adapters for pair in a.residual.items())):
        if isinstance(weight, QuantizedTensor):
            sums["codes"] += weight.packed.nbytes
            sums["constants"] += weight.constants_nbytes
        else:
            sums[weight_category(model.config, name)] += weight.nbytes
    sums["adapter"] = sum(_size(adapter.params.values()) for adapter in adapters)
    return {category: n for category, n in sums.items() if n}


def training_bytes(model: Model, grads: Mapping[str, Array], optimizer: AdamW) -> dict[str, int]:
    """{category: bytes} of what a training run holds, without the activations, which come and go in each step; "total"
    is their sum."""
    parts = weight_bytes(model) | {"optimizer": optimizer.nbytes, "gradients": _size(grads.values())}
    return {**parts, "total": sum(parts.values())}


def cache_bytes(model: Model, cache: Mapping[str, Any]) -> dict[str, int]:
    """{part: bytes} of what a forward keeps for its backward: `cache` is that of `model.forward`, or of one layer.

    Each array is counted once, in the first part that has it, and a view as the array that it views. The model's own
    weights and adapters are not counted: the cache only refers to them.
    """
    seen, parts = _own(model), {}
    for part, held in cache.items():
        parts[part] = _size(_new(held, seen))
    return parts


# What the tuples in a layer's cache hold, in their order.
_HOLDS = {
    "linear": ("x", "", "", "", "dropout's mask", "z = x A^T", "DoRA's v, norm"),
    "rmsnorm": ("x", "1 / rms", "1 + weight"),
    "layernorm": ("n", "1 / std", ""),
    "attention": ("q", "k", "v", "y", "logsumexp"),
    "activation": ("gate", "up"),
}


def kept(model: Model, cache: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a forward keeps for its backward, operation by operation: {"q_proj: x": its arrays, one a layer}; counted as
    in `cache_bytes`."""
    config, seen = model.config, _own(model)
    linears = {name.rpartition(".")[2] for name in config.linears()}
    norm = "layernorm" if config.architecture.layernorm else "rmsnorm"
    found: dict[str, list[Any]] = {}
    for layer in cache["layers"]:
        if cache["recompute"]:
            found.setdefault("each layer: x", []).extend(_new(layer[0], seen))
            continue
        for name, held in layer.items():
            operation = name.rpartition(".")[2]
            kind = "linear" if operation in linears else operation if operation in _HOLDS else norm
            for what, part in zip(_HOLDS[kind], held, strict=False):
                found.setdefault(f"{operation}: {what}", []).extend(_new(part, seen))
    for name in ("rope", "norm", "head", "softcap"):
        found[f"{name}, after the layers" if name != "rope" else "rope: cos, sin"] = _new(cache[name], seen)
    return {what: arrays for what, arrays in found.items() if arrays}


def _own(model: Model) -> set[int]:
    """The identities of the model's arrays."""
    adapters = model.adapters.values()
    return {id(a) for a in _arrays([model.params, *(a.params for a in adapters), *(a.residual for a in adapters)])}


def _new(held: Any, seen: set[int]) -> list[Any]:
    """The arrays in `held` that have not been seen, which they now are."""
    new = {id(array): array for array in _arrays(held) if id(array) not in seen}
    seen |= set(new)
    return list(new.values())


def _arrays(held: Any) -> Iterator[Any]:
    """The arrays and quantised tensors in nested tuples, lists and dicts; for a view, what it is a view of."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, list | tuple):
        for one in held:
            yield from _arrays(one)
    elif hasattr(held, "nbytes"):
        held = getattr(held, "buffer", held)  # of a hollow array, what it shares with its views
        while hasattr(getattr(held, "base", None), "nbytes"):
            held = held.base
        yield held


def _size(arrays: Iterable[Any]) -> int:
    return sum(x.nbytes for x in arrays)
