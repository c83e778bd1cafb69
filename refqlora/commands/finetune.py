"""Fine-tuning on the user's own text: what `refqlora finetune` does."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from ..backend import keep_freed_memory
from ..figures.loss import held_out_losses, loss_figure
from ..files.hub import BUNDLED, model_directory
from ..lora_config import INITS, LoraConfig
from ..model import Model
from ..optim import SCHEDULES
from ..text.chat import ChatTemplate, load_chat_template
from ..text.dataset import Dataset, split
from ..text.encoding import pack_split, tokenize_examples
from ..text.examples import read_jsonl, read_texts
from ..text.tokenizer import load_tokenizer
from ..training import TrainingConfig, evaluate, train
from .options import common, console, count, model, natural, report


def read_dataset(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate, eos_id: int, max_length: int, held_out: float, seed: int
) -> tuple[Dataset, Dataset]:
    """(training, held-out) from a .jsonl file of examples, or from a text file or directory cut into blocks."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.suffix == ".jsonl":
        parts = split(read_jsonl(path, template), held_out, seed)
        return tuple(tokenize_examples(part, tokenizer, max_length, eos_id) for part in parts)
    return pack_split(read_texts(path), tokenizer, max_length, eos_id, held_out, seed)


def finetune(
    data: Path,
    out: Path,
    console: Console,
    *,
    base: str | Path = BUNDLED,
    quantize: bool = True,
    adapter: dict[str, Any],
    training: dict[str, Any],
    epochs: float | None = None,
    max_length: int | None = None,
    held_out: float = 0.05,
    resume: bool = False,
) -> dict[str, Any]:
    """Train an adapter on `data` and write it, metrics.jsonl, loss.png and a checkpoint to `out`; -> the figures.

    base: a model's directory, or its id on the hub, which is what the adapter then names. adapter: the fields of
    LoraConfig. training: those of TrainingConfig; `epochs` may stand for its steps.
    Raises ValueError or FileNotFoundError, before anything is trained, for what is wrong with files or options.
    """
    keep_freed_memory()
    seed = training.get("seed", 0)
    directory = model_directory(base)
    late = LoraConfig(**adapter).changes_base  # PiSSA and OLoRA take the dense weights apart: quantised after that
    model = Model.from_pretrained(directory, quantize="nf4" if quantize and not late else None)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    eos = model.config.eos_token_id
    eos = eos[0] if isinstance(eos, tuple) and eos else eos
    if not isinstance(eos, int) or not 0 <= eos < model.config.vocab_size or tokenizer.id_to_token(eos) is None:
        raise ValueError(f"{base}: a token must end every text: the model's eos_token_id is {eos}")
    max_length = max_length or model.config.max_positions
    if not 1 <= max_length <= model.config.max_positions:
        raise ValueError(f"max length must be 1 to {model.config.max_positions}, the model's context, not {max_length}")
    template = load_chat_template(directory, tokenizer, eos)
    train_set, eval_set = read_dataset(data, tokenizer, template, eos, max_length, held_out, seed)
    if truncated := train_set.truncated + eval_set.truncated:
        console.print(f"{truncated} examples are longer than {max_length} tokens and were cut", highlight=False)
    model.add_adapter(**adapter, seed=seed)
    if quantize:
        model.quantize()
    if epochs is not None:
        batch_size = training.get("batch_size", TrainingConfig.batch_size)
        training = {**training, "steps": max(1, round(epochs * len(train_set) / batch_size))}
    config = TrainingConfig(**training)

    trainable = sum(p.size for p in model.trainable().values())
    console.print(
        f"{len(train_set):,} sequences ({train_set.counted_tokens:,} tokens count), {len(eval_set):,} held out; "
        f"{trainable:,} trainable parameters; {config.steps:,} steps of {config.batch_size}",
        highlight=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    at_once = config.micro_batch_size or config.batch_size
    model.set_adapter(None)
    before = evaluate(model, eval_set, at_once)  # a new adapter changes nothing, so this is its loss too
    model.set_adapter("default")
    rows = train(model, train_set, config, held_out=eval_set, out=out, resume=resume, title="fine-tuning")
    after = evaluate(model, eval_set, at_once)
    model.save_adapter(out, base="refqlora" if base == BUNDLED else str(base))
    curve = held_out_losses(rows, before.loss, after.loss)
    loss_figure(out / "loss.png", rows, curve, f"Fine-tuning on {data.name}")
    console.print(f"held-out loss {before.loss:.4f} before, {after.loss:.4f} after (nats a token)", highlight=False)
    console.print(
        f"wrote {out}/: adapter_model.safetensors, adapter_config.json, metrics.jsonl, loss.png",
        highlight=False,
        markup=False,
    )
    return {
        "steps": config.steps,
        "trainable_parameters": trainable,
        "training_tokens": train_set.counted_tokens,
        "held_out_loss": {"before": before.loss, "after": after.loss},
        "held_out_bits_per_byte": {"before": before.bits_per_byte, "after": after.bits_per_byte},
    }


# ---- the command ----


MORE = (
    "DATA is a .jsonl file with a prompt and a completion, or with messages, on each line, the loss on the "
    "completion or the assistant's words only; or a text file, or a directory of them, whose every token counts. "
    'The tokenizer\'s chat template writes the messages, or without one each is a line "role: content".'
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--data", type=Path, required=True, help="a .jsonl file, a text file or a directory of texts")
    model(options)
    options.add_argument("--out", type=Path, default=Path("refqlora-adapter"), help="directory to write to")
    options.add_argument("--no-quantize", action="store_true", help="plain LoRA: leave the base in float32")
    group = options.add_argument_group("adapter")
    group.add_argument("--rank", type=count, default=16, help="r, the rank of B A")
    group.add_argument("--alpha", type=float, default=32.0, help="the change is scaled by alpha/r")
    group.add_argument("--dropout", type=float, default=0.0, help="rate at which the adapter's input is dropped")
    group.add_argument(
        "--targets", default="all-linear", help="all-linear, names such as q_proj,v_proj, or a regular expression"
    )
    group.add_argument("--exclude", default=None, help="linears that get none, named as in --targets")
    group.add_argument("--layers", type=natural, nargs="+", default=None, help="numbers of the layers that get one")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    group.add_argument("--dora", action="store_true", help="learn magnitude and direction of the weights apart (DoRA)")
    group.add_argument("--init", choices=INITS, default="default", help="how A and B start")
    for what, kind in (("rank", count), ("alpha", float)):
        group.add_argument(
            f"--{what}-pattern",
            type=_named(kind),
            nargs="+",
            metavar="NAME=VALUE",
            help=f"another {what} for the linears of this name, such as q_proj=8",
        )
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
    adapter = {
        "rank": a.rank,
        "alpha": a.alpha,
        "dropout": a.dropout,
        "targets": _names(a.targets),
        "exclude": _names(a.exclude) if a.exclude else (),
        "layers": None if a.layers is None else tuple(a.layers),
        "rslora": a.rslora,
        "dora": a.dora,
        "init": a.init,
        "rank_pattern": dict(a.rank_pattern or ()),
        "alpha_pattern": dict(a.alpha_pattern or ()),
    }
    facts = finetune(
        a.data,
        a.out,
        console(a),
        base=a.model,
        quantize=not a.no_quantize,
        adapter=adapter,
        training={"steps": a.steps or 1, **{option: getattr(a, option) for option in same}},
        epochs=None if a.steps is not None else (a.epochs or 3.0),
        max_length=a.max_length,
        held_out=a.held_out,
        resume=a.resume,
    )
    report(a, facts)


def _names(text: str) -> str | tuple[str, ...]:
    """Names divided by commas; what no names can be is a regular expression."""
    return tuple(text.split(",")) if re.fullmatch(r"[\w.,]+", text) else text


def _named(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def name_and_value(text: str) -> tuple[str, Any]:
        name, _, value = text.rpartition("=")
        try:
            if name:
                return name, kind(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text}")

    return name_and_value
