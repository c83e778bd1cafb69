"""Decoders and adapters compared with transformers, PEFT and torch: logits, loss, gradients, training steps.

As in quantization.py, `observe_*` runs the libraries and `compare_*` reads what was observed. The files that
transformers and PEFT saved are observed too, and `compare_*` writes them again to load them here:

    config.json, adapter_config.json    uint8: the bytes of the file
    model/NAME, adapter/NAME            its tensors
    tokens, labels                      (B, T); labels as transformers takes them: not shifted, -100 where none counts
    logits, loss                        (B, T, V) and ()
    gradient/NAME                       of every trained parameter, under refqlora's names
    residual/NAME                       a weight's residual under PiSSA or OLoRA
    losses, trained/NAME                the losses of training steps, and the adapter after them
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

from ..files.reading import read_tensors
from ..files.writing import write_bytes, write_tensors
from ..functional import cross_entropy
from ..model import Model
from ..optim import AdamW, clip_by_global_norm
from .differences import Observed, Outcome, relative_difference, relative_differences
from .settings import ARCHITECTURES, LORA, MAX_NORM, STEP, STEPS, batch, shifted, sizes, sizes_4bit

# ---- asking transformers, PEFT and torch ---------------------------------------------------------------------


def observe_decoder(seed: int, size: int, architecture: str = "llama", adapter: dict[str, Any] = LORA) -> Observed:
    """A random model with an adapter: its files, logits, loss and the gradient of every A and B."""
    from . import oracles

    pissa = adapter.get("init_lora_weights") == "pissa"
    base, observed = _base(seed, size, architecture, adapter["r"] if pissa else 0)
    theirs = oracles.their_adapter(base, adapter, seed=seed + 1)
    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        observed |= _files(Path(directory), "adapter", "adapter_")
    if "init_lora_weights" in adapter:
        observed |= _named("residual", oracles.residuals(theirs))
    return observed | _ran(theirs, observed)


def observe_full(seed: int, size: int) -> Observed:
    """A Llama without adapter: logits, loss and the gradient of every parameter."""
    base, observed = _base(seed, size, "llama")
    return observed | _ran(base, observed)


def _ran(theirs: Any, observed: Observed) -> Observed:
    from . import oracles

    logits, loss = oracles.run(theirs, observed["tokens"], observed["labels"])
    return {"logits": logits, "loss": np.array(loss, np.float32), **_named("gradient", oracles.gradients(theirs))}


def observe_training(seed: int, size: int) -> Observed:
    """Steps of AdamW with clipping on a Llama's adapter, all on the same batch."""
    from . import oracles

    base, observed = _base(seed, size, "llama")
    return observed | _trained(oracles.their_adapter(base, LORA, seed=seed + 1), observed)


def observe_qlora(seed: int, size: int) -> Observed:
    """The same on bitsandbytes' Linear4bit, double-quantised, with the checkpoint that transformers saves of it."""
    from . import oracles

    tokens, labels = batch(seed)
    observed = {"tokens": tokens, "labels": labels}
    with TemporaryDirectory() as name:
        directory = Path(name)
        oracles.their_model("LlamaConfig", seed, **sizes_4bit(size)).save_pretrained(directory / "dense")
        base = oracles.their_4bit(directory / "dense", double_quant=True)
        base.save_pretrained(directory / "packed")
        observed |= _files(directory / "packed", "model", "")
    return observed | _trained(oracles.their_adapter(base, LORA, seed=seed + 1), observed)


def _base(seed: int, size: int, architecture: str, apart: int = 0) -> tuple[Any, Observed]:
    """transformers' model, its weights rounded to bfloat16; its files, in bfloat16, and a batch."""
    from . import oracles

    kind, changes = ARCHITECTURES[architecture]
    base = oracles.their_model(kind, seed, **sizes(size, kind) | changes)
    base = oracles.round_to_bfloat16(oracles.set_apart(base, apart) if apart else base)
    with TemporaryDirectory() as directory:
        base.save_pretrained(directory)
        observed = _files(Path(directory), "model", "")
    for name in observed:
        if name.startswith("model/"):
            observed[name] = observed[name].astype(ml_dtypes.bfloat16)
    observed["tokens"], observed["labels"] = batch(seed, base.config.vocab_size)
    return base, observed


def _trained(theirs: Any, observed: Observed) -> Observed:
    from . import oracles

    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        added = _files(Path(directory), "adapter", "adapter_")
    steps = list(oracles.their_steps(theirs, observed["tokens"], observed["labels"], STEPS))
    added["losses"] = np.array([step["loss"] for step in steps], np.float64)
    added |= _named("gradient", steps[0]["gradients"])
    return added | _named("trained", steps[-1]["adapter"])


def _files(directory: Path, prefix: str, stem: str) -> Observed:
    """`<stem>config.json`, without paths of this machine, and every safetensors file, in the observed form."""
    config = json.loads((directory / f"{stem}config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "base_model_name_or_path"):
        if config.get(key):
            config[key] = ""
    observed = {f"{stem}config.json": np.frombuffer(json.dumps(config, sort_keys=True).encode(), np.uint8)}
    for path in sorted(directory.glob("*.safetensors")):
        observed |= _named(prefix, dict(read_tensors(path)))
    return observed


def _named(prefix: str, tensors: dict[str, np.ndarray]) -> Observed:
    return {f"{prefix}/{name}": x for name, x in tensors.items()}


# ---- comparing ---------------------------------------------------------------------------------------------


def group(observed: Observed, prefix: str) -> Observed:
    """{name: array} of the arrays observed as prefix/name."""
    return {n.removeprefix(prefix + "/"): x for n, x in observed.items() if n.startswith(prefix + "/")}


@contextmanager
def written(observed: Observed) -> Iterator[Path]:
    """A temporary directory with the observed files: `model` and, if there is one, `adapter`."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        for part, stem, file in (("model", "", "model"), ("adapter", "adapter_", "adapter_model")):
            if f"{stem}config.json" in observed:
                (directory / part).mkdir()
                write_bytes(directory / part / f"{stem}config.json", observed[f"{stem}config.json"].tobytes())
                write_tensors(directory / part / f"{file}.safetensors", group(observed, part))
        yield directory


def load(observed: Observed, dtype: Any = np.float32) -> Model:
    """Our model of the observed files, with the observed adapter."""
    with written(observed) as directory:
        try:
            model = Model.from_pretrained(directory / "model", dtype=dtype)
            if (directory / "adapter").is_dir():
                model.load_adapter(directory / "adapter")
        except ValueError as error:  # name the files without their temporary directory
            raise ValueError(str(error).replace(f"{directory}/", "")) from None
    return model


def compare_decoder(observed: Observed, dtype: Any = np.float32) -> Outcome:
    model = load(observed, dtype)
    parts = {}
    if residual := group(observed, "residual"):
        # PEFT's decomposition in float32 is off by about 1e-6, which two layers raise to 1e-5: continue with PEFT's.
        ours = model.adapters["default"].residual
        parts["residual"] = max(relative_differences(ours, residual).values())
        ours.update({name: x.astype(dtype) for name, x in residual.items()})
    logits, cache = model.forward(observed["tokens"])
    loss, dlogits = cross_entropy(logits, shifted(observed["labels"]))
    grads = model.backward(dlogits, cache)
    parts["logits"] = relative_difference(logits, observed["logits"])
    parts["loss"] = relative_difference(loss, observed["loss"])
    return _with_gradients(parts, observed, grads)


def compare_training(observed: Observed, dtype: Any = np.float32) -> Outcome:
    model = load(observed, dtype)
    steps = list(our_steps(model, observed["tokens"], observed["labels"], STEPS))
    after = relative_differences(steps[-1]["adapter"], group(observed, "trained"))
    parts = {
        "losses": max(relative_difference(s["loss"], x) for s, x in zip(steps, observed["losses"], strict=True)),
        "adapter after them": max(after.values()),
    }
    return _with_gradients(parts, observed, steps[0]["gradients"])


def _with_gradients(parts: dict[str, float], observed: Observed, grads: dict[str, np.ndarray]) -> Outcome:
    expected = group(observed, "gradient")
    differences = relative_differences(grads, expected)
    worst = max(differences, key=differences.__getitem__)
    parts |= {f"{len(expected)} gradients": differences[worst]}
    return Outcome(parts, sum(x.size for x in expected.values()), f"worst gradient: {worst}")


def our_steps(
    ours: Model, tokens: np.ndarray, labels: np.ndarray, steps: int, **changes: Any
) -> Iterator[dict[str, Any]]:
    """For each step: the loss, the gradients before clipping, their norm, and the adapter after the step."""
    optimizer = AdamW(ours.trainable(), **STEP | changes)
    for _ in range(steps):
        logits, cache = ours.forward(tokens)
        loss, dlogits = cross_entropy(logits, shifted(labels))
        grads = ours.backward(dlogits, cache)
        before = {name: g.copy() for name, g in grads.items()}
        norm = clip_by_global_norm(grads, MAX_NORM)
        optimizer.step(grads)
        after = {name: p.copy() for name, p in ours.trainable().items()}
        yield {"loss": loss, "gradients": before, "norm": norm, "adapter": after}


# ---- AdamW alone -------------------------------------------------------------------------------------------

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def observe_adamw(seed: int, size: int) -> Observed:
    """STEPS updates with random gradients, and the state after them; only the matrix has weight decay."""
    from . import oracles

    rng, n = np.random.default_rng(seed), size // 100
    shapes = {"matrix": (10 + n // 20, 20), "norm": (37 + n // 30,)}
    draw = partial(_draw, rng, shapes)
    start, grads = draw(1.0), [draw(0.01) for _ in range(STEPS)]
    observed = _named("start", start)
    for name in shapes:
        observed[f"gradient/{name}"] = np.stack([g[name] for g in grads])
    for part, tensors in oracles.their_adamw(start, grads, {"matrix"}, ADAMW).items():
        observed |= _named(part, tensors)
    return observed


def _draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], scale: float) -> dict[str, np.ndarray]:
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


def compare_adamw(observed: Observed) -> Outcome:
    params = {name: p.copy() for name, p in group(observed, "start").items()}
    optimizer = AdamW(params, **ADAMW, decay={"matrix"})
    grads = group(observed, "gradient")
    for step in range(STEPS):
        optimizer.step({name: g[step] for name, g in grads.items()})
    state = {"params": params, "m": optimizer.state["m"], "v": optimizer.state["v"]}
    parts = {part: max(relative_differences(x, group(observed, part)).values()) for part, x in state.items()}
    return Outcome(parts, sum(p.size for p in params.values()))
