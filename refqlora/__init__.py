"""LoRA and QLoRA in plain NumPy: read them in an afternoon, trust them to the bit.

    import refqlora as rq

    model = rq.Model.from_pretrained(rq.BUNDLED, quantize="nf4")
    model.add_adapter(rank=16, alpha=32)
    logits, cache = model.forward(tokens)                # tokens (B, T)
    loss, dlogits = rq.cross_entropy(logits, labels)     # labels (B, T), -100: does not count
    grads = model.backward(dlogits, cache)
    model.save_adapter("out")

Begin with minimal.py, QLoRA on one page. Then the engine, from the ground up: every file at the top of this package.

    backend, checks, reprs                                    NumPy or CuPy, input checked, tables in notebooks
    codebooks, blockwise, quantization, quantization_error    4 bits
    bits                                                      where each of them goes
    functional, attention, rope, lora                         the operations, each forward beside its backward
    architectures, config, patterns, lora_config              which parts a model has, and which of them adapters sit on
    adapters, adapter_sums                                    adapters made, put onto a model, combined
    kv_cache, layer, lm_head, decoder                         a whole decoder
    model, optim, resume, training                            the front door, and training

The rest of the package surrounds the engine, a folder each: files, text, memory, parity, figures,
notebooks, commands.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Adapter
    from .codebooks import NF4, normal_float
    from .config import Config
    from .files.hub import BUNDLED
    from .functional import cross_entropy
    from .lora import merge
    from .lora_config import LoraConfig
    from .model import Model
    from .optim import AdamW, clip_by_global_norm
    from .quantization import QuantizedTensor, dequantize, quantize
    from .text.generation import complete, generate
    from .training import TrainingConfig, train

__version__ = "0.3.0"
__all__ = [
    "BUNDLED",
    "NF4",
    "AdamW",
    "Adapter",
    "Config",
    "LoraConfig",
    "Model",
    "QuantizedTensor",
    "TrainingConfig",
    "clip_by_global_norm",
    "complete",
    "cross_entropy",
    "dequantize",
    "generate",
    "merge",
    "normal_float",
    "quantize",
    "train",
]

_HOME = {  # the file of each public name, loaded when the name is first used
    "adapters": ["Adapter"],
    "codebooks": ["NF4", "normal_float"],
    "config": ["Config"],
    "files.hub": ["BUNDLED"],
    "functional": ["cross_entropy"],
    "lora": ["merge"],
    "lora_config": ["LoraConfig"],
    "model": ["Model"],
    "optim": ["AdamW", "clip_by_global_norm"],
    "quantization": ["QuantizedTensor", "dequantize", "quantize"],
    "text.generation": ["complete", "generate"],
    "training": ["TrainingConfig", "train"],
}


def __getattr__(name: str) -> Any:
    for file, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{file}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
