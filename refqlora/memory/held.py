"""Bytes, by category, of the arrays that a training step holds."""

from __future__ import annotations

from collections.abc import Mapping

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
