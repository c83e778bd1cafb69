"""The front door: a model's parameters and adapters, its files, and its forward and backward (by decoder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adapter_sums import as_lora, combine_adapters
from .adapters import Adapter, adapter_from_file, new_adapter
from .backend import Array
from .blockwise import QUANTIZABLE
from .checks import SEED, SWITCH, TEXT, as_dtype, as_path, check, check_array, check_mapping, one_of, shown
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

    With an active adapter the base is frozen, and only the adapter's arrays have gradients. Without one every parameter
    is trained (pretraining, full fine-tuning), which is not possible for a quantised base.

        >>> model = rq.Model.from_pretrained(rq.BUNDLED, quantize="nf4")
        >>> model.add_adapter(rank=4)
        >>> logits, cache = model.forward(np.array([[1, 2, 3]]))
        >>> loss, dlogits = rq.cross_entropy(logits, np.array([[2, 3, -100]]))
        >>> grads = model.backward(dlogits, cache)
        >>> grads["model.layers.0.self_attn.q_proj.lora_B.weight"].shape
        (192, 4)
    """

    def __init__(self, config: Config, params: dict[str, Weight], dtype: Any = None) -> None:
        """params: {name: weight}, with the names and shapes of `config.shapes()`. dtype: everything is computed in it,
        float32 or float64 (None: the embedding's if that is float64, else float32); params of another dtype are cast
        where they are used. Raises ValueError for any other dtype, names or shapes."""
        check_shapes(params, config.shapes(), "the model")
        self.config = config
        self.params = params
        if dtype is None:
            held = params[config.architecture.embedding + ".weight"].dtype
            dtype = np.float64 if held == np.float64 else np.float32
        self.dtype = as_dtype("dtype", dtype, (np.float32, np.float64))
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.directory: Path | None = None  # where the model was loaded from: its tokenizer is there

    def facts(self) -> dict[str, Any]:
        """Its architecture and size, and what is quantised, as it shows itself in a notebook."""
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
        """A new model with random weights: normal with std 0.02, divided by sqrt(2 * layers) for the two projections
        that add to the residual stream (Radford et al. 2019, section 2.3); norms 1, biases 0."""
        check("seed", seed, SEED)
        dtype = as_dtype("dtype", dtype, QUANTIZABLE)
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
        """Load a Hugging Face model from a directory (config.json and safetensors: floats, or bitsandbytes' 4 bits), or
        from the hub by its id (files/hub.py).

        Everything is computed in `dtype`, and weights are held in it. With `quantize`, "nf4", "fp4" or "int4", the
        base is frozen: each linear's weight is double-quantised as it is read. Embedding and output head keep the 16
        bits of the file, if it has 16, and are cast where they are used. A bitsandbytes checkpoint is frozen as well,
        with the bits of the file; for it, `quantize` may only be its own type. Tensors are read one at a time: beside
        what is kept, memory holds at most the largest tensor of the file.

        adapters: {name: the directory of a PEFT adapter, or the LoraConfig of a new one, drawn from `seed`}. The last
        one is active. PiSSA and OLoRA start from the dense weights: with one of them, the base is read dense and
        quantised afterwards.

        The end tokens are those of generation_config.json, if it names any. Raises ValueError or FileNotFoundError
        naming what is missing, unexpected, misshapen, not finite or not supported.
        """
        dtype = as_dtype("dtype", dtype, (np.float32, np.float64))
        check("seed", seed, SEED)
        check_mapping("adapters", adapters or {})
        directory, given = model_directory(as_path("path", path)), adapters or {}
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
        """The tokenizer in the model's directory, read when first used. Raises FileNotFoundError or ValueError if there
        is none."""
        from .text.tokenizer import load_tokenizer

        if self.directory is None:
            raise ValueError("the model has no tokenizer, as it was not read from a directory: give one")
        return load_tokenizer(self.directory, self.config.vocab_size)

    def save_pretrained(self, path: str | Path, dtype: Any = np.float32, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights, without adapters: model.safetensors, or shards of at most `max_shard_size`
        (bytes, or text such as "500MB") and their index. Dense weights are written in `dtype`, quantised ones as
        bitsandbytes writes them (ValueError for a codebook that it does not know)."""
        pretrained.save(as_path("path", path), self.config, self.params, dtype, max_shard_size)

    def quantize(self, kind: str = "nf4", **options: Any) -> None:
        """Quantise each linear's weight to "nf4", "fp4" or "int4" in place, and so the residuals of PiSSA and OLoRA
        adapters. options: those of `rq.quantize`. What is quantised already stays as it is."""
        check("kind", kind, one_of(list(CODEBOOKS)))
        linears = {name + ".weight" for name in self.config.linears()}
        for weights in (self.params, *(adapter.residual for adapter in self.adapters.values())):
            for name, weight in weights.items():
                if name in linears and not isinstance(weight, QuantizedTensor):
                    weights[name] = to_4_bits(weight, CODEBOOKS[kind], name=name, **options)

    # ---- adapters ----

    def add_adapter(self, name: str = "default", *, seed: int = 0, **options: Any) -> None:
        """Put a new adapter on the linears that `targets` names, and make it the active one.

        options: the fields of LoraConfig (rank, alpha, targets, dora, init, ...). The logits do not change until it is
        trained. `init="pissa"` decomposes the dense weight, so quantise afterwards.
        """
        check("seed", seed, SEED)
        self._adopt(name, new_adapter(LoraConfig(**options), self.params, self.config.linears(), self.dtype, seed))

    def combine_adapters(
        self, factors: Mapping[str, float], name: str, method: str = "cat", rank: int | None = None
    ) -> None:
        """Combine adapters, each times its factor, into a new one, and make it the active one: see adapter_sums.py.

        model.combine_adapters({"a": 0.7, "b": 0.3}, name="c")
        """
        parts = {self._known(one): self.adapters[one] for one in factors}
        self._adopt(name, combine_adapters(parts, factors, method, rank))

    def load_adapter(self, path: str | Path, name: str = "default") -> None:
        """Read a PEFT adapter from a directory and make it the active one. Raises ValueError or FileNotFoundError if it
        does not fit this model exactly, or is not there."""
        path = as_path("path", path)
        config, params = adapter_files.load_adapter(path, self.config.architecture.conv1d)
        linears = self.config.linears()
        self._adopt(name, adapter_from_file(config, params, self.params, linears, self.dtype, str(path)))

    def save_adapter(
        self, path: str | Path, name: str | None = None, base: str = "", plain: bool | None = None
    ) -> None:
        """Write an adapter (the active one unless named) as PEFT's two files into the directory `path`.

        base: the name of the base model to record. plain: write PiSSA or OLoRA as plain LoRA of twice the rank
        (adapter_sums.as_lora); None: only pissa_niter_N, whose start is random, so that the files cannot describe it.
        """
        path = as_path("path", path)
        check("base", base, TEXT)
        if plain is not None:
            check("plain", plain, SWITCH)
        adapter = self.adapters[self._known(self.active if name is None else name)]
        if plain or (plain is None and adapter.config.init.startswith("pissa_niter")):
            adapter = as_lora(adapter)
        conv1d = self.config.architecture.conv1d
        adapter_files.save_adapter(path, adapter.config, adapter.params, base, conv1d)

    def set_adapter(self, name: str | None) -> None:
        """Make the adapter `name` the active one. None turns adapters off: the logits are the base's, to the bit."""
        self.active = None if name is None else self._known(name)

    def _adopt(self, name: str, adapter: Adapter) -> None:
        check("name", name, TEXT)
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        self.adapters[name] = adapter
        self.active = name

    def _known(self, name: str | None) -> str:
        if not isinstance(name, str) or name not in self.adapters:
            raise ValueError(f"no adapter {shown(name)}; there are: {', '.join(map(repr, self.adapters)) or 'none'}")
        return name

    def trainable(self) -> dict[str, Array]:
        """The parameters that `backward` computes gradients for: the active adapter's, or the base's without one.
        Raises ValueError without one if the base is quantised."""
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
        active adapter. Raises ValueError for tokens of another shape or outside the vocabulary, and for more positions
        than `kv` can take or, where they are learned, the model has."""
        tokens = self._checked(tokens, rng, recompute, kv)
        adapter = None if self.active is None else self.adapters[self.active]
        return decoder_forward(
            self.config, self.params, tokens, self.dtype, adapter, rng=rng, recompute=recompute, kv=kv
        )

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        """dlogits (B, T, V) -> {name: gradient} of every parameter in `trainable()`.

        The cache is that of a `forward` without kv and with the same active adapter. It can be used once. Raises
        ValueError for a cache of another adapter or one that was used before.
        """
        wanted = self.trainable()
        if cache["adapter"] is not (None if self.active is None else self.adapters[self.active]):
            raise ValueError("backward: the cache is that of a forward with another adapter than the active one")
        if len(cache["layers"]) != self.config.layers:
            raise ValueError("backward: the cache was used before: call forward again")
        check_array("dlogits", dlogits, "f", cache["shape"])
        grads = decoder_backward(self.config, self.params, dlogits, cache)
        return {name: grads[name] for name in wanted}

    def _checked(self, tokens: Any, rng: np.random.Generator | None, recompute: bool, kv: KVCache | None) -> Array:
        tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers of shape (B, T), got {tokens.dtype} of shape {tokens.shape}")
        if tokens.size == 0:
            raise ValueError(f"tokens: expected one or more, got shape {tokens.shape}")
        low, high, config = int(tokens.min()), int(tokens.max()), self.config
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"tokens: {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
        for name, value, kind in (("rng", rng, np.random.Generator), ("kv", kv, KVCache)):
            if not isinstance(value, kind | None):
                raise ValueError(f"{name}: expected a {kind.__name__} or None, got {shown(value)}")
        if recompute and kv is not None:
            raise ValueError("recompute: expected only without kv: it computes a layer again from its input alone")
        start = 0 if kv is None else kv.length
        length = start + tokens.shape[1]
        if start and config.rope_regime(length) != config.rope_regime(start):
            raise ValueError(
                f"kv: RoPE's frequencies change at {length} positions, so the {start} cached keys no longer fit"
            )
        if config.architecture.positions and length > config.max_positions:
            raise ValueError(f"tokens: expected at most {config.max_positions} positions, got {length}")
        return tokens
