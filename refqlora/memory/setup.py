"""What a training step is predicted or measured for: a model, how it is trained, and on how much at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..adapters import Adapter, adapter_shapes
from ..backend import Array
from ..checks import SWITCH, as_dtype, check, one_of, whole
from ..codebooks import NF4
from ..config import Config
from ..lora import Weight
from ..lora_config import LoraConfig
from ..model import Model
from ..optim import AdamW, clip_by_global_norm
from ..quantization import QuantizedTensor, quantize
from ..training import loss_and_gradients
from .hollow import as_hollow, hollow

METHODS = ("full", "lora", "qlora")
_COUNT = whole(1, 2**31 - 1)


@dataclass(frozen=True)
class Setup:
    """A training step: of the model `config`, on `batch` sequences of `seq` tokens.

    method: "full" fine-tuning, "lora" on dense weights, "qlora" on NF4. lora: the adapter's options, those of
    LoraConfig. double_quant: quantise the constants too. micro_batch: how many sequences go through the model at once
    (None: all). recompute: gradient checkpointing. dtype: float32 or float64, of weights that are not quantised and of
    all computation; embeddings_dtype: of embedding and output head (None: dtype; from a 16-bit file they stay in 16
    bits).

    Raises ValueError that begins with the field at fault.
    """

    config: Config
    method: str = "qlora"
    batch: int = 1
    seq: int = 512
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16))
    double_quant: bool = True
    micro_batch: int | None = None
    recompute: bool = False
    dtype: Any = np.float32
    embeddings_dtype: Any = None

    def __post_init__(self) -> None:
        check("method", self.method, one_of(METHODS))
        check("batch", self.batch, _COUNT)
        check("seq", self.seq, whole(1, self.config.max_positions) if self.config.architecture.positions else _COUNT)
        if self.micro_batch is not None:
            check("micro_batch", self.micro_batch, _COUNT)
        check("double_quant", self.double_quant, SWITCH)
        check("recompute", self.recompute, SWITCH)
        object.__setattr__(self, "dtype", as_dtype("dtype", self.dtype, (np.float32, np.float64)))

    def hollow_model(self) -> Model:
        """The model, with its adapter, in hollow arrays."""
        return self._model(hollow, self._hollow_4_bits)

    def real_model(self, seed: int = 0) -> Model:
        """The model, with its adapter, in random numbers: weights quantised one by one, as they are drawn."""
        rng = np.random.default_rng(seed)

        def draw(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) / 50).astype(dtype)

        def draw_4_bits(shape: tuple[int, ...]) -> QuantizedTensor:
            return quantize(draw(shape, np.float32), double_quant=self.double_quant)

        return self._model(draw, draw_4_bits)

    def _model(self, array: Callable[..., Array], four_bits: Callable[..., Weight]) -> Model:
        config = self.config
        linears = {name + ".weight" for name in config.linears()} if self.method == "qlora" else set()
        tables = (config.architecture.embedding + ".weight", config.head)
        params: dict[str, Weight] = {}
        for name, shape in config.shapes().items():
            dtype = self.embeddings_dtype or self.dtype if name in tables else self.dtype
            params[name] = four_bits(shape) if name in linears else array(shape, dtype)
        model = Model(config, params, self.dtype)
        if self.method != "full":
            shapes = adapter_shapes(self.lora, self.lora.matches(config.linears()), config.shapes())
            adapter = Adapter(self.lora, {name: array(shape, self.dtype) for name, shape in shapes.items()})
            model.adapters["default"], model.active = adapter, "default"
        return model

    def _hollow_4_bits(self, shape: tuple[int, ...]) -> QuantizedTensor:
        n = shape[0] * shape[1]
        blocks = -(-n // 64)
        packed, dtype = hollow((-(-n // 2),), np.uint8), np.dtype(np.float32)
        if not self.double_quant:
            return QuantizedTensor(packed, hollow((blocks,), np.float32), NF4, shape, 64, dtype)
        absmax, nested = hollow((blocks,), np.uint8), hollow((-(-blocks // 256),), np.float32)
        return QuantizedTensor(packed, absmax, NF4, shape, 64, dtype, nested, np.float32(0))

    def step(
        self, model: Model, optimizer: AdamW, tokens: Array, labels: Array, look: Callable[[dict], None] | None = None
    ) -> dict[str, Array]:
        """`take_step` as it is set up."""
        return take_step(model, optimizer, tokens, labels, self.micro_batch, self.recompute, look)


def take_step(
    model: Model,
    optimizer: AdamW,
    tokens: Array,
    labels: Array,
    micro_batch: int | None = None,
    recompute: bool = False,
    look: Callable[[dict], None] | None = None,
) -> dict[str, Array]:
    """One update, as in training: forward, loss, backward, clipping, AdamW; -> the gradients.

    look: called with the cache when the first forward is done and its loss known, before the backward.
    """
    if look is not None:
        model = _Watched.of(model, look)
    rng = np.random.default_rng(0)
    _, grads = loss_and_gradients(model, tokens, labels, micro_batch_size=micro_batch, rng=rng, recompute=recompute)
    clip_by_global_norm(grads, 1.0)
    optimizer.step(grads)
    return grads


def hollow_like(model: Model) -> Model:
    """The model with its adapters, each array hollow."""

    def like(weight: Any) -> Any:
        if isinstance(weight, QuantizedTensor):
            nested = None if weight.nested_absmax is None else as_hollow(weight.nested_absmax)
            return replace(
                weight, packed=as_hollow(weight.packed), absmax=as_hollow(weight.absmax), nested_absmax=nested
            )
        return as_hollow(weight)

    def all_like(weights: Mapping[str, Any]) -> dict[str, Any]:
        return {name: like(weight) for name, weight in weights.items()}

    copy = Model(model.config, all_like(model.params), model.dtype)
    for name, adapter in model.adapters.items():
        copy.adapters[name] = replace(adapter, params=all_like(adapter.params), residual=all_like(adapter.residual))
    copy.active = model.active
    return copy


class _Watched(Model):
    """A model that calls `look(cache)` before its first backward."""

    look: Callable[[dict], None] | None

    @classmethod
    def of(cls, model: Model, look: Callable[[dict], None]) -> _Watched:
        watched = cls.__new__(cls)
        watched.__dict__.update(model.__dict__, look=look)
        return watched

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        if self.look is not None:
            self.look(cache)
            self.look = None
        return super().backward(dlogits, cache)
