"""Files that we write, read by transformers, PEFT and bitsandbytes.

Every comparison in decoders.py tests the other direction, files written by them and read here. These checks need the
libraries, so they cannot be recorded. Our tensors and logits are observed under ours/, the libraries' under theirs/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..files.config_json import config_from_dict
from ..model import Model
from ..quantization import QuantizedTensor, dequantize
from .decoders import group
from .differences import Observed, Outcome, differing, relative_difference
from .settings import LORA, batch, sizes, sizes_4bit


def _llama(seed: int, weights: dict[str, Any]) -> Model:
    """A Llama of random weights, with an adapter whose B is not zero."""
    model = Model.from_config(config_from_dict({"model_type": "llama"} | weights), seed)
    rng = np.random.default_rng(seed)
    for name, p in model.params.items():
        model.params[name] = (p + rng.standard_normal(p.shape) * p.shape[-1] ** -0.5).astype(np.float32)
    model.add_adapter(rank=LORA["r"], alpha=LORA["lora_alpha"], seed=seed)
    for name, p in model.trainable().items():
        if "lora_B" in name:
            p[...] = rng.standard_normal(p.shape) * 0.1
    return model


def observe_model_files(seed: int, size: int) -> Observed:
    """A Llama that we save, loaded by transformers."""
    from . import oracles

    ours = _llama(seed, sizes(size))
    ours.set_adapter(None)
    with TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs = oracles.load_strictly(directory)
    return _observed(ours, ours.params, oracles.arrays(list(theirs.named_parameters())), theirs, seed)


def observe_adapter_files(seed: int, size: int) -> Observed:
    """An adapter that we save, loaded by PEFT."""
    from . import oracles

    ours = _llama(seed, sizes(size))
    with TemporaryDirectory() as name:
        directory = Path(name)
        ours.save_pretrained(directory / "base")
        ours.save_adapter(directory / "adapter", base=str(directory / "base"))
        theirs = oracles.load_adapter_strictly(oracles.load_strictly(directory / "base"), directory / "adapter")
    return _observed(ours, ours.trainable(), oracles.arrays(oracles.trained(theirs)), theirs, seed)


def observe_4bit_files(seed: int, size: int) -> Observed:
    """A double-quantised Llama that we save as bitsandbytes does, loaded by transformers: the weights dequantised."""
    from . import oracles

    ours = _llama(seed, sizes_4bit(size))
    ours.set_adapter(None)
    ours.quantize()
    with TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs = oracles.load_strictly(directory)
        theirs.train()  # in eval mode bitsandbytes may compute in bfloat16
    weights = {name: dequantize(p) for name, p in ours.params.items() if isinstance(p, QuantizedTensor)}
    return _observed(ours, weights, oracles.dequantised(theirs), theirs, seed)


def _observed(ours: Model, mine: Mapping[str, Any], found: dict[str, np.ndarray], theirs: Any, seed: int) -> Observed:
    from . import oracles

    tokens, _ = batch(seed, ours.config.vocab_size)
    return {
        **{f"ours/{name}": p for name, p in mine.items()},
        **{f"theirs/{name}": p for name, p in found.items()},
        "ours/logits": ours.forward(tokens)[0],
        "theirs/logits": oracles.logits_of(theirs, tokens),
    }


def compare_exchange(observed: Observed) -> Outcome:
    """Each tensor to the bit; the logits up to rounding."""
    ours, theirs = group(observed, "ours"), group(observed, "theirs")
    if ours.keys() != theirs.keys():
        raise ValueError(f"{min(ours.keys() ^ theirs.keys())} is on one side only")
    parts = {"logits": relative_difference(ours.pop("logits"), theirs.pop("logits"))}
    parts[f"{len(ours)} tensors"] = float(sum(len(differing(x, theirs[name])) for name, x in ours.items()))
    return Outcome(parts, sum(x.size for x in ours.values()))
