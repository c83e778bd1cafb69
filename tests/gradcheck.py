"""Every gradient against central differences in float64, and planted mistakes that this must catch.

    python tests/gradcheck.py        the whole table, every element of every gradient (a few minutes)

No two dimensions are equal, so that a wrong axis shows; weights and inputs are of order one, so that no
gradient is degenerate; attention and the head run in several tiles, of which the last is partial. The error of
a gradient is the largest over its elements, each relative to its own size or, where that is smaller, to the root
mean square of the gradient.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
from mistakes import MISTAKES, planted

from refqlora import attention, functional, lora, rope
from refqlora import lm_head as head
from refqlora.config import Config
from refqlora.lora import LoRA, row_norms
from refqlora.lora_config import LoraConfig
from refqlora.model import Model
from refqlora.quantization import quantize

TOLERANCE = 1e-7  # of a right gradient
CAUGHT = 1e-3  # a wrong gradient must be this far off at least
STEP = 3e-4
B, T, S, H, K, h, D, F, V, r = 3, 7, 9, 8, 2, 6, 10, 13, 11, 5

Run = Callable[..., tuple[np.ndarray, Callable]]  # inputs -> y, and the function dy -> {input: its gradient}


def central_difference(f: Callable[[], float], x: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """df/dx at the flat positions `elements`; f reads x, which is moved in place and put back.

    Five points: (8 (f(x + s) - f(x - s)) - (f(x + 2s) - f(x - 2s))) / 12 s, whose error is of order s^4.
    """
    flat = x.reshape(-1)
    assert np.shares_memory(flat, x)
    numeric = np.empty(len(elements))
    for n, i in enumerate(elements):
        value, total = flat[i], 0.0
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            flat[i] = value + steps * STEP
            total += weight * f()
        flat[i] = value
        numeric[n] = total / (12 * STEP)
    return numeric


def relative_error(numeric: np.ndarray, analytic: np.ndarray) -> float:
    """The largest |numeric - analytic| / max(|numeric|, |analytic|, root mean square of `numeric`)."""
    size = np.sqrt(np.mean(numeric**2))
    assert size > 0, "the gradient is zero everywhere: nothing is checked"
    return float((abs(numeric - analytic) / np.maximum(np.maximum(abs(numeric), abs(analytic)), size)).max())


class Check:
    """One operation's gradients: numeric, made once, and analytic, made whenever `errors` is called."""

    def __init__(self, name: str, inputs: dict[str, np.ndarray], run: Run, count: int | None = None, tile: int = 3):
        self.name, self.inputs, self.run, self.count, self.tile = name, inputs, run, count, tile
        self.norms: dict[int, np.ndarray] = {}

    @functools.cached_property
    def upstream(self) -> np.ndarray:
        """dy: with it, sum(dy * y) is a number whose gradients are those of the backward."""
        return np.random.default_rng(1).standard_normal(np.shape(self._run()[0]))

    @functools.cached_property
    def numeric(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each gradient, the elements looked at (all, or `count` drawn at random) and their values."""
        rng, numeric = np.random.default_rng(2), {}
        for name in self._run()[1](self.upstream):
            x = self.inputs[name]
            few = self.count is not None and x.size > self.count
            elements = rng.choice(x.size, self.count, replace=False) if few else np.arange(x.size)
            numeric[name] = elements, central_difference(self._loss, x, elements)
        return numeric

    def _loss(self) -> float:
        return (self._run()[0] * self.upstream).sum()

    def errors(self) -> dict[str, float]:
        """The relative error of each gradient; inf if its shape is not its input's."""
        errors = {}
        numeric, analytic = self.numeric, self._run()[1](self.upstream)
        for name, (elements, values) in numeric.items():
            fits = analytic[name].shape == self.inputs[name].shape
            errors[name] = relative_error(values, analytic[name].reshape(-1)[elements]) if fits else np.inf
        return errors

    def _run(self) -> tuple[np.ndarray, Callable]:
        with self._settings():
            y, backward = self.run(**self.inputs)

        def same_backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            with self._settings():
                return backward(dy)

        return y, same_backward

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Attention and the head in tiles of `tile` rows, of which the last is partial; and DoRA's norms as they were
        at first, since to its backward they are constants."""

        def held(w: np.ndarray, adapter: LoRA) -> np.ndarray:
            if id(adapter.A) not in self.norms:
                self.norms[id(adapter.A)] = row_norms(w, adapter)
            return self.norms[id(adapter.A)]

        tiles = patch.object(attention, "TILE", self.tile), patch.object(head, "TILE", self.tile * D)
        with tiles[0], tiles[1], patch.object(lora, "row_norms", held):
            yield


# ---- the operations ----------------------------------------------------------------------------------------
# Each reaches the engine through its module, so that a planted mistake is what it finds.


def embedding(weight, tokens):
    y, cache = functional.embedding_forward(tokens, weight)
    return y, lambda dy: {"weight": functional.embedding_backward(dy, cache)}


def rmsnorm(x, weight):
    y, cache = functional.rmsnorm_forward(x, weight, 1e-2)
    return y, lambda dy: dict(zip(("x", "weight"), functional.rmsnorm_backward(dy, cache), strict=True))


def layernorm(x, weight, bias):
    y, cache = functional.layernorm_forward(x, weight, bias, 1e-2)
    return y, lambda dy: dict(zip(("x", "weight", "bias"), functional.layernorm_backward(dy, cache), strict=True))


def turn(x, cos, sin):
    return rope.rope_forward(x, cos, sin), lambda dy: {"x": rope.rope_backward(dy, cos, sin)}


def attend(**options):
    def run(q, k, v):
        y, cache = attention.attention_forward(q, k, v, **options)
        return y, lambda dy: dict(zip("qkv", attention.attention_backward(dy, cache), strict=True))

    return run


def swiglu(gate, up):
    y, cache = functional.swiglu_forward(gate, up)
    return y, lambda dy: dict(zip(("gate", "up"), functional.swiglu_backward(dy, cache), strict=True))


def geglu(gate, up):
    y, cache = functional.geglu_forward(gate, up)
    return y, lambda dy: dict(zip(("gate", "up"), functional.geglu_backward(dy, cache), strict=True))


def gelu(x):
    y, cache = functional.gelu_forward(x)
    return y, lambda dy: {"x": functional.gelu_backward(dy, cache)}


def softcap(x):
    y, cache = functional.softcap_forward(x, 1.3)
    return y, lambda dy: {"x": functional.softcap_backward(dy, cache)}


def cross_entropy(logits, labels, denominator=None):
    loss, dlogits = functional.cross_entropy(logits, labels, denominator)
    return np.float64(loss), lambda dy: {"logits": dy * dlogits}


def linear(train_weight=False, scale=0.0, dropout=0.0, quantized=None):
    """The linear with options. Its generator starts anew each time: every forward draws the same mask."""

    def run(x, weight=None, bias=None, **ab):
        magnitude = ab.get("lora_magnitude_vector")
        adapter = LoRA(ab["lora_A.weight"], ab["lora_B.weight"], scale, dropout, magnitude) if ab else None
        rng = np.random.default_rng(3) if dropout else None
        y, cache = lora.linear_forward(x, weight if quantized is None else quantized, bias, adapter, rng)

        def backward(dy):
            dx, grads = lora.linear_backward(dy, cache, train_weight)
            return {"x": dx} | grads

        return y, backward

    return run


def output_head(train_weight):
    def run(x, weight):
        logits, cache = head.head_forward(x, weight)

        def backward(dy):
            dx, grads = head.head_backward(dy, cache, train_weight)
            return {"x": dx} | grads

        return logits, backward

    return run


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


@functools.cache
def operation_checks(count: int | None = 150) -> list[Check]:
    """Every operation, with its options; `count` elements of each input, None for all."""

    def check(name: str, inputs: dict[str, np.ndarray], run: Run, tile: int = 3) -> Check:
        return Check(name, inputs, run, count, tile)

    labels = np.random.default_rng(0).integers(0, V, (B, T))
    labels[0, :4] = labels[2, 5] = functional.IGNORE
    logits = {"logits": draw(B, T, V), "labels": labels}
    tokens = np.random.default_rng(1).integers(0, V - 2, (B, T))  # some often, two never
    q, kt, vt = draw(B, T, H, h), draw(B, T, K, h), draw(B, T, K, h, seed=1)
    ks, vs = draw(B, S, K, h), draw(B, S, K, h, seed=1)
    tables = rope.rope_tables(np.arange(T), np.array([1, 0.3, 0.1]), np.float64)
    part = rope.rope_tables(np.arange(T), np.array([1, 0.3]), np.float64, factor=1.4)  # turns 4 of the 6 elements
    x, w = draw(B, T, D), draw(F, D)
    dense = {"x": x, "weight": w, "bias": draw(F)}
    ab = {"lora_A.weight": draw(r, D), "lora_B.weight": draw(F, r)}
    dora = ab | {"lora_magnitude_vector": draw(F, seed=1) + 5}
    rslora = LoraConfig(rank=r, alpha=3, rslora=True).scale
    nf4 = quantize(w, name="w")
    return [
        check("embedding", {"weight": draw(V, D), "tokens": tokens}, embedding),
        check("rmsnorm", {"x": x, "weight": draw(D)}, rmsnorm),
        check("layernorm", {"x": x, "weight": draw(D), "bias": draw(D, seed=1)}, layernorm),
        check("rope", {"x": q, "cos": tables[0], "sin": tables[1]}, turn),
        check("rope, part of each head, a factor", {"x": q, "cos": part[0], "sin": part[1]}, turn),
        check("attention", {"q": q, "k": kt, "v": vt}, attend(), tile=128),
        check("attention, tiles of 3", {"q": q, "k": kt, "v": vt}, attend()),
        check("attention, S > T", {"q": q, "k": ks, "v": vs}, attend()),
        check("attention, window of 2 in one tile", {"q": q, "k": kt, "v": vt}, attend(window=2), tile=128),
        check("attention, window of 4, S > T", {"q": q, "k": ks, "v": vs}, attend(window=4)),
        check("attention, softcap", {"q": q, "k": kt, "v": vt}, attend(softcap=1.5)),
        check("attention, all options", {"q": q, "k": ks, "v": vs}, attend(scale=0.7, window=5, softcap=2.0)),
        check("swiglu", {"gate": draw(B, T, F), "up": draw(B, T, F, seed=1)}, swiglu),
        check("gelu", {"x": 2 * draw(B, T, F)}, gelu),
        check("geglu", {"gate": draw(B, T, F), "up": draw(B, T, F, seed=1)}, geglu),
        check("softcap", {"x": draw(B, T, V)}, softcap),
        check("cross_entropy", logits, cross_entropy),
        check("cross_entropy, denominator", logits | {"denominator": 5.0}, cross_entropy),
        check("head, frozen", {"x": x, "weight": draw(V, D)}, output_head(False)),
        check("head, trained", {"x": x, "weight": draw(V, D)}, output_head(True)),
        check("linear, frozen", dense, linear()),
        check("linear, trained", dense, linear(train_weight=True)),
        check("linear, NF4", {"x": x}, linear(quantized=nf4)),
        check("linear, LoRA", dense | ab, linear(scale=1.7)),
        check("linear, LoRA trained with W", dense | ab, linear(train_weight=True, scale=0.4)),
        check("linear, rsLoRA", dense | ab, linear(scale=rslora)),
        check("linear, LoRA with dropout", dense | ab, linear(scale=1.7, dropout=0.3)),
        check("linear, LoRA on NF4", {"x": x} | ab, linear(scale=1.7, quantized=nf4)),
        check("linear, DoRA", dense | dora, linear(scale=1.7)),
        check("linear, DoRA trained with W", dense | dora, linear(train_weight=True, scale=0.4)),
        check("linear, DoRA with dropout", dense | dora, linear(scale=1.7, dropout=0.3)),
        check("linear, DoRA with dropout trained with W", dense | dora, linear(True, scale=0.4, dropout=0.3)),
        check("linear, DoRA on NF4", {"x": x} | dora, linear(scale=1.7, quantized=nf4)),
    ]


# ---- the whole model ---------------------------------------------------------------------------------------


# Options of each architecture with which every line of the layer is used; windows are shorter than the text.
ARCHITECTURES = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"windows": (3, 3)},
    "qwen2": {"attention_bias": True, "windows": (None, 3)},
    "qwen3": {"attention_bias": True},
    "gemma2": {
        "activation": "gelu_tanh", "tied": True, "windows": (3, None), "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "phi3": {
        "partial_rotary_factor": 0.7, "windows": (5, 5),
        "rope_scaling": {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 4,
            "short_factor": [1.0, 1.5], "long_factor": [1.5, 3.0],
        },
    },
    "gpt2": {
        "activation": "gelu_tanh", "tied": True, "attention_bias": True, "mlp_bias": True, "max_positions": T + 2,
        "hidden_size": 16, "heads": 4, "kv_heads": 4, "head_dim": 4, "rope_theta": 10000.0,
        "scale_attn_by_inverse_layer_idx": True,
    },
}  # fmt: skip


def tiny_config(**options) -> Config:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "layers": 2}
    return Config(**(sizes | {"heads": H, "kv_heads": K, "head_dim": h, "rope_theta": 50.0} | options))


def tiny_model(dtype=np.float64, seed=0, **options) -> Model:
    """Activations of order one, norms that are not 1 and biases that are not 0, as from_config's are."""
    config, rng, params = tiny_config(**options), np.random.default_rng(seed), {}
    a = config.architecture
    for name, shape in config.shapes().items():
        if name.endswith("bias"):
            value = rng.standard_normal(shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape) - a.norm_of_one_plus
        else:
            std = 1.5 / shape[-1] ** 0.5
            if name in (f"{a.embedding}.weight", f"{a.positions}.weight"):
                std = 1.0
            value = rng.standard_normal(shape) * std
        params[name] = value.astype(dtype)
    return Model(config, params)


def of_architecture(model_type: str, **options) -> Model:
    return tiny_model(model_type=model_type, **(ARCHITECTURES[model_type] | options))


def stir(adapter: dict[str, np.ndarray], seed: int = 0) -> None:
    """Give an adapter's B values of order one, in place: at B = 0, dA is zero and would not be checked. So are m/norm
    and 1 told apart."""
    rng = np.random.default_rng(seed)
    for name, p in adapter.items():
        if name.endswith("lora_B.weight"):
            p[...] = rng.standard_normal(p.shape) * 0.5
        elif name.endswith("lora_magnitude_vector"):
            p *= rng.uniform(0.5, 1.5, p.shape)


def whole(m: Model, denominator=None, dropout=False, recompute=False) -> Run:
    rng = np.random.default_rng(4)
    tokens, labels = rng.integers(0, V - 1, (B, T)), rng.integers(0, V, (B, T))
    labels[1, :3] = functional.IGNORE

    def run(**_):  # the inputs are the model's own arrays
        masks = np.random.default_rng(5) if dropout else None
        logits, cache = m.forward(tokens, rng=masks, recompute=recompute)
        loss, dlogits = functional.cross_entropy(logits, labels, denominator)
        return np.float64(loss), lambda dy: m.backward(dy * dlogits, cache)

    return run


@functools.cache
def model_checks(count: int | None = 6) -> list[Check]:
    """The model trained whole and through adapters; `count` elements of each parameter, None for all."""

    def check(name: str, m: Model, **options) -> Check:
        return Check(name, m.trainable(), whole(m, **options), count, tile=4)

    def adapted(m: Model | None = None, **options) -> Model:
        m = m or tiny_model(attention_bias=True)
        m.add_adapter(rank=r, alpha=8, **options)
        stir(m.trainable())
        return m

    nf4, some = adapted(dropout=0.25), adapted(targets=("q_proj", "down_proj"), rslora=True)
    nf4.quantize()
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.*": 3}}
    pissa = adapted(dora=True, init="pissa", dropout=0.25, layers=(1,), **patterns)
    pissa.quantize()
    tied = tiny_model(tied=True, attention_bias=True, mlp_bias=True)
    return [
        check("model", tiny_model()),
        check("model, tied, biases", tied, denominator=5.0),
        check("model, LoRA", adapted()),
        check("model, rsLoRA on q and down, recomputed", some, recompute=True),
        check("model, LoRA on NF4 with dropout, recomputed", nf4, dropout=True, recompute=True),
        *(check(f"model, {name}", of_architecture(name), recompute=name == "gemma2") for name in ARCHITECTURES),
        *(check(f"model, {name}, LoRA", adapted(of_architecture(name))) for name in ("gemma2", "phi3", "gpt2")),
        check("model, DoRA", adapted(dora=True)),
        check("model, DoRA, PiSSA on NF4 with dropout, recomputed", pissa, dropout=True, recompute=True),
    ]


# ---- the table ---------------------------------------------------------------------------------------------


def largest_error(checks: list[Check], mistake: str | None = None) -> float:
    """Over all gradients of the checks; the numeric ones are made before the mistake is planted."""
    for check in checks:
        assert check.numeric
    with planted(mistake) if mistake else nullcontext():
        return float(np.max([error for check in checks for error in check.errors().values()]))  # NaN if any is


def of_operation(mistake: str) -> list[Check]:
    """The checks of the operation that the mistake is in; none for one in the model."""
    operation = mistake.split(":")[0]
    return [check for check in operation_checks() if check.name.split(",")[0] == operation]


def main() -> int:
    wrong = []
    print(f"{'operation':58}{'gradient':58}largest relative error")
    for check in operation_checks(None) + model_checks(None):
        for gradient, error in check.errors().items():
            print(f"{check.name:58}{gradient:58}{error:.1e}")
            if not error < TOLERANCE:
                wrong.append(f"{check.name}: {gradient}")
    print(f"\n{'planted mistake':55}{'operation':12}whole model")
    for mistake in MISTAKES:
        line = f"{mistake:55}"
        for checks in (of_operation(mistake), model_checks()):
            error = largest_error(checks, mistake) if checks else None
            line += " " * 12 if error is None else f"{error:<12.1e}"
            if error is not None and not error > CAUGHT:
                wrong.append(f"not caught: {mistake}")
        print(line.rstrip())
    print("\nOK" if not wrong else "\nWRONG\n" + "\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
