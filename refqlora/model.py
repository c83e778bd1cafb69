"""The front door: a model's parameters and adapters, its files in and out, and forward and backward by decoder.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adapter_sums import as_lora, combine_adapters
from .adapters import Adapter, adapter_from_file, new_adapter
from .backend import Array
from .codebooks import CODEBOOKS
from .config import Config, check_shapes
from .decoder import decoder_backward, decoder_forward
from .files import adapter_files, pretrained
from .files.hub import model_directory
from .kv_cache import KVCache
from .lora import Weight
from .lora_config import LoraConfig
from .quantization import QuantizedTensor
from .quantization import quantize as to_4_bits  # `quantize` is an option's name here
from .reprs import facts_html

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Model:
    """A decoder: `config`, the base's `params`, and named `adapters` of which at most one is `active`.

    With an adapter active, the base is frozen and only A and B have gradients; with none, every parameter is
    trained (pretraining, full fine-tuning), which a quantised base cannot be.
    """

    def __init__(self, config: Config, params: dict[str, Weight], dtype: Any = None) -> None:
        """dtype: of all computation, float32 or float64 (None: float64 if the embedding is, else float32); params of
        another dtype are cast to it where they are used. Raises ValueError for another dtype, and for params that are
        not those of `config.shapes()`."""
        check_shapes(params, config.shapes(), "the model")
        self.config = config
        self.params = params
        held = params[config.architecture.embedding + ".weight"].dtype
        self.dtype = np.dtype(dtype or (np.float64 if held == np.float64 else np.float32))
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {self.dtype}")
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.directory: Path | None = None  # where the model was loaded from: its tokenizer is there

    def facts(self) -> dict[str, Any]:
        """What a person wants to know of it: its shape and size, what is quantised, and its adapters."""
        config, linears = self.config, [self.params[name + ".weight"] for name in self.config.linears()]
        kinds = sorted({w.kind for w in linears if isinstance(w, QuantizedTensor)})
        quantized = sum(isinstance(w, QuantizedTensor) for w in linears)
        return {
            "architecture": config.model_type,
            "layers": config.layers,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            "parameters": sum(p.size for p in self.params.values()),
            "bytes": sum(p.nbytes for p in self.params.values()),
            "linears": f"{len(linears)}, of which {quantized} in {' and '.join(kinds) or '4 bits'}",
            "computed in": str(self.dtype),
        }

    def __repr__(self) -> str:
        shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in self.facts().items()}
        facts = [f"{name} {value}" for name, value in shown.items()]
        lines = [f"Model({'; '.join(facts)})"]
        lines += [
            f"  {'*' if name == self.active else ' '} {name!r}: {adapter}" for name, adapter in self.adapters.items()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        adapters = {
            f"adapter {name!r}{', active' if name == self.active else ''}": repr(adapter)
            for name, adapter in self.adapters.items()
        }
        return facts_html("Model", self.facts() | adapters)

    # ---- in and out ----

    @classmethod
    def from_config(cls, config: Config, seed: int = 0, dtype: Any = np.float32) -> Model:
        """A new model with random weights: normal with std 0.02, the two projections that write into the residual
        stream smaller by sqrt(2 * layers) (Radford et al. 2019, section 2.3), norms 1, biases 0."""
        rng, a = np.random.default_rng(seed), config.architecture
        params: dict[str, Weight] = {}
        for name, shape in config.shapes().items():
            if len(shape) == 1:
                zero = name.endswith("bias") or a.norm_of_one_plus
                params[name] = np.full(shape, 0 if zero else 1, dtype)
            else:
                residual = name.endswith((a.attention_out + ".weight", a.mlp_out + ".weight"))
                std = 0.02 / (2 * config.layers) ** 0.5 if residual else 0.02
                params[name] = (rng.standard_normal(shape) * std).astype(dtype)
        return cls(config, params)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        quantize: str | None = None,
        dtype: Any = np.float32,
        adapters: Mapping[str, str | Path | LoraConfig] | None = None,
        seed: int = 0,
    ) -> Model:
        """Load a Hugging Face model: a directory (config.json, safetensors of floats, or bitsandbytes' in 4 bits), or a
        hub's id: see hub.py.

        Everything is computed in `dtype`, and weights are held in it. With `quantize`, "nf4", "fp4" or "int4", the
        base is frozen: each linear's weight is double-quantised as it is read; embedding and output head stay in the
        file's 16 bits, where it has 16, and are cast where they are used. A checkpoint of bitsandbytes is frozen
        likewise, with the bits of the file, and `quantize` can ask for its own type only. Tensors come one at a time:
        memory holds at most the largest, as the file has it, beside what is kept.

        adapters: by name, the directory of a PEFT adapter, or the LoraConfig of a new one, which starts from `seed`.
        The last one is active. PiSSA and OLoRA take the dense weights apart: with one of them, the base is read dense
        and quantised after that.

        The end tokens are those of generation_config.json where it names any. Raises ValueError or FileNotFoundError
        naming what is missing, unexpected, misshapen, not finite or not supported.
        """
        directory, given = model_directory(path), adapters or {}
        configs = (one if isinstance(one, LoraConfig) else adapter_files.read_config(one) for one in given.values())
        late = any(config.changes_base for config in configs)
        model = cls(*pretrained.load(directory, None if late else quantize, dtype), dtype)
        model.directory = directory
        for name, one in given.items():
            if isinstance(one, LoraConfig):
                model._adopt(name, new_adapter(one, model.params, model.config.linears(), model.dtype, seed))
            else:
                model.load_adapter(one, name)
        if late and quantize is not None:
            model.quantize(quantize)
        return model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's directory, read when it is first asked for. Raises FileNotFoundError or
        ValueError where there is none."""
        from .text.tokenizer import load_tokenizer

        if self.directory is None:
            raise ValueError("the model has no tokenizer, as it was not read from a directory: give one")
        return load_tokenizer(self.directory, self.config.vocab_size)

    def save_pretrained(self, path: str | Path, dtype: Any = np.float32, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights, without adapters: model.safetensors, or shards of at most `max_shard_size`
        (bytes, or text such as "500MB") and their index. Dense weights are written in `dtype`, quantised ones as
        bitsandbytes writes them (ValueError for a codebook that it does not have)."""
        pretrained.save(path, self.config, self.params, dtype, max_shard_size)

    def quantize(self, kind: str = "nf4", **options: Any) -> None:
        """Replace each linear's weight by its quantisation to "nf4", "fp4" or "int4", in place (`options`: those of
        `quantize`); also those that PiSSA and OLoRA adapters have in their stead. What is quantised already stays."""
        if kind not in CODEBOOKS:
            raise ValueError(f"quantize must be one of {', '.join(CODEBOOKS)}, not {kind!r}")
        linears = {name + ".weight" for name in self.config.linears()}
        for weights in (self.params, *(adapter.residual for adapter in self.adapters.values())):
            for name, weight in weights.items():
                if name in linears and not isinstance(weight, QuantizedTensor):
                    weights[name] = to_4_bits(weight, CODEBOOKS[kind], name=name, **options)

    # ---- adapters ----

    def add_adapter(self, name: str = "default", *, seed: int = 0, **options: Any) -> None:
        """Put a new adapter on the linears that `targets` names, and make it the active one.

        options: the fields of LoraConfig (rank, alpha, targets, dora, init, ...). The logits stay what they were until
        it is trained. `init="pissa"` takes the dense weight apart: quantise after it.
        """
        self._adopt(name, new_adapter(LoraConfig(**options), self.params, self.config.linears(), self.dtype, seed))

    def combine_adapters(
        self, factors: Mapping[str, float], name: str, method: str = "cat", rank: int | None = None
    ) -> None:
        """Combine adapters, each times its factor, into a new one, and make it the active one: see adapter_sums.py.
        model.combine_adapters({"a": 0.7, "b": 0.3}, name="c")"""
        parts = {self._known(one): self.adapters[one] for one in factors}
        self._adopt(name, combine_adapters(parts, factors, method, rank))

    def load_adapter(self, path: str | Path, name: str = "default") -> None:
        """Read a PEFT adapter, check that it fits this model exactly, and make it the active one."""
        config, params = adapter_files.load_adapter(Path(path), self.config.architecture.conv1d)
        linears = self.config.linears()
        self._adopt(name, adapter_from_file(config, params, self.params, linears, self.dtype, str(path)))

    def save_adapter(
        self, path: str | Path, name: str | None = None, base: str = "", plain: bool | None = None
    ) -> None:
        """Write an adapter (the active one unless named) as PEFT's two files into the directory `path`.

        plain: write PiSSA or OLoRA as the LoRA of twice the rank that it is equal to (adapter_sums.as_lora). None: only
        where the file could not say what the adapter sits on (pissa_niter_N).
        """
        adapter = self.adapters[self._known(name or self.active)]
        if plain or (plain is None and adapter.config.init.startswith("pissa_niter")):
            adapter = as_lora(adapter)
        conv1d = self.config.architecture.conv1d
        adapter_files.save_adapter(Path(path), adapter.config, adapter.params, base, conv1d)

    def set_adapter(self, name: str | None) -> None:
        """Make the adapter `name` the active one; None turns adapters off: the base's own logits, to the bit."""
        self.active = None if name is None else self._known(name)

    def _adopt(self, name: str, adapter: Adapter) -> None:
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        self.adapters[name] = adapter
        self.active = name

    def _known(self, name: str | None) -> str:
        if name is None or name not in self.adapters:
            raise ValueError(f"no adapter {name!r}; there are: {', '.join(map(repr, self.adapters)) or 'none'}")
        return name

    def trainable(self) -> dict[str, Array]:
        """The parameters that `backward` gives gradients for: the active adapter's, or all of a dense base's."""
        if self.active is not None:
            return self.adapters[self.active].params
        for name, param in self.params.items():
            if isinstance(param, QuantizedTensor):
                raise ValueError(f"{name} is quantised and no adapter is active: there is nothing to train")
        return self.params

    # ---- forward and backward ----

    def forward(
        self,
        tokens: Array,
        *,
        rng: np.random.Generator | None = None,
        recompute: bool = False,
        kv: KVCache | None = None,
    ) -> tuple[Array, dict]:
        """tokens (B, T) integers -> logits (B, T, V), cache: `decoder_forward`, which explains the options, with the
        active adapter. Raises ValueError for tokens that are not of that shape or outside the vocabulary, and for
        positions that the model cannot take."""
        tokens = self._checked(tokens, recompute, kv)
        adapter = None if self.active is None else self.adapters[self.active]
        return decoder_forward(
            self.config, self.params, tokens, self.dtype, adapter, rng=rng, recompute=recompute, kv=kv
        )

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        """dlogits (B, T, V) -> the gradient of every parameter in `trainable()`, by its name.

        The cache is that of a `forward` with the same adapter active and without kv, and serves once. Raises ValueError
        otherwise.
        """
        wanted = self.trainable()
        if cache["adapter"] is not (None if self.active is None else self.adapters[self.active]):
            raise ValueError("backward: the cache is of a forward with another adapter than the one that is active now")
        if len(cache["layers"]) != self.config.layers:
            raise ValueError("backward: the cache has served already: call forward again")
        grads = decoder_backward(self.config, self.params, dlogits, cache)
        return {name: grads[name] for name in wanted}

    def _checked(self, tokens: Any, recompute: bool, kv: KVCache | None) -> Array:
        tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers of shape (B, T), got {tokens.dtype} of shape {tokens.shape}")
        if tokens.size == 0:
            raise ValueError(f"tokens: expected one or more, got shape {tokens.shape}")
        low, high, config = int(tokens.min()), int(tokens.max()), self.config
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"tokens: {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
        if recompute and kv is not None:
            raise ValueError("recompute does not go with kv: it computes a layer again from its input alone")
        start = 0 if kv is None else kv.length
        length = start + tokens.shape[1]
        if start and config.rope_regime(length) != config.rope_regime(start):
            raise ValueError(
                f"at {length} positions RoPE's frequencies change, and the {start} cached keys must be made anew"
            )
        if config.architecture.positions and length > config.max_positions:
            raise ValueError(f"{length} positions, but the model has learned {config.max_positions}")
        return tokens
