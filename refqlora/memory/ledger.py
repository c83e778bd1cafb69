"""Bytes by category: the one list of categories, and what of it a model, its gradients and its optimiser hold.

Everything here counts arrays by their shapes, NumPy's as well as hollow ones (hollow.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..backend import Array
from ..config import Config
from ..model import Model
from ..optim import AdamW
from ..quantization import QuantizedTensor

CATEGORIES = {
    "embeddings": "the embedding of the tokens, and of the positions where they are learned",
    "codes": "the linears' 4-bit codes",
    "constants": "their constants: 8 bits a block, and 32 bits a block of those; or 32 bits a block",
    "linears": "the linears that are not quantised, and all biases",
    "norms": "the norms' weights",
    "head": "the output head, unless it is the embedding",
    "adapter": "A and B, and DoRA's magnitudes",
    "optimizer": "AdamW's two moments of what is trained",
    "batch": "tokens and labels, eight bytes each",
    "gradients": "those of what is trained",
    "activations": "what the forward keeps for the backward",
    "recomputed": "a layer's activations, computed again in the backward",
    "attention": "scores and probabilities of a tile of queries, and what attention needs beside them",
    "logits": "logits, loss, and the gradient of the logits",
    "dequantised": "a weight that is dequantised for a product",
    "scratch": "all else that comes and goes: outputs on their way to the next operation, gradients of activations",
    "kv cache": "keys and values of the positions seen, in generation",
}
PERSISTENT = ("embeddings", "codes", "constants", "linears", "norms", "head", "adapter", "optimizer", "batch")


@dataclass(frozen=True)
class Entry:
    """A line of a ledger: what is held, the formula of its bytes in the symbols of functional.py's legend, the formula
    with the numbers put in, and the bytes."""

    category: str
    what: str
    formula: str
    numbers: str
    nbytes: int


@dataclass(frozen=True)
class Ledger:
    """The bytes of a training step by category.

    entries: what is held all the time, what a step keeps, and what else there is at the peak. peak: the most that is
    held at once, in bytes. at_peak: {category: bytes} at that moment, which add up to it.
    """

    entries: tuple[Entry, ...]
    peak: int
    at_peak: Mapping[str, int] = field(default_factory=dict)

    def bytes(self) -> dict[str, int]:
        """{category: the bytes of its entries}, in the order of CATEGORIES."""
        sums = {category: 0 for category in CATEGORIES}
        for entry in self.entries:
            sums[entry.category] += entry.nbytes
        return {category: n for category, n in sums.items() if n}

    @property
    def persistent(self) -> int:
        """What is held between two steps."""
        return sum(n for category, n in self.bytes().items() if category in PERSISTENT)


def weight_category(config: Config, name: str) -> str:
    """The category of a parameter that is not quantised."""
    a = config.architecture
    if name in (a.embedding + ".weight", f"{a.positions}.weight"):
        return "embeddings"
    if name == config.head:
        return "head"
    return "linears" if name.rpartition(".")[0] in config.linears() else "norms"


def weight_bytes(model: Model) -> dict[str, int]:
    """{category: bytes} of a model's weights and of its adapters, the residual weights of PiSSA and OLoRA among them."""
    sums = dict.fromkeys(PERSISTENT, 0)
    adapters = model.adapters.values()
    for name, weight in (*model.params.items(), *(pair for a in adapters for pair in a.residual.items())):
        if isinstance(weight, QuantizedTensor):
            sums["codes"] += weight.packed.nbytes
            sums["constants"] += weight.constants_nbytes
        else:
            sums[weight_category(model.config, name)] += weight.nbytes
    sums["adapter"] = sum(_size(adapter.params.values()) for adapter in adapters)
    return {category: n for category, n in sums.items() if n}


def training_bytes(model: Model, grads: Mapping[str, Array], optimizer: AdamW) -> dict[str, int]:
    """{category: bytes} of the arrays that a training run holds, without the activations, which come and go in each
    step; "total" is their sum."""
    parts = weight_bytes(model) | {"optimizer": optimizer.nbytes, "gradients": _size(grads.values())}
    return {**parts, "total": sum(parts.values())}


def _size(arrays: Iterable[Array]) -> int:
    return sum(x.nbytes for x in arrays)
