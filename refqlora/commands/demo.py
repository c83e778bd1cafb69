"""The main job, end to end: the bundled base, quantised to NF4, learns to write docstrings through LoRA adapters.

The text is the running Python's own standard library. Modules that are held out here were held out when the base was
trained, so that no figure below is of text the model has seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from ..backend import keep_freed_memory
from ..figures.loss import loss_figure
from ..files.hub import BUNDLED
from ..memory.held import training_bytes
from ..model import Model
from ..optim import AdamW
from ..quantization import QuantizedTensor, dequantize
from ..text import corpus
from ..text.dataset import Dataset
from ..text.encoding import pack, tokenize_examples
from ..text.generation import complete
from ..text.tokenizer import load_tokenizer
from ..training import TrainingConfig, evaluate, loss_and_gradients, train
from .options import common, console, count, report

MAX_LENGTH = 128  # tokens of a signature and its docstring; nearly all are shorter
SHOWN = ("isleap", "addHandler", "formatyear")  # held-out functions whose docstrings are written out

ADAPTER = {"rank": 16, "alpha": 32}
TRAINING = {"batch_size": 16, "lr": 2e-3, "schedule": "cosine", "warmup": 20}


def docstring_task(tokenizer: Tokenizer, eos_id: int) -> tuple[Dataset, Dataset]:
    """(training, held-out): signature -> first line of the docstring, the loss on the docstring only."""
    examples = (corpus.docstring_examples(held_out) for held_out in (False, True))
    train_set, held_out = (tokenize_examples(list(e), tokenizer, MAX_LENGTH, eos_id) for e in examples)
    return train_set, held_out


def plain_source(tokenizer: Tokenizer, eos_id: int, block_size: int) -> Dataset:
    """Every eighth block of the held-out modules' source: what the base was trained for, to see what is forgotten."""
    blocks = pack(corpus.modules(held_out=True), tokenizer, block_size, eos_id)
    return blocks.subset(range(0, len(blocks), 8))


def training_config(steps: int, seed: int, **options: Any) -> TrainingConfig:
    """How the adapters learn the task, `options` aside; a run too short for the warm-up has a shorter one."""
    return TrainingConfig(
        steps=steps, seed=seed, **{**TRAINING, "warmup": min(TRAINING["warmup"], steps // 2), **options}
    )


def demo(out: Path, console: Console, *, steps: int = 300, seed: int = 0, resume: bool = False) -> dict[str, Any]:
    """Quantise, fine-tune, compare; print it as it goes; write adapter, metrics and figure to `out`; -> the figures."""
    keep_freed_memory()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model = Model.from_pretrained(BUNDLED)
    tokenizer = load_tokenizer(BUNDLED)
    eos = model.config.eos_token_id
    train_set, held_out = docstring_task(tokenizer, eos)
    source = plain_source(tokenizer, eos, model.config.max_positions)
    facts: dict[str, Any] = {"steps": steps, "seed": seed}

    console.print(
        "[bold]1. The base, quantised to NF4[/] (blocks of 64, constants double-quantised in blocks of 256)\n"
    )
    facts["source_bits_per_byte"] = {"dense": evaluate(model, source).bits_per_byte}
    facts["quantization"] = q = quantize_and_measure(model)
    facts["source_bits_per_byte"]["nf4"] = evaluate(model, source).bits_per_byte
    console.print(
        f"   {q['linears']} linear layers      {q['parameters']:,} weights of the model's {q['model_parameters']:,}"
    )
    console.print(f"   their bytes           {q['float32_bytes']:,} in float32 -> {q['nf4_bytes']:,}")
    console.print(f"   bits a parameter      32 -> {q['bits_per_param']:.4f}")
    console.print(
        f"   the whole model       {q['model_float32_bytes']:,} -> {q['model_bytes']:,} bytes (the rest stays float32)"
    )
    console.print(f"   error                 {100 * q['relative_error']:.2f} % of the weights' root mean square")
    bits = facts["source_bits_per_byte"]
    console.print(f"   held-out source       {bits['dense']:.4f} bits a byte before, {bits['nf4']:.4f} after\n")

    some_source, _ = source.batch(range(4))
    base_logits = model.forward(some_source)[0]
    before = evaluate(model, held_out)
    shown = pick_examples()
    written_before = [complete(model, e.prompt, tokenizer=tokenizer, max_new_tokens=40, stop=(eos,)) for e in shown]

    model.add_adapter(**ADAPTER, seed=seed)
    facts["bytes"] = measure_step(model, train_set)
    facts["trainable_parameters"] = sum(p.size for p in model.trainable().values())
    share = facts["trainable_parameters"] / q["model_parameters"]
    console.print(f"[bold]2. Adapters of rank {ADAPTER['rank']} on every linear layer[/]\n")
    console.print(
        f"   trainable             {facts['trainable_parameters']:,} of {q['model_parameters']:,} ({100 * share:.1f} %)"
    )
    for part, size in facts["bytes"].items():
        console.print(f"   {BYTES_OF[part]:21} {size:>10,} bytes")

    console.print(
        f"\n[bold]3. {steps} steps on {len(train_set):,} functions[/] of the library, {len(held_out)} others held out\n"
    )
    config = training_config(steps, seed, eval_every=max(1, steps // 6))
    rows = train(model, train_set, config, held_out=held_out, out=out, resume=resume, title="fine-tuning")
    after = evaluate(model, held_out)
    facts["seconds_per_step"] = float(np.median([row["seconds"] for row in rows]))
    facts["held_out_loss"] = {"before": before.loss, "after": after.loss}
    console.print(f"   held-out docstrings   loss {before.loss:.4f} before, {after.loss:.4f} after (nats a token)")
    console.print(f"   a step                {facts['seconds_per_step']:.3f} s (median)")

    bits["adapter"] = evaluate(model, source).bits_per_byte
    model.set_adapter(None)
    bits["off"] = evaluate(model, source).bits_per_byte
    facts["off_is_base"] = bool(np.array_equal(model.forward(some_source)[0], base_logits))
    same = "as before, to the bit: nothing is forgotten" if facts["off_is_base"] else "NOT as before"
    console.print(
        f"   held-out source       {bits['adapter']:.4f} bits a byte with the adapter on, {bits['off']:.4f} off: {same}"
    )
    model.set_adapter("default")

    console.print("\n[bold]4. Docstrings of functions it has never seen[/]\n")
    facts["written"] = []
    for example, text in zip(shown, written_before, strict=True):
        written = complete(model, example.prompt, tokenizer=tokenizer, max_new_tokens=60, stop=(eos,))
        facts["written"].append(
            {"prompt": example.prompt, "before": text, "after": written, "library": example.completion}
        )
        console.print(f"   {example.prompt.strip()}", style="bold cyan", highlight=False, markup=False)
        for label, body in (("before", text), ("after", written), ("library", example.completion)):
            console.print(
                f"     {label:8} {one_line(body)}", highlight=False, markup=False, no_wrap=True, overflow="ellipsis"
            )
        console.print()

    model.save_adapter(out, base="refqlora")
    loss_figure(out / "loss.png", rows, "learning to write docstrings")
    facts["seconds"] = time.perf_counter() - started
    console.print(
        f"Wrote {out}/: adapter_model.safetensors, adapter_config.json, metrics.jsonl, loss.png",
        highlight=False,
        markup=False,
    )
    console.print(f"{facts['seconds']:.0f} seconds in all", highlight=False)
    return facts


BYTES_OF = {
    "codes": "weights, 4-bit codes",
    "constants": "their constants",
    "dense": "weights, float32",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "total": "in all",
}


def quantize_and_measure(model: Model) -> dict[str, Any]:
    """Quantise the model's linears in place; -> sizes before and after, and the error relative to the weights' size."""
    dense = {name: model.params[name + ".weight"] for name in model.config.linears()}
    model_bytes = sum(p.nbytes for p in model.params.values())
    parameters = sum(p.size for p in model.params.values())
    model.quantize()
    packed: dict[str, QuantizedTensor] = {name: model.params[name + ".weight"] for name in dense}
    size = sum(w.size for w in dense.values())
    nbytes = sum(q.nbytes for q in packed.values())
    error = sum(float(np.square(dequantize(packed[name]) - w, dtype=np.float64).sum()) for name, w in dense.items())
    square = sum(float(np.square(w, dtype=np.float64).sum()) for w in dense.values())
    return {
        "linears": len(dense),
        "parameters": size,
        "model_parameters": parameters,
        "float32_bytes": sum(w.nbytes for w in dense.values()),
        "nf4_bytes": nbytes,
        "bits_per_param": 8 * nbytes / size,
        "model_float32_bytes": model_bytes,
        "model_bytes": sum(p.nbytes for p in model.params.values()),
        "relative_error": (error / square) ** 0.5,
    }


def measure_step(model: Model, dataset: Dataset) -> dict[str, int]:
    """Bytes of the arrays of one training step, its gradients and optimiser really made."""
    _, grads = loss_and_gradients(model, *dataset.batch([0]))
    return training_bytes(model, grads, AdamW(model.trainable()))


def pick_examples() -> list[corpus.Example]:
    """The held-out examples that are shown: those named in SHOWN where this Python has them, else the next ones."""
    examples = corpus.docstring_examples(held_out=True)
    named = [e for name in SHOWN for e in examples if e.prompt.startswith(f"def {name}(")]
    return (named + [e for e in examples if e not in named])[: len(SHOWN)]


def one_line(text: str) -> str:
    """The text with its line ends shown."""
    return text.strip().replace("\n", "⏎ ")


# ---- the command ----


MORE = "The text is the running Python's own standard library; nothing is downloaded."


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--out", type=Path, default=Path("refqlora-demo"), help="directory to write to")
    options.add_argument("--steps", type=count, default=300, help="training steps")
    common(options)


def run(a: argparse.Namespace) -> None:
    report(a, demo(a.out, console(a), steps=a.steps, seed=a.seed, resume=a.resume))
