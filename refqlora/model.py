"""The decoder: its parameters and adapters, files in and out, and forward and backward through all layers.

Parameters are a plain dict by their Hugging Face names, adapters and gradients carry the same names. A Llama's:

    model.embed_tokens.weight                             (V, D)
    model.layers.0.input_layernorm.weight                 (D,)
    model.layers.0.self_attn.q_proj.weight                (H*h, D)     an array or a QuantizedTensor
    model.layers.0.self_attn.q_proj.lora_A.weight         (r, D)       in an adapter
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adapter_sums import add_adapters, as_lora
from .adapters import Adapter, new_adapter, placed
from .backend import Array, array_module
from .codebooks import CODEBOOKS
from .config import Config, check_shapes
from .files import adapter_files, pretrained
from .files.hub import model_directory
from .functional import embedding_backward, embedding_forward, softcap_backward, softcap_forward
from .kv_cache import KVCache
from .layer import layer_backward, layer_forward, norm_backward, norm_forward
from .lm_head import head_backward, head_forward
from .lora import LoRA, Weight
from .lora_config import LoraConfig
from .quantization import QuantizedTensor
from .quantization import quantize as to_4_bits  # `quantize` is an option's name here
from .rope import rope_frequencies, rope_tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Model:
    """A decoder: `config`, the base's `params`, and named `adapters` of which at most one is `active`.

    With an adapter active, the base is frozen and only A and B have gradients; with none, every parameter is
    trained (pretraining, full fine-tuning), which a quantised base cannot be.
    """

    def __init__(self, config: Config, params: dict[str, Weight], dtype: Any = None) -> None:
        """dtype: of all computation (None: the embedding's). 16-bit params are cast to it where they are used."""
        self.config = config
        self.params = params
        self.dtype = np.dtype(dtype or params[config.architecture.embedding + ".weight"].dtype)
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.directory: Path | None = None  # that it was read from
        check_shapes(params, config.shapes(), "the model")

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
    def from_pretrained(cls, path: str | Path, quantize: str | None = None, dtype: Any = np.float32) -> Model:
        """Load a Hugging Face model: a directory (config.json, safetensors of floats, or bitsandbytes' in 4 bits), or a
        hub's id: see hub.py.

        Everything is computed in `dtype`, and weights are held in it. With `quantize`, "nf4", "fp4" or "int4", the
        base is frozen: each linear's weight is double-quantised as it is read; embedding and output head stay in the
        file's 16 bits, where it has 16, and are cast where they are used. A checkpoint of bitsandbytes is frozen
        likewise, with the bits of the file, and `quantize` can ask for its own type only. Tensors come one at a time:
        memory holds at most the largest, as the file has it, beside what is kept.

        The end tokens are those of generation_config.json where it names any. Raises ValueError or FileNotFoundError
        naming what is missing, unexpected, misshapen, not finite or not supported.
        """
        directory = model_directory(path)
        model = cls(*pretrained.load(directory, quantize, dtype), dtype)
        model.directory = directory
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

    def add_adapters(self, factors: dict[str, float], name: str, method: str = "cat", rank: int | None = None) -> None:
        """Add adapters up, each times its factor, into a new one, and make it the active one: see
        adapters.add_adapters. model.add_adapters({"a": 0.7, "b": 0.3}, name="c")"""
        parts = {self._known(one): self.adapters[one] for one in factors}
        self._adopt(name, add_adapters(parts, factors, method, rank))

    def load_adapter(self, path: str | Path, name: str = "default") -> None:
        """Read a PEFT adapter, check that it fits this model exactly, and make it the active one."""
        config, params = adapter_files.load_adapter(Path(path), self.config.architecture.conv1d)
        self._adopt(name, placed(config, params, self.params, self.config.linears(), self.dtype, str(path)))

    def save_adapter(
        self, path: str | Path, name: str | None = None, base: str = "", plain: bool | None = None
    ) -> None:
        """Write an adapter (the active one unless named) as PEFT's two files into the directory `path`.

        plain: write PiSSA or OLoRA as the LoRA of twice the rank that it is equal to (adapters.as_lora). None: only
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
        """tokens (B, T) integers -> logits (B, T, V), cache.

        rng: turns the adapter's dropout on. recompute: keep only each layer's input and compute the rest again in
        the backward (gradient checkpointing, Chen et al. 2016): the same gradients to the bit, for one more forward.
        kv: continue after the positions it holds, and add these.
        """
        tokens = self._checked(tokens)
        if recompute and kv is not None:
            raise ValueError("recompute makes a layer again from its input alone: it does not go with kv")
        config, params, a = self.config, self.params, self.config.architecture
        start = 0 if kv is None else kv.length
        length = start + tokens.shape[1]
        if start and config.rope_regime(length) != config.rope_regime(start):
            raise ValueError(
                f"at {length} positions RoPE's frequencies change, and the {start} cached keys must be made anew"
            )
        positions = array_module(tokens).arange(start, length)
        x, embedding = embedding_forward(tokens, params[a.embedding + ".weight"])  # (B, T, D)
        x = x.astype(self.dtype, copy=False)
        if a.scaled_embedding:
            x *= self._embedding_scale
        if a.positions:
            if length > config.max_positions:
                raise ValueError(f"{length} positions, but the model has learned {config.max_positions}")
            p, learned = embedding_forward(positions, params[a.positions + ".weight"])  # (T, D)
            x += p
            rope = None
        else:
            rope, learned = self._rope(positions, length), None
        layers = []
        for i in range(config.layers):
            # A layer draws its dropout masks from a seed of its own, so that recomputing it draws the same ones.
            seed = None if rng is None else int(rng.integers(2**63))
            y, cache = layer_forward(config, params, self._linear, i, x, rope, seed, kv)
            layers.append((x, seed) if recompute else cache)
            x = y
        if kv is not None:
            kv.length = length
        x, norm = norm_forward(config, params, a.final_norm, x)
        logits, head = head_forward(x, params[config.head])  # (B, T, V)
        softcap = None
        if config.final_logit_softcapping is not None:
            logits, softcap = softcap_forward(logits, config.final_logit_softcapping)
        return logits, {
            "embedding": embedding, "positions": learned, "layers": layers, "norm": norm, "head": head,
            "softcap": softcap, "rope": rope, "recompute": recompute,
        }  # fmt: skip

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        """dlogits (B, T, V) -> the gradient of every parameter in `trainable()`, by its name.

        The cache, of a forward without kv, serves once: each layer's part is let go of on the way.
        """
        config, params, a = self.config, self.params, self.config.architecture
        full = self.active is None
        wanted = self.trainable()
        grads: dict[str, Array] = {}
        if config.final_logit_softcapping is not None:
            dlogits = softcap_backward(dlogits, cache["softcap"])
        dx, head = head_backward(dlogits, cache["head"], train_weight=full)
        dx, dnorm = norm_backward(config, dx, cache["norm"])
        for i in reversed(range(config.layers)):
            layer = cache["layers"][i]
            if cache["recompute"]:
                x, seed = layer
                _, layer = layer_forward(config, params, self._linear, i, x, cache["rope"], seed)
            dx = layer_backward(config, i, dx, layer, cache["rope"], grads, full)
            cache["layers"][i] = layer = None  # let go of it: the memory serves the layers before
        if full:
            grads.update({f"{a.final_norm}.{key}": value for key, value in dnorm.items()})
            if a.positions:
                grads[a.positions + ".weight"] = embedding_backward(dx.sum(axis=0), cache["positions"])
            if a.scaled_embedding:
                dx = dx * self._embedding_scale
            dembedding = embedding_backward(dx, cache["embedding"])
            if config.padding is not None:
                dembedding[config.padding] = 0
            if config.tied:
                dembedding += head["weight"]
            else:
                grads["lm_head.weight"] = head["weight"]
            grads[a.embedding + ".weight"] = dembedding
        return {name: grads[name] for name in wanted}

    def _rope(self, positions: Array, length: int) -> tuple[Array, Array]:
        """cos and sin (T, n) of the positions, in a text of `length` tokens so far."""
        config = self.config
        frequencies, factor = rope_frequencies(
            config.rope_theta, config.rotary_dim, self.dtype, config.rope_scaling, length, config.max_positions
        )
        return rope_tables(positions, frequencies, self.dtype, factor)

    @property
    def _embedding_scale(self) -> np.floating:
        """sqrt(D), in the model's dtype as in transformers."""
        return self.dtype.type(self.config.hidden_size**0.5)

    def _linear(self, name: str) -> tuple[Weight, LoRA | None]:
        """The weight that the linear of this name has now, and its adapter."""
        weight = self.params[name + ".weight"]
        if self.active is None:
            return weight, None
        adapter = self.adapters[self.active]
        return adapter.residual.get(name + ".weight", weight), adapter.lora(name)

    def _checked(self, tokens: Any) -> Array:
        tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers of shape (B, T), not {tokens.dtype} of shape {tokens.shape}")
        if tokens.size == 0:
            raise ValueError(f"tokens of shape {tokens.shape} hold no token")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}")
        return tokens
