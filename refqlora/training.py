"""The training loop: batches, gradients, clipping, AdamW, evaluation, metrics, and checkpoints that survive a kill.

Everything random depends only on the seed and the step's number: which examples a step sees, and its dropout masks.
So the state of a run is its step, the trained parameters and the optimiser's moments: one file holds them, and a run
that is killed and resumed ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .backend import Array
from .checks import SWITCH, check, number, whole
from .functional import IGNORE, cross_entropy
from .model import Model
from .optim import AdamW, check_options, clip_by_global_norm, learning_rate
from .resume import Run, identity, recorded, uninterrupted
from .text.dataset import Dataset, batch_indices

Row = dict[str, Any]  # the metrics of a step

_COUNT, _COUNT_OR_0 = whole(1, 10**12), whole(0, 10**12)  # beyond any use
_RULES = {
    "steps": _COUNT,
    "batch_size": _COUNT,
    "warmup": _COUNT_OR_0,
    "max_grad_norm": number(0, math.inf),
    "recompute": SWITCH,
    "seed": whole(0, 2**64 - 1),
    "eval_every": _COUNT_OR_0,
    "checkpoint_every": _COUNT,
}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are for adapters; a step is one update from `batch_size` examples.

    micro_batch_size: how many examples go through the model at once; the gradients of a step's micro-batches add up
    to those of the whole batch. recompute: gradient checkpointing. max_grad_norm: 0 turns clipping off. warmup (steps)
    and floor shape the schedule (optim.learning_rate). eval_every, checkpoint_every: in steps; eval_every=0 turns
    evaluation off. Raises ValueError for a setting that cannot be used.

        >>> rq.TrainingConfig(steps=100, schedule="cosine", warmup=10).learning_rate(5)
        0.0001
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
        for option, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, option, value.item())  # rows and checkpoints are JSON
        for option, rule in _RULES.items():
            check(option, getattr(self, option), rule)
        if self.micro_batch_size is not None:
            check("micro_batch_size", self.micro_batch_size, _COUNT)
        check_options(self.lr, self.betas, 1e-8, self.weight_decay)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        self.learning_rate(0)  # raises if the settings make no schedule

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
    """loss: nats per counted token. tokens: how many are counted. bits_per_byte: the loss per byte of their text."""

    loss: float
    tokens: int
    bits_per_byte: float


def evaluate(
    model: Model, dataset: Dataset, batch_size: int = 16, on_batch: Callable[[int], None] | None = None
) -> Evaluation:
    """The mean loss over every counted token of `dataset`, without dropout.

    on_batch: called after each batch with the number of sequences done. Raises ValueError if no counted label stands
    for text, FloatingPointError if the loss is not finite.
    """
    nbytes = dataset.counted_bytes
    if nbytes == 0:
        raise ValueError("nothing to evaluate: no label counts but those of special tokens")
    total, count = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        tokens, labels = dataset.batch(np.arange(start, stop))
        n = int((labels != IGNORE).sum())
        if n:
            logits, _ = model.forward(tokens, recompute=True)  # so that no layer's cache is kept
            total += cross_entropy(logits, labels, denominator=1)[0]
            count += n
        if on_batch is not None:
            on_batch(stop)
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

    The loss of each micro-batch is divided by the count of the *whole* batch: the gradients then add up to those of the
    whole batch, even if the micro-batches count different numbers of tokens.
    """
    count = int((labels != IGNORE).sum())
    loss = 0.0
    grads: dict[str, Array] = {}
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
        del cache, dlogits, dparams, g  # their memory serves the next micro-batch
    return loss, grads


def train(
    model: Model,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    held_out: Dataset | None = None,
    out: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train `model.trainable()` in place -> a row of metrics for each step, which `on_step` also receives at once.

    A row has step (from 1), loss, lr, grad_norm, tokens (counted labels), seconds, and held_out_loss every
    `eval_every` steps. With `out`, the rows go to out/metrics.jsonl and the state to out/checkpoint.safetensors,
    every `checkpoint_every` steps, at the end, and at Ctrl-C (KeyboardInterrupt then names the step and the file);
    `resume` continues from there. No other process can train in `out` at the same time.

        >>> from refqlora.text.dataset import Dataset
        >>> tokens = np.arange(96).reshape(8, 12) % 50
        >>> data = Dataset(tokens, (tokens + 1) % 50, np.ones(50, int))  # tokens, labels, bytes of each token
        >>> model = rq.Model.from_pretrained(rq.BUNDLED, quantize="nf4")
        >>> model.add_adapter(rank=4)
        >>> rows = rq.train(model, data, rq.TrainingConfig(steps=5, batch_size=4, lr=1e-2))
        >>> len(rows), rows[-1]["loss"] < rows[0]["loss"]
        (5, True)

    Raises FileNotFoundError if there is nothing to resume, ValueError for a checkpoint of another run or one that a new
    run would overwrite unfinished, and FloatingPointError, naming the step, if a gradient, a parameter or a moment is
    not finite. Warns if the loss ends far above where it began.
    """
    params = model.trainable()
    # Weight decay is for matrices: it would pull norms' weights away from 1, and biases from what fits the data.
    optimizer = AdamW(params, config.lr, config.betas, 1e-8, config.weight_decay, lambda name: params[name].ndim > 1)
    run = Run(params, optimizer, identity(model, dataset, config) if out is not None else {}, out)

    def measure(row: Row) -> None:
        if held_out is None or not config.eval_every or row["step"] % config.eval_every or "held_out_loss" in row:
            return
        row["held_out_loss"] = evaluate(model, held_out, config.micro_batch_size or config.batch_size).loss

    with recorded(run, resume):
        for row in run.rows[-1:]:
            measure(row)  # an interrupt may have prevented it
        for step in range(len(run.rows), config.steps):
            try:
                row = _update(model, dataset, config, run, step)
                measure(row)
                run.record(row, save=(step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps)
            except FloatingPointError as error:
                where = f"step {step + 1}, learning rate {config.learning_rate(step):.2g}"
                raise FloatingPointError(f"{where}: {optimizer.fault() or error}") from None
            if on_step is not None:
                on_step(row)
    _warn_if_diverged(run.rows)
    return run.rows


def _update(model: Model, dataset: Dataset, config: TrainingConfig, run: Run, step: int) -> Row:
    """Make update `step`, counted from 0: batch, gradients, clipping, AdamW; -> its row, the last of `run.rows`."""
    begin = time.perf_counter()
    tokens, labels = dataset.batch(batch_indices(len(dataset), config.batch_size, step, config.seed))
    loss, grads = loss_and_gradients(
        model,
        tokens,
        labels,
        micro_batch_size=config.micro_batch_size,
        rng=np.random.default_rng([config.seed, step]),  # draws the dropout masks
        recompute=config.recompute,
    )
    norm = clip_by_global_norm(grads, config.max_grad_norm or math.inf)
    lr = config.learning_rate(step)
    with uninterrupted():
        run.optimizer.step(grads, lr)
        row = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm}
        row |= {"tokens": int((labels != IGNORE).sum()), "seconds": time.perf_counter() - begin}
        run.rows.append(row)
    return row


def _warn_if_diverged(rows: list[Row]) -> None:
    """Warn if the mean loss of the last tenth of the steps is more than a nat above that of the first steps."""
    n = max(1, len(rows) // 10)
    first, last = (sum(row["loss"] for row in part) / n for part in (rows[:n], rows[-n:]))
    if last > first + 1:
        warnings.warn(
            f"the training loss rose from {first:.2f} to {last:.2f}: the run has diverged; start again with a "
            f"learning rate below {max(row['lr'] for row in rows):g}, or with warm-up",
            stacklevel=3,
        )
