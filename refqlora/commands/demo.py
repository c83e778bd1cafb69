"""The main job, end to end: the bundled base, quantised to NF4, learns to write docstrings through LoRA adapters.

The text is the running Python's own standard library. The modules held out here were also held out when the base was
trained, so that all losses are measured on text that the model has never seen.
"""

from __future__ import annotations

import argparse
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from ..backend import keep_freed_memory
from ..figures import write_figure
from ..figures.loss import held_out_losses, loss_figure
from ..files.hub import BUNDLED
from ..memory.held import training_bytes
from ..model import Model
from ..optim import AdamW
from ..quantization_error import Error, quantization_error
from ..resume import check_start
from ..text import corpus
from ..text.dataset import Dataset
from ..text.encoding import pack, tokenize_examples
from ..text.generation import complete
from ..text.tokenizer import load_tokenizer
from ..training import TrainingConfig, evaluate, loss_and_gradients, train
from .options import common, console, count, out_option, report, show
from .progress import progress

MAX_LENGTH = 128  # tokens of a signature and its docstring; nearly all are shorter
# Held-out functions from different modules whose docstrings are shown.
SHOWN = ("set_tunnel", "split_header_words", "_find_lineno", "guess_type", "send_error", "isleap")
PENALTY = 1.2  # against repetition: a small model that takes the most probable token each time falls into loops

ADAPTER: dict[str, Any] = {"rank": 16, "alpha": 32}
TRAINING: dict[str, Any] = {"batch_size": 16, "lr": 2e-3, "schedule": "cosine", "warmup": 20}


def bundled(quantize: str | None = None) -> tuple[Model, Tokenizer, int]:
    """The bundled base, its tokenizer, and the token that ends a text."""
    model = Model.from_pretrained(BUNDLED, quantize=quantize)
    return model, load_tokenizer(BUNDLED), model.config.ends[0]


def docstring_task(tokenizer: Tokenizer, eos_id: int, every: int = 1) -> tuple[Dataset, Dataset]:
    """(training, held-out): signature -> first line of the docstring, the loss on the docstring only.

    every: of the modules to train on, take one in so many.
    """
    examples = (corpus.docstring_examples(held_out, every) for held_out in (False, True))
    train_set, held_out = (tokenize_examples(list(e), tokenizer, MAX_LENGTH, eos_id) for e in examples)
    return train_set, held_out


def plain_source(tokenizer: Tokenizer, eos_id: int, block_size: int) -> Dataset:
    """Every eighth block of the held-out modules' source: the base's own task, to measure what it forgets."""
    blocks = pack(corpus.modules(held_out=True), tokenizer, block_size, eos_id)
    return blocks.subset(range(0, len(blocks), 8))


def training_config(steps: int, seed: int, **options: Any) -> TrainingConfig:
    """How the adapters learn the task; `options` replace settings. In a short run the warm-up is shorter too."""
    return TrainingConfig(
        steps=steps, seed=seed, **{**TRAINING, "warmup": min(TRAINING["warmup"], steps // 2), **options}
    )


def demo(out: Path, console: Console, *, steps: int = 300, seed: int = 0, resume: bool = False) -> dict[str, Any]:
    """Quantise, fine-tune and compare, printing each part; write adapter, metrics and figure to `out`; -> results."""
    check_start(out, resume)
    keep_freed_memory()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, eos = bundled()
    train_set, held_out = docstring_task(tokenizer, eos)
    source = plain_source(tokenizer, eos, model.config.max_positions)
    facts: dict[str, Any] = {"steps": steps, "seed": seed, "repetition_penalty": PENALTY}

    def section(heading: str, text: str) -> None:
        console.print(f"{heading}\n", style="bold", highlight=False)
        show(console, textwrap.indent(text, "   "))

    bits = facts["source_bits_per_byte"] = {"dense": evaluate(model, source).bits_per_byte}
    facts["quantization"] = quantize_and_measure(model)
    bits["nf4"] = evaluate(model, source).bits_per_byte
    section(
        "1. The base, quantised to NF4 (blocks of 64, constants double-quantised in blocks of 256)",
        quantization_text(facts),
    )

    some_source, _ = source.batch(range(4))
    base_logits = model.forward(some_source)[0]
    before = evaluate(model, held_out)
    shown = pick_examples()

    def write(max_new_tokens: int) -> list[str]:
        how = {"max_new_tokens": max_new_tokens, "repetition_penalty": PENALTY, "stop": (eos,)}
        return [complete(model, example.prompt, tokenizer=tokenizer, **how) for example in shown]

    written_before = write(40)
    model.add_adapter(**ADAPTER, seed=seed)
    facts["bytes"] = measure_step(model, train_set)
    facts["full_bytes"] = full_finetuning_bytes(facts["quantization"]["model_float32_bytes"])
    facts["trainable_parameters"] = sum(p.size for p in model.trainable().values())
    section(f"2. Adapters of rank {ADAPTER['rank']} on every linear layer", bytes_text(facts))

    heading = f"3. {steps} steps on {len(train_set):,} functions, {len(held_out)} others held out\n"
    console.print(heading, style="bold", highlight=False)
    config = training_config(steps, seed, eval_every=max(1, steps // 6))
    with progress("fine-tuning", steps, console.quiet) as bar:
        rows = train(model, train_set, config, held_out=held_out, out=out, resume=resume, on_step=bar)
    after = evaluate(model, held_out)
    facts["seconds_per_step"] = float(np.median([row["seconds"] for row in rows]))
    facts["held_out_loss"] = {"before": before.loss, "after": after.loss}
    written_after = write(60)
    bits["adapter"] = evaluate(model, source).bits_per_byte
    model.set_adapter(None)
    bits["off"] = evaluate(model, source).bits_per_byte
    facts["off_is_base"] = bool(np.array_equal(model.forward(some_source)[0], base_logits))
    model.set_adapter("default")
    show(console, textwrap.indent(training_text(facts), "   "))

    facts["written"] = [
        {"prompt": example.prompt, "before": old, "after": new, "library": example.completion}
        for example, old, new in zip(shown, written_before, written_after, strict=True)
    ]
    section(
        f"4. Docstrings of functions it has never seen (greedy, repetition penalty {PENALTY})",
        written_text(facts, min(100, console.width)),
    )

    model.save_adapter(out, base="refqlora")
    write_figure(
        out / "loss.png",
        loss_figure(rows, held_out_losses(rows, before.loss, after.loss), "Learning to write docstrings"),
    )
    facts["seconds"] = time.perf_counter() - started
    written = f"Wrote {out}/: adapter_model.safetensors, adapter_config.json, metrics.jsonl, loss.png"
    show(console, f"{written}\n{facts['seconds']:.0f} seconds in total")
    return facts


# ---- its parts: measurements, and the text that shows them ----


def quantize_and_measure(model: Model) -> dict[str, Any]:
    """Quantise the model's linears in place; -> sizes before and after, and the error relative to the weights."""
    dense = {name: model.params[name + ".weight"] for name in model.config.linears()}
    model_bytes = sum(p.nbytes for p in model.params.values())
    parameters = sum(p.size for p in model.params.values())
    model.quantize()
    packed = {name: model.params[name + ".weight"] for name in dense}
    size = sum(w.size for w in dense.values())
    nbytes = sum(q.nbytes for q in packed.values())
    error = sum((quantization_error(w, packed[name]) for name, w in dense.items()), Error())
    return {
        "linears": len(dense),
        "parameters": size,
        "model_parameters": parameters,
        "float32_bytes": sum(w.nbytes for w in dense.values()),
        "nf4_bytes": nbytes,
        "bits_per_param": 8 * nbytes / size,
        "model_float32_bytes": model_bytes,
        "model_bytes": sum(p.nbytes for p in model.params.values()),
        "relative_error": error.relative,
    }


def quantization_text(facts: dict[str, Any]) -> str:
    q, bits = facts["quantization"], facts["source_bits_per_byte"]
    return f"""\
{q["linears"]} linear layers      {q["parameters"]:,} of the model's {q["model_parameters"]:,} weights
their bytes           {q["float32_bytes"]:,} in float32 -> {q["nf4_bytes"]:,}
bits a parameter      32 -> {q["bits_per_param"]:.4f} (4, plus the blocks' constants)
the whole model       {q["model_float32_bytes"]:,} -> {q["model_bytes"]:,} bytes (the rest stays float32)
error                 {100 * q["relative_error"]:.2f} % of the weights' root mean square
held-out source       {bits["dense"]:.4f} bits a byte before, {bits["nf4"]:.4f} after

Bits a byte: how far the model's predictions would compress a text; 8 means no compression.
"""


def measure_step(model: Model, dataset: Dataset) -> dict[str, int]:
    """Bytes of the arrays that one training step holds, measured on real gradients and a real optimiser; all weights
    that are not in 4 bits together as "dense"."""
    _, grads = loss_and_gradients(model, *dataset.batch([0]))
    parts = training_bytes(model, grads, AdamW(model.trainable()))
    parts["dense"] = sum(parts.get(category, 0) for category in ("embeddings", "linears", "norms", "head"))
    return {part: parts.get(part, 0) for part in BYTES_OF}


def full_finetuning_bytes(weights: int) -> dict[str, int]:
    """The same for full fine-tuning: gradients as large as the weights, and AdamW's two moments."""
    return {"dense": weights, "gradients": weights, "optimizer": 2 * weights, "total": 4 * weights}


BYTES_OF = {
    "codes": "weights, 4-bit codes",
    "constants": "their constants",
    "dense": "weights, float32",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "total": "total",
}


def bytes_text(facts: dict[str, Any]) -> str:
    total, trainable, rank = facts["quantization"]["model_parameters"], facts["trainable_parameters"], ADAPTER["rank"]
    lines = [
        f"trainable             {trainable:,} of {total:,} ({100 * trainable / total:.1f} %)",
        f"{'bytes held':20}{'QLoRA':>12}{'full fine-tuning':>20}",
    ]
    for part, size in facts["bytes"].items():
        full = f"{facts['full_bytes'][part]:,}" if part in facts["full_bytes"] else ""
        lines.append(f"{BYTES_OF[part]:20}{size:>12,}{full:>20}".rstrip())
    lines += [
        "",
        f"Rank {rank}: B (out x {rank}) times A ({rank} x in), both trained, is added to each W (out x in).",
    ]
    return "\n".join(lines) + "\n"


def training_text(facts: dict[str, Any]) -> str:
    loss, bits = facts["held_out_loss"], facts["source_bits_per_byte"]
    as_before = "as before, to the bit: nothing is forgotten" if facts["off_is_base"] else "NOT as before"
    return f"""\
held-out docstrings   loss {loss["before"]:.4f} before, {loss["after"]:.4f} after (nats a token)
the right token is    {math.exp(loss["before"] - loss["after"]):.2f} times as probable as before, on average
a step                {facts["seconds_per_step"]:.3f} s (median)
source, adapter on    {bits["adapter"]:.4f} bits a byte, {bits["nf4"]:.4f} before: the new task's cost to the old one
source, adapter off   {bits["off"]:.4f} bits a byte, {as_before}

Nats a token: minus the natural logarithm of the right token's probability; 0 means certainty.
"""


def pick_examples() -> list[corpus.Example]:
    """The held-out examples to show: those named in SHOWN that this Python has, and others in place of the rest."""
    examples = corpus.docstring_examples(held_out=True)
    named = [next((e for e in examples if e.prompt.startswith(f"def {name}(")), None) for name in SHOWN]
    found = [e for e in named if e is not None]
    return (found + [e for e in examples if e not in found])[: len(SHOWN)]


def written_text(facts: dict[str, Any], width: int) -> str:
    lines = ["So small a model learns what a docstring looks like, but mostly guesses what a function does.", ""]
    for example in facts["written"]:
        lines += [example["prompt"].strip()]
        lines += [f"  {label:8} {one_line(example[label], width - 14)}" for label in ("before", "after", "library")]
        lines += [""]
    return "\n".join(lines)


def one_line(text: str, longest: int) -> str:
    """The text on one line, its line ends shown as ⏎, cut if it is long."""
    line = " ".join(text.strip().replace("\n", " ⏎ ").split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


# ---- the command ----

MORE = "The text is the running Python's own standard library; nothing is downloaded. Takes 76 seconds on 2 cores."


def add(options: argparse.ArgumentParser) -> None:
    out_option(options, "refqlora-demo")
    options.add_argument("--steps", type=count, default=300, help="training steps")
    common(options)


def run(a: argparse.Namespace) -> None:
    report(a, demo(a.out, console(a), steps=a.steps, seed=a.seed, resume=a.resume))
