"""Calls of the public API of which an argument or two are of another type, shape, dtype or value."""

import random
import reprlib
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import tiny
from mutators import VALUES
from refusals import OUT, Case

import refqlora as rq
from refqlora.lora import LoRA

W = np.random.default_rng(0).standard_normal((6, 64), np.float32)
TOKENS = np.arange(10).reshape(2, 5)


def calls(home: Path) -> dict[str, tuple[Callable, dict]]:
    """Public functions, each with arguments that are right; those that are bound are never others."""
    model, training = rq.Model.from_config(tiny.config()), rq.TrainingConfig(steps=9)
    model.add_adapter("a", rank=2)
    model.add_adapter("b", rank=3)
    logits, cache = model.forward(TOKENS)
    params, grads = ({name: p.copy() for name, p in model.trainable().items()} for _ in range(2))
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ("q_proj", "v_proj"), "rslora": False, "dora": False}
    lora |= {"init": "default", "exclude": (), "layers": (0,), "rank_pattern": {"q_proj": 2}}
    lora |= {"layers_pattern": (), "alpha_pattern": {"v_proj": 4}}
    adamw = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    writing = {"max_new_tokens": 3, "stop": (0,), "seed": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    writing["repetition_penalty"] = 1.2
    file = {"path": home / "model", "dtype": np.float32}
    return {
        "quantize": (rq.quantize, {"w": W, "codebook": "nf4", "block_size": 64, "double_quant": True}),
        "dequantize": (rq.dequantize, {"q": rq.quantize(W), "dtype": np.float32, "out": np.empty_like(W)}),
        "normal_float": (rq.normal_float, {"bits": 4}),
        "cross_entropy": (rq.cross_entropy, {"logits": logits, "labels": TOKENS, "denominator": 3}),
        "merge": (rq.merge, {"weight": W, "lora": LoRA(W[:2], W[:, :2], 1.0)}),
        "Config": (rq.Config, {field.name: getattr(model.config, field.name) for field in fields(rq.Config)}),
        "LoraConfig": (rq.LoraConfig, lora),
        "TrainingConfig": (rq.TrainingConfig, vars(training)),
        "Model": (partial(rq.Model, model.config), {"params": dict(model.params), "dtype": np.float32}),
        "from_config": (partial(rq.Model.from_config, model.config), {"seed": 0, "dtype": np.float32}),
        "from_pretrained": (rq.Model.from_pretrained, {"quantize": "nf4", **file}),
        "save_pretrained": (model.save_pretrained, {**file, "path": home / OUT, "max_shard_size": "20KB"}),
        "Model.quantize": (model.quantize, {"kind": "nf4", "block_size": 64, "double_quant": True}),
        "add_adapter": (model.add_adapter, {"name": "c", "seed": 0, **lora}),
        "load_adapter": (model.load_adapter, {"path": home / "adapter", "name": "c"}),
        "save_adapter": (model.save_adapter, {"path": home / OUT, "name": "a", "base": "", "plain": None}),
        "set_adapter": (model.set_adapter, {"name": "a"}),
        "forward": (model.forward, {"tokens": TOKENS, "rng": None, "recompute": True, "kv": None}),
        "backward": (partial(model.backward, cache=cache), {"dlogits": logits}),
        "generate": (lambda **given: list(rq.generate(model, **given)), {"prompt": [1, 2, 3], **writing}),
        "complete": (
            partial(rq.complete, model, tokenizer=tiny.tokenizer()),
            {"prompt": "m", "stop_strings": ("x",), **writing},
        ),
        "AdamW": (rq.AdamW, {"params": params, **adamw}),
        "AdamW.step": (rq.AdamW(params, **adamw).step, {"grads": grads, "lr": 0.1}),
        "clip_by_global_norm": (rq.clip_by_global_norm, {"grads": grads, "max_norm": 1.0}),
    }


def odd(rng: random.Random, value: object) -> object:
    """Something else in the place of an argument, near it or far."""
    if isinstance(value, dict) and value and rng.random() < 0.6:
        key = rng.choice(list(value))
        return {"x" if k == key and rng.random() < 0.3 else k: odd(rng, x) if k == key else x for k, x in value.items()}
    if isinstance(value, tuple | list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return getattr(type(value), "_make", type(value))([*value[:i], odd(rng, value[i]), *value[i + 1 :]])
    if isinstance(value, np.ndarray) and value.ndim and rng.random() < 0.7:
        other = value.astype(rng.choice([value.dtype, "f2", "f8"]))
        numbers = [np.nan, np.inf, -np.inf, 100] if other.dtype.kind == "f" else [0, -1, 100, 10**9]
        other.flat[rng.randrange(value.size)] = rng.choice(numbers)
        cast = value.astype(rng.choice(["f2", "f8", "c8", "?", "i1", "u1", "O", "U9", "S3", "M8[s]", "i4,f4"]))
        return rng.choice([
            cast, other, value.T, value[::-1], value[:0], value[:1], value[None], value.reshape(-1), value.tolist(),
            value.reshape(-1)[0], np.asfortranarray(value), np.ma.array(value), value.view(np.memmap),
        ])  # fmt: skip
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice([value + 1, value * 2, float(value), np.float32(value), np.int64(value), str(value)])
    return rng.choice([
        *VALUES, b"nf4", (), (1, 2), (1, "x"), 1j, object(), int, np.float32(1), np.int64(2), np.bool_(True),
        len, np.float16, np.complex64, np.dtype("U3"), np.zeros(0), np.zeros((2, 3)), np.array(None), np.array("x"),
        np.empty((0, 2**40)), np.array(3), iter([1, 2]), range(3), {1, 2}, Path("nowhere"), np.random.default_rng(0),
    ])  # fmt: skip


def of_call(rng: random.Random, valid: Path, home: Path) -> Case:
    shutil.copytree(valid / "models/plain", home / "model")
    shutil.copytree(valid / "beside", home, dirs_exist_ok=True)
    name, (call, arguments) = rng.choice(list(calls(home).items()))
    changed = rng.sample(list(arguments), min(len(arguments), rng.choice([1, 1, 1, 2])))
    arguments |= {argument: odd(rng, arguments[argument]) for argument in changed}
    said = [f"{argument}={_short(arguments[argument])}" for argument in changed]
    names = [*arguments, "adapter", "gradient of", "parameter ", "the model: ", "tensor: ", "tokens: "]
    names += [str(x) for x in arguments.values() if isinstance(x, str | Path) and str(x)]
    return Case(f"{name}({', '.join(said)})", partial(call, **arguments), names)


def _short(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else reprlib.repr(value)
