"""The Llama decoder: forward, and the backward that undoes it line by line.

Parameters are a plain dict by their Hugging Face names, adapters and gradients carry the same names:

    model.embed_tokens.weight                             (V, D)
    model.layers.0.input_layernorm.weight                 (D,)
    model.layers.0.self_attn.q_proj.weight                (H*h, D)     an array or a QuantizedTensor
    model.layers.0.self_attn.q_proj.lora_A.weight         (r, D)       in an adapter
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import adapter_files, checkpoint, files
from .adapters import Adapter, add_adapters, as_lora, new_adapter, placed
from .backend import Array, array_module
from .config import Config
from .functional import (
    attention_backward,
    attention_forward,
    embedding_backward,
    embedding_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_backward,
    rope_forward,
    rope_tables,
    swiglu_backward,
    swiglu_forward,
)
from .kv_cache import KVCache
from .lora import LoRA, Weight, linear_backward, linear_forward
from .lora_config import LoraConfig
from .quantize import QuantizedTensor
from .quantize import quantize as nf4  # `quantize` is an option's name here


class Model:
    """A decoder: `config`, the base's `params`, and named `adapters` of which at most one is `active`.

    With an adapter active, the base is frozen and only A and B have gradients; with none, every parameter is
    trained (pretraining, full fine-tuning), which a quantised base cannot be.
    """

    def __init__(self, config: Config, params: dict[str, Weight]) -> None:
        self.config = config
        self.params = params
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        checkpoint.check_shapes(params, config.shapes(), "the model")

    # ---- in and out ----

    @classmethod
    def from_config(cls, config: Config, seed: int = 0, dtype: Any = np.float32) -> Model:
        """A new model with random weights: normal with std 0.02, the two projections that write into the residual
        stream smaller by sqrt(2 * layers) (Radford et al. 2019, section 2.3), norms 1, biases 0."""
        rng = np.random.default_rng(seed)
        params: dict[str, Weight] = {}
        for name, shape in config.shapes().items():
            if len(shape) == 1:
                params[name] = np.full(shape, 0 if name.endswith("bias") else 1, dtype)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * config.layers) ** 0.5 if residual else 0.02
                params[name] = (rng.standard_normal(shape) * std).astype(dtype)
        return cls(config, params)

    @classmethod
    def from_pretrained(cls, path: str | Path, quantize: str | None = None, dtype: Any = np.float32) -> Model:
        """Load a Hugging Face Llama directory (config.json and safetensors in 16 or 32 bits).

        Weights are held in `dtype`; with `quantize="nf4"` each linear's weight becomes NF4 with double quantisation
        as it is read. Embeddings, norms and the output head stay as they are. Raises ValueError or
        FileNotFoundError naming what is missing, unexpected, misshapen or not supported.
        """
        path = Path(path)
        if quantize not in (None, "nf4"):
            raise ValueError(f'quantize must be None or "nf4", not {quantize!r}')
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such directory")
        config = Config.from_dict(files.read_json(path / "config.json"), where=str(path / "config.json"))
        shapes, linears = config.shapes(), {name + ".weight" for name in config.linears()}
        params: dict[str, Weight] = {}
        for name, tensor in checkpoint.read_model(path):
            if name.endswith("rotary_emb.inv_freq"):
                continue  # older writers keep what follows from the config
            if name in shapes and tensor.shape != shapes[name]:
                raise ValueError(f"{path}: {name} has shape {tensor.shape}, the config says {shapes[name]}")
            params[name] = tensor.astype(dtype)
            if quantize and name in linears:
                params[name] = nf4(params[name], name=name)
        head = params.pop("lm_head.weight", None) if config.tied else None  # some writers keep a copy
        checkpoint.check_shapes(params, shapes, str(path))
        if head is not None and not np.array_equal(head, params[config.head]):
            raise ValueError(f"{path}: lm_head.weight differs from the embedding, to which the config ties it")
        return cls(config, {name: params[name] for name in shapes})

    def save_pretrained(self, path: str | Path, dtype: Any = np.float32) -> None:
        """Write config.json and model.safetensors with the weights in `dtype`. Adapters are not included."""
        path = Path(path)
        quantized = [name for name, p in self.params.items() if isinstance(p, QuantizedTensor)]
        if quantized:
            raise ValueError(f"{quantized[0]} is quantised: only a dense model is saved this way")
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: param.astype(dtype) for name, param in self.params.items()}
        files.write_tensors(path / "model.safetensors", tensors)
        files.write_json(path / "config.json", self.config.to_dict(dtype))

    def quantize(self, **options: Any) -> None:
        """Replace each linear's weight by its NF4 quantisation, in place (`options`: those of `quantize`); also those
        that PiSSA and OLoRA adapters have in their stead."""
        linears = {name + ".weight" for name in self.config.linears()}
        for weights in (self.params, *(adapter.residual for adapter in self.adapters.values())):
            for name, weight in weights.items():
                if name in linears and not isinstance(weight, QuantizedTensor):
                    weights[name] = nf4(weight, name=name, **options)

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
        config, params = adapter_files.load_adapter(Path(path), self._conv1d)
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
        adapter_files.save_adapter(Path(path), adapter.config, adapter.params, base, self._conv1d)

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

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all computation: the embedding's."""
        return self.params["model.embed_tokens.weight"].dtype

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
        start = 0 if kv is None else kv.length
        positions = array_module(tokens).arange(start, start + tokens.shape[1])
        rope = rope_tables(positions, self.config.rope_frequencies(), self.dtype)
        x, embedding = embedding_forward(tokens, self.params["model.embed_tokens.weight"])  # (B, T, D)
        layers = []
        for i in range(self.config.layers):
            # A layer draws its dropout masks from a seed of its own, so that recomputing it draws the same ones.
            seed = None if rng is None else int(rng.integers(2**63))
            y, cache = self._layer_forward(i, x, rope, seed, kv)
            layers.append((x, seed) if recompute else cache)
            x = y
        if kv is not None:
            kv.length += tokens.shape[1]
        x, norm = rmsnorm_forward(x, self.params["model.norm.weight"], self.config.eps)
        logits, head = linear_forward(x, self.params[self.config.head])  # (B, T, V)
        return logits, {
            "embedding": embedding, "layers": layers, "norm": norm, "head": head, "rope": rope, "recompute": recompute,
        }  # fmt: skip

    def backward(self, dlogits: Array, cache: dict) -> dict[str, Array]:
        """dlogits (B, T, V) -> the gradient of every parameter in `trainable()`, by its name.

        The cache, of a forward without kv, serves once: each layer's part is let go of on the way.
        """
        full = self.active is None
        wanted = self.trainable()
        grads: dict[str, Array] = {}
        dx, head = linear_backward(dlogits, cache["head"], train_weight=full)
        dx, dnorm = rmsnorm_backward(dx, cache["norm"])
        for i in reversed(range(self.config.layers)):
            layer = cache["layers"][i]
            if cache["recompute"]:
                x, seed = layer
                _, layer = self._layer_forward(i, x, cache["rope"], seed)
            dx = self._layer_backward(i, dx, layer, cache["rope"], grads, full)
            cache["layers"][i] = layer = None  # let go of it: the memory serves the layers before
        if full:
            grads["model.norm.weight"] = dnorm
            dembedding = embedding_backward(dx, cache["embedding"])
            if self.config.tied:
                dembedding += head["weight"]
            else:
                grads["lm_head.weight"] = head["weight"]
            grads["model.embed_tokens.weight"] = dembedding
        return {name: grads[name] for name in wanted}

    def _layer_forward(
        self, i: int, x: Array, rope: tuple[Array, Array], seed: int | None, kv: KVCache | None = None
    ) -> tuple[Array, dict]:
        """One decoder layer: x += attention(norm(x)); x += mlp(norm(x)). x (B, T, D) -> (B, T, D), cache."""
        config, params, layer = self.config, self.params, f"model.layers.{i}."
        rng = None if seed is None else np.random.default_rng(seed)
        heads = (*x.shape[:2], -1, config.head_dim)  # (B, T, H or K, h)
        cache: dict[str, tuple] = {}

        def linear(name: str, x: Array) -> Array:
            weight, lora = self._linear(layer + name)
            y, cache[name] = linear_forward(x, weight, params.get(layer + name + ".bias"), lora, rng)
            return y

        n, cache["norm1"] = rmsnorm_forward(x, params[layer + "input_layernorm.weight"], config.eps)
        q = rope_forward(linear("self_attn.q_proj", n).reshape(heads), *rope)  # (B, T, H, h)
        k = rope_forward(linear("self_attn.k_proj", n).reshape(heads), *rope)  # (B, T, K, h)
        v = linear("self_attn.v_proj", n).reshape(heads)  # (B, T, K, h)
        if kv is not None:
            k, v = kv.extend(i, k, v)  # (B, S, K, h)
        a, cache["attention"] = attention_forward(q, k, v)  # (B, T, H, h)
        x = x + linear("self_attn.o_proj", a.reshape(*x.shape[:2], -1))  # (B, T, D)

        n, cache["norm2"] = rmsnorm_forward(x, params[layer + "post_attention_layernorm.weight"], config.eps)
        gate, up = linear("mlp.gate_proj", n), linear("mlp.up_proj", n)  # (B, T, F)
        a, cache["swiglu"] = swiglu_forward(gate, up)
        return x + linear("mlp.down_proj", a), cache  # (B, T, D)

    def _layer_backward(
        self, i: int, dx: Array, cache: dict, rope: tuple[Array, Array], grads: dict[str, Array], full: bool
    ) -> Array:
        """The lines of `_layer_forward` from the last to the first. dx (B, T, D) of its output -> of its input."""
        layer = f"model.layers.{i}."
        heads = (*dx.shape[:2], -1, self.config.head_dim)
        flat = (*dx.shape[:2], -1)

        def linear(name: str, dy: Array) -> Array:
            dx, dparams = linear_backward(dy, cache[name], full)
            grads.update({f"{layer}{name}.{key}": value for key, value in dparams.items()})
            return dx

        dgate, dup = swiglu_backward(linear("mlp.down_proj", dx), cache["swiglu"])  # (B, T, F)
        dn = linear("mlp.gate_proj", dgate)
        dn += linear("mlp.up_proj", dup)  # n went into both
        dn, dnorm2 = rmsnorm_backward(dn, cache["norm2"])
        dx = dx + dn  # the residual stream passes the gradient on as it is, and the branch adds its own

        da = linear("self_attn.o_proj", dx).reshape(heads)  # (B, T, H, h)
        dq, dk, dv = attention_backward(da, cache["attention"])
        dn = linear("self_attn.q_proj", rope_backward(dq, *rope).reshape(flat))
        dn += linear("self_attn.k_proj", rope_backward(dk, *rope).reshape(flat))
        dn += linear("self_attn.v_proj", dv.reshape(flat))
        dn, dnorm1 = rmsnorm_backward(dn, cache["norm1"])
        if full:
            grads[layer + "post_attention_layernorm.weight"] = dnorm2
            grads[layer + "input_layernorm.weight"] = dnorm1
        return dx + dn

    def _linear(self, name: str) -> tuple[Weight, LoRA | None]:
        """The weight that the linear of this name has now, and its adapter."""
        weight = self.params[name + ".weight"]
        if self.active is None:
            return weight, None
        adapter = self.adapters[self.active]
        return adapter.residual.get(name + ".weight", weight), adapter.lora(name)

    @property
    def _conv1d(self) -> bool:
        """Whether Hugging Face stores the linears as (in, out): PEFT's fan_in_fan_out."""
        return getattr(self.config, "model_type", "llama") == "gpt2"

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
