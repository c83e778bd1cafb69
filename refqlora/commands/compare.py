"""Claims about LoRA and QLoRA, measured: cheaper training, modular adapters, nothing forgotten; what merging costs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from ..backend import keep_freed_memory
from ..files.writing import write_json
from ..memory.setup import take_step
from ..model import Model
from ..optim import AdamW
from ..text import corpus
from ..text.dataset import Dataset, batch_indices
from ..text.encoding import pack
from ..training import Row, TrainingConfig, evaluate, train
from .demo import ADAPTER, TRAINING, bundled, docstring_task, measure_step, plain_source, training_config
from .info import machine
from .merge import merge_in_memory
from .options import console, count, json_option, number_table, out_option, report, seed_option, show
from .progress import progress

if TYPE_CHECKING:
    from rich.table import Table

RANKS = (1, 2, 4, 8, 16, 64)
WAYS = {  # of merging: what the table says, merge.INTO's word, the dtype that the weights are rounded to
    "original": ("into the original weights", "original", "float32"),
    "dequantised": ("into the dequantised base", "dequantised", "float32"),
    "bfloat16": ("the same, rounded to bfloat16", "dequantised", "bfloat16"),
    "nf4": ("into 4 bits again", "nf4", "float32"),
}
TURNS = 25  # steps of each method that are timed
FULL_LR = 2e-4  # full fine-tuning's learning rate: the best of 1e-4, 2e-4, 5e-4 and 1e-3 on this task


def compare(out: Path, console: Console, *, steps: int = 300, seed: int = 0) -> dict[str, Any]:
    """Train with every method on the docstring task, with the same base, data, steps and seed; print and return the
    results.

    The new task's loss is measured on held-out docstrings, the old task's (the base's own) on held-out source.
    """
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer, eos = bundled()
    task, held_out = docstring_task(tokenizer, eos)
    source = plain_source(tokenizer, eos, base.config.max_positions)
    rows, merging = [], {}
    for method, rank in _methods():
        title = method if rank is None else f"{method} r={rank}"
        recipe = training_config(steps, seed, **({"lr": FULL_LR} if rank is None else {}))
        with progress(title, steps, console.quiet) as bar:
            model, row = fine_tuned(method, rank, task, held_out, source, recipe, bar)
        rows.append(row)
        if (method, rank) == ("QLoRA", ADAPTER["rank"]):
            merging = merging_losses(model, held_out)
    for row, seconds in zip(rows, seconds_in_turns(task, seed, min(steps, TURNS)), strict=True):
        row["seconds_per_step"] = seconds
    show(console, methods_table(rows, steps))
    show(console, merging_table(merging))
    modular = modularity(task, held_out, steps, seed, console.quiet)
    show(console, modularity_table(modular))
    facts = {"steps": steps, "seed": seed, "machine": machine(), "methods": rows}
    facts |= {"merging": merging, "modularity": modular}
    write_json(out / "compare.json", facts)
    show(console, f"Wrote {out}/compare.json")
    return facts


def _methods() -> Iterator[tuple[str, int | None]]:
    yield "full", None
    for method in ("LoRA", "QLoRA"):
        for rank in RANKS:
            yield method, rank


def _start(method: str, rank: int | None, seed: int) -> Model:
    """The bundled base, to be trained in full, or with a new adapter."""
    model, _, _ = bundled(quantize="nf4" if method == "QLoRA" else None)
    if rank is not None:
        model.add_adapter(rank=rank, alpha=2 * rank, seed=seed)
    return model


def seconds_in_turns(task: Dataset, seed: int, turns: int) -> list[float]:
    """The seconds of a training step by each method: the median of `turns` steps. The methods take turns, so that what
    else the machine does slows all of them alike."""
    models = [_start(method, rank, seed) for method, rank in _methods()]
    optimizers = [AdamW(model.trainable()) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(turns):
        tokens, labels = task.batch(batch_indices(len(task), TRAINING["batch_size"], turn, seed))
        for model, optimizer, taken in zip(models, optimizers, seconds, strict=True):
            begin = time.perf_counter()
            take_step(model, optimizer, tokens, labels)
            taken.append(time.perf_counter() - begin)
    return [float(np.median(taken)) for taken in seconds]


def fine_tuned(
    method: str,
    rank: int | None,
    task: Dataset,
    held_out: Dataset,
    source: Dataset,
    config: TrainingConfig,
    on_step: Callable[[Row], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train the bundled base on `task`, in full or with an adapter of `rank` and alpha = 2 rank -> the model, and a row
    of facts: bytes, learning rate, and the losses before and after, on `held_out` (new) and on `source` (old)."""
    model = _start(method, rank, config.seed)
    active = model.active
    model.set_adapter(None)
    old, new = evaluate(model, source).loss, evaluate(model, held_out).loss
    model.set_adapter(active)
    nbytes = measure_step(model, task)
    train(model, task, config, on_step=on_step)
    return model, {
        "method": method,
        "rank": rank,
        "trainable": sum(p.size for p in model.trainable().values()),
        "bytes": nbytes["total"],
        "lr": config.lr,
        "new_before": new,
        "new_after": evaluate(model, held_out).loss,
        "old_before": old,
        "old_after": evaluate(model, source).loss,
    }


def merging_losses(model: Model, held_out: Dataset) -> dict[str, dict[str, float]]:
    """The active adapter of `model`, the bundled base in NF4, merged in each of WAYS: -> {way: {"loss": on `held_out`,
    "error": the distance from the weights that were trained, as a multiple of the adapter's change}}.

    Before them comes "adapter", kept separate, and after them "none", the base alone.
    """
    active = model.active
    assert active is not None
    rows = {"adapter": {"loss": evaluate(model, held_out).loss, "error": 0.0}}
    for way, (_, into, dtype) in WAYS.items():
        merged, _, _ = bundled()
        error = merge_in_memory(merged, {active: model.adapters[active]}, into, dtype)
        rows[way] = {"loss": evaluate(merged, held_out).loss, "error": error}
    model.set_adapter(None)
    rows["none"] = {"loss": evaluate(model, held_out).loss, "error": 1.0}
    model.set_adapter(active)
    return rows


def modularity(
    task: Dataset, held_out: Dataset, steps: int, seed: int, quiet: bool = False
) -> dict[str, dict[str, float]]:
    """Train two adapters on one quantised base, one on docstrings and one on the language reference.

    -> {adapter, or "none" for the base alone: {domain: held-out loss}}.
    """
    model, tokenizer, eos = bundled(quantize="nf4")
    context = model.config.max_positions
    text, unseen = (pack(corpus.language_reference(h), tokenizer, context, eos) for h in (False, True))
    domains = {"docstrings": (task, held_out), "language reference": (text, unseen)}
    for domain, (text, _) in domains.items():
        model.add_adapter(domain, rank=16, alpha=32, seed=seed)
        # A block of prose has several times as many tokens as a docstring, so fewer steps suffice.
        config = training_config(steps if domain == "docstrings" else math.ceil(steps / 3), seed)
        with progress(domain, config.steps, quiet) as bar:
            train(model, text, config, on_step=bar)
    return losses_of_each(model, {domain: unseen for domain, (_, unseen) in domains.items()})


def losses_of_each(model: Model, domains: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
    """The base alone ("none") and with each of its adapters, on the held-out text of each domain: -> {adapter: {domain:
    loss}}. The active adapter stays what it was."""
    active, losses = model.active, {}
    for adapter in (None, *model.adapters):
        model.set_adapter(adapter)
        losses[adapter or "none"] = {domain: evaluate(model, unseen).loss for domain, unseen in domains.items()}
    model.set_adapter(active)
    return losses


def methods_table(rows: list[dict[str, Any]], steps: int) -> Table:
    title = f"{steps} steps on docstrings; held-out losses in nats a token"
    columns = ("r", "lr", "trainable", "bytes*", "s/step", "new task", "change", "old task", "forgotten")
    table = number_table(title, "method", *columns)
    for row in rows:
        table.add_row(
            row["method"],
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['lr']:g}",
            f"{row['trainable']:,}",
            f"{row['bytes']:,}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['new_after']:.4f}",
            f"{row['new_after'] - row['new_before']:+.4f}",
            f"{row['old_after']:.4f}",
            f"{row['old_after'] - row['old_before']:+.4f}",
        )
    table.caption = (
        "* weights, constants, adapter, gradients and AdamW's moments; with its adapter off, a model forgets nothing"
    )
    return table


def merging_table(rows: dict[str, dict[str, float]]) -> Table:
    said = {"adapter": "kept separate", "none": "the base alone"} | {way: said for way, (said, _, _) in WAYS.items()}
    table = number_table(f"QLoRA r={ADAPTER['rank']}, merged: held-out loss", "adapter", "loss", "error*")
    for way, row in rows.items():
        table.add_row(said[way], f"{row['loss']:.4f}", f"{row['error']:.3g}")
    table.caption = "* distance from the weights that were trained, relative to the adapter's change"
    return table


def modularity_table(losses: dict[str, dict[str, float]]) -> Table:
    table = number_table("two adapters on one base: held-out loss in each domain", "adapter", *losses["none"])
    for adapter, row in losses.items():
        table.add_row(adapter, *(f"{loss:.4f}" for loss in row.values()))
    return table


# ---- the command ----

MORE = "Every method has the same base, data, steps and seed. Takes about twenty minutes on 2 cores."


def add(options: argparse.ArgumentParser) -> None:
    out_option(options, "refqlora-demo")
    options.add_argument("--steps", type=count, default=300, help="training steps for each method")
    seed_option(options)
    json_option(options)


def run(a: argparse.Namespace) -> None:
    report(a, compare(a.out, console(a), steps=a.steps, seed=a.seed))
