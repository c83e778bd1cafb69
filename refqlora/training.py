"""The training loop: batches, gradients, clipping, AdamW, evaluation, metrics, and checkpoints that survive a kill.

Everything random is a function of the seed and the step's number: which examples a step sees, and its dropout masks.
So the state of a run is its step, the trained parameters and the optimiser's moments: one file holds them, and a run
that is killed and resumed ends with the same bits as one never interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .backend import Array
from .functional import IGNORE, cross_entropy
from .model import Model
from .optim import AdamW, clip_by_global_norm, learning_rate
from .resume import (
    CHECKPOINT,
    METRICS,
    identity,
    load_checkpoint,
    read_rows,
    refuse_unfinished,
    save_checkpoint,
    write_rows,
)
from .text.dataset import Dataset, batch_indices


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are for adapters; a step is one update from `batch_size` examples.

    micro_batch_size: how many examples go through the model at once; the gradients of a step's micro-batches add up
    to those of the whole batch. recompute: gradient checkpointing. max_grad_norm: 0 turns clipping off. warmup and
    floor shape the schedule (optim.learning_rate). Steps are counted, not epochs. Raises ValueError for a setting that
    cannot be used.
    """

    steps: int
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 2e-4
    schedule: str = "constant"
    warmup: int = 0
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    recompute: bool = False
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "micro_batch_size", "warmup", "seed", "eval_every", "checkpoint_every"):
            value, least = getattr(self, field), 0 if field in ("warmup", "seed", "eval_every") else 1
            if field == "micro_batch_size" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field} must be a whole number of {least} or more, not {value!r}")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm must be 0 or more, not {self.max_grad_norm!r}")
        AdamW({"": np.zeros(1)}, self.lr, self.betas, 1e-8, self.weight_decay)  # raises for what it cannot use
        self.learning_rate(0)  # so does this, and here nothing has been done yet

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.lr,
            schedule=self.schedule,
            warmup_steps=self.warmup,
            total_steps=self.steps,
            floor=self.floor,
        )


class Evaluation(NamedTuple):
    """loss: nats a counted token. tokens: how many counted. bits_per_byte: of the text that they stand for."""

    loss: float
    tokens: int
    bits_per_byte: float


def evaluate(model: Model, dataset: Dataset, batch_size: int = 16) -> Evaluation:
    """The mean loss over every counted token of `dataset`, without dropout.

    Raises ValueError if none stands for any text, FloatingPointError if the loss is not finite.
    """
    nbytes = dataset.counted_bytes
    if nbytes == 0:
        raise ValueError("nothing to evaluate: no label counts but those of special tokens")
    total, count = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        tokens, labels = dataset.batch(np.arange(start, min(start + batch_size, len(dataset))))
        n = int((labels != IGNORE).sum())
        if n:
            logits, _ = model.forward(tokens, recompute=True)  # so that no layer's cache is kept
            total += cross_entropy(logits, labels, denominator=1)[0]
            count += n
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss over {count} tokens is {total}: the model has diverged")
    return Evaluation(total / count, count, total / math.log(2) / nbytes)


def loss_and_gradients(
    model: Model,
    tokens: Array,
    labels: Array,
    *,
    micro_batch_size: int | None = None,
    rng: np.random.Generator | None = None,
    recompute: bool = False,
) -> tuple[float, dict[str, Array]]:
    """The mean loss over the counted labels of tokens, labels (B, T), and the gradient of every trainable parameter.

    The batch goes through in micro-batches, each divided by the count of the *whole* batch: what adds up is the
    gradient of the whole batch, also where micro-batches count different numbers of tokens.
    """
    count = int((labels != IGNORE).sum())
    loss, grads = 0.0, {}
    size = micro_batch_size or len(tokens)
    for start in range(0, len(tokens), size):
        logits, cache = model.forward(tokens[start : start + size], rng=rng, recompute=recompute)
        part, dlogits = cross_entropy(logits, labels[start : start + size], denominator=count)
        del logits
        dparams = model.backward(dlogits, cache)
        loss += part
        for name, g in dparams.items():
            if name in grads:
                grads[name] += g
            else:
                grads[name] = g
    return loss, grads


def train(
    model: Model,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    held_out: Dataset | None = None,
    out: Path | None = None,
    resume: bool = False,
    title: str = "training",
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train `model.trainable()` in place on `dataset`; return one row of metrics a step.

    A row has step (from 1), loss, lr, grad_norm, tokens (counted labels), seconds, and held_out_loss every
    `eval_every` steps. With `out`, the rows go to out/metrics.jsonl and the state to out/checkpoint.safetensors,
    every `checkpoint_every` steps and at the end; `resume` continues from there (and starts anew where there is
    none). Raises ValueError for a checkpoint of another run, or of an unfinished one that is not resumed, and
    FloatingPointError when the gradient is not finite.
    """
    params = model.trainable()
    # Weight decay is for matrices: it would pull norms' weights from 1 and biases from where the data puts them.
    optimizer = AdamW(params, config.lr, config.betas, 1e-8, config.weight_decay, lambda name: params[name].ndim > 1)
    rows: list[dict[str, Any]] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        run = identity(model, dataset, config)
        if not resume:
            refuse_unfinished(out / CHECKPOINT)
            (out / CHECKPOINT).unlink(missing_ok=True)  # a finished run's: what is resumed from now on is this one
        elif (out / CHECKPOINT).is_file():
            start = load_checkpoint(out / CHECKPOINT, params, optimizer, run)
            rows = read_rows(out / METRICS)[:start]
            if len(rows) < start:
                raise ValueError(f"{out / METRICS}: has {len(rows)} rows, {CHECKPOINT} beside it is at step {start}")
        write_rows(out / METRICS, rows)

    with _progress(title, config.steps, len(rows), progress) as update:
        for step in range(optimizer.state["step"], config.steps):
            begin = time.perf_counter()
            tokens, labels = dataset.batch(batch_indices(len(dataset), config.batch_size, step, config.seed))
            loss, grads = loss_and_gradients(
                model,
                tokens,
                labels,
                micro_batch_size=config.micro_batch_size,
                rng=np.random.default_rng([config.seed, step]),
                recompute=config.recompute,
            )
            norm = clip_by_global_norm(grads, config.max_grad_norm or math.inf)
            lr = config.learning_rate(step)
            optimizer.step(grads, lr)
            row = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm}
            row |= {"tokens": int((labels != IGNORE).sum()), "seconds": time.perf_counter() - begin}
            if held_out is not None and config.eval_every and (step + 1) % config.eval_every == 0:
                row["held_out_loss"] = evaluate(model, held_out, config.micro_batch_size or config.batch_size).loss
            rows.append(row)
            if out is not None:
                with open(out / METRICS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    write_rows(out / METRICS, rows)  # onto the disk: they must not be behind the checkpoint
                    save_checkpoint(out / CHECKPOINT, params, optimizer, run)
            update(row, tokens.size)
            if on_step is not None:
                on_step(row)
    return rows


# ---- checkpoints -----------------------------------------------------------------------------------------------


# ---- what a person sees ----------------------------------------------------------------------------------------


@contextmanager
def _progress(title: str, steps: int, done: int, wanted: bool) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """A bar with loss, tokens a second and the time left; nothing where the output is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(title, total=steps, completed=done, loss=math.nan, speed=0.0)
        loss = speed = None

        def update(row: dict[str, Any], tokens: int) -> None:
            nonlocal loss, speed
            now = tokens / row["seconds"]
            loss = row["loss"] if loss is None else 0.9 * loss + 0.1 * row["loss"]  # smoothed, for the eye only
            speed = now if speed is None else 0.9 * speed + 0.1 * now
            bar.update(task, advance=1, loss=loss, speed=speed)

        yield update
