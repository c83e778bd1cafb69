"""LoRA and QLoRA in plain NumPy: read them in an afternoon, trust them to the bit.

    import refqlora as rq

    model = rq.Model.from_pretrained("path/to/llama", quantize="nf4")
    model.add_adapter(rank=16, alpha=32)
    logits, cache = model.forward(tokens)                # tokens (B, T)
    loss, dlogits = rq.cross_entropy(logits, labels)     # labels (B, T), -100 where none counts
    grads = model.backward(dlogits, cache)
    model.save_adapter("out")

The engine, from the ground up: codebooks, functional, attention, quantize, lora, optim, layer, adapters, model,
training.
"""

from .checkpoint import BUNDLED
from .codebooks import NF4, normal_float
from .config import Config
from .functional import cross_entropy
from .generation import generate
from .lora import merge
from .lora_config import LoraConfig
from .model import Model
from .optim import AdamW, clip_by_global_norm
from .quantize import QuantizedTensor, dequantize, quantize
from .training import TrainingConfig, train

__version__ = "0.1.0"
__all__ = [
    "BUNDLED",
    "NF4",
    "AdamW",
    "Config",
    "LoraConfig",
    "Model",
    "QuantizedTensor",
    "TrainingConfig",
    "clip_by_global_norm",
    "cross_entropy",
    "dequantize",
    "generate",
    "merge",
    "normal_float",
    "quantize",
    "train",
]
