"""`refqlora finetune`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..finetune import finetune
from ..optim import SCHEDULES
from .options import command, common, console, count, model, natural, report


def add(commands: Any) -> None:
    options = command(
        commands,
        "finetune",
        run,
        "train an adapter on your own text",
        "DATA is a .jsonl file with a prompt and a completion, or with messages, on each line, the loss on the "
        "completion or the assistant's words only; or a text file, or a directory of them, whose every token counts.",
    )
    options.add_argument("--data", type=Path, required=True, help="a .jsonl file, a text file or a directory of texts")
    model(options)
    options.add_argument("--out", type=Path, default=Path("refqlora-adapter"), help="directory to write to")
    options.add_argument("--no-quantize", action="store_true", help="plain LoRA: leave the base in float32")
    group = options.add_argument_group("adapter")
    group.add_argument("--rank", type=count, default=16, help="r, the rank of B A")
    group.add_argument("--alpha", type=float, default=32.0, help="the change is scaled by alpha/r")
    group.add_argument("--dropout", type=float, default=0.0, help="rate at which the adapter's input is dropped")
    group.add_argument("--targets", default="all-linear", help="all-linear, or names such as q_proj,v_proj")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    group = options.add_argument_group("training")
    group.add_argument("--steps", type=count, default=None, help="updates to make, instead of --epochs")
    group.add_argument("--epochs", type=float, default=None, help="passes over the data (default: 3)")
    group.add_argument("--batch-size", type=count, default=16, help="sequences a step")
    group.add_argument(
        "--micro-batch-size", type=count, default=None, help="sequences at a time, to save memory (default: all)"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    group.add_argument("--warmup", type=natural, default=0, help="steps in which the learning rate rises")
    group.add_argument("--weight-decay", type=float, default=0.0, help="decoupled, as in AdamW")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients to this global norm; 0: do not")
    group.add_argument(
        "--max-length", type=count, default=None, help="tokens in a sequence (default: the model's context)"
    )
    group.add_argument("--held-out", type=float, default=0.05, help="fraction of the data kept for evaluation")
    group.add_argument("--eval-every", type=natural, default=100, help="steps between evaluations; 0: only at the end")
    group.add_argument("--checkpoint-every", type=count, default=50, help="steps between checkpoints")
    group.add_argument(
        "--recompute", action="store_true", help="gradient checkpointing: less memory, a third more time"
    )
    common(options)


def run(a: argparse.Namespace) -> None:
    if a.steps is not None and a.epochs is not None:
        raise ValueError("--steps and --epochs exclude each other")
    if a.epochs is not None and not 0 < a.epochs < math.inf:
        raise ValueError(f"--epochs must be a number above 0, not {a.epochs}")
    same = ("batch_size", "micro_batch_size", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm")
    same += ("eval_every", "checkpoint_every", "recompute", "seed")
    targets = a.targets if a.targets == "all-linear" else tuple(a.targets.split(","))
    facts = finetune(
        a.data,
        a.out,
        console(a),
        base=a.model,
        quantize=not a.no_quantize,
        adapter={"rank": a.rank, "alpha": a.alpha, "dropout": a.dropout, "targets": targets, "rslora": a.rslora},
        training={"steps": a.steps or 1, **{option: getattr(a, option) for option in same}},
        epochs=None if a.steps is not None else (a.epochs or 3.0),
        max_length=a.max_length,
        held_out=a.held_out,
        resume=a.resume,
    )
    report(a, facts)
