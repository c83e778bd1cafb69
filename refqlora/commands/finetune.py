"""`refqlora finetune`: fine-tuning on the user's own text."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import keep_freed_memory
from ..figures import write_figure
from ..figures.loss import held_out_losses, loss_figure
from ..files import adapter_files
from ..files.hub import BUNDLED, model_directory
from ..files.writing import locked
from ..lora_config import INITS, LoraConfig
from ..memory.available import available_bytes
from ..memory.planned import plan_step, size_text
from ..model import Model
from ..optim import SCHEDULES
from ..resume import CHECKPOINT, check_start, read_identity
from ..text.chat import load_chat_template
from ..text.data_files import datasets, read_data
from ..text.dataset import Dataset
from ..text.examples import Conversation
from ..training import Evaluation, TrainingConfig, evaluate, train
from .options import common, console, count, model_option, natural, out_option, report, show
from .progress import progress
from .sample import generate_command, show_sample, write_sample

if TYPE_CHECKING:
    from rich.console import Console

MAX_LENGTH = 512  # tokens in a sequence, unless --max-length is given or the model's context is shorter
SPARE = 0.8  # the part of the available memory that may be planned for
LESS = "a smaller --max-length, --micro-batch-size, --batch-size or --rank, or --recompute, needs less"


@dataclass(frozen=True)
class Job:
    """What training needs."""

    model: Model
    train_set: Dataset
    held_out: Dataset | None
    config: TrainingConfig
    chat: bool  # the data are conversations


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
    """Train an adapter on `data` and write it, metrics.jsonl, loss.png and a checkpoint to `out`; -> the results.

    base: a model's directory, or its id on the hub; the adapter's config names it. adapter: the fields of LoraConfig.
    training: those of TrainingConfig; `epochs` may replace its steps. held_out: a fraction, 0 for none. Before anything
    is trained, raises ValueError or FileNotFoundError for bad files or options, and MemoryError if a step cannot fit.
    """
    keep_freed_memory()
    with locked(out):
        check_place(out, resume)
        if resume and training.get("micro_batch_size") is None:
            # Keep the size of the interrupted run, as the last bits depend on it.
            training = {**training, "micro_batch_size": read_identity(out / CHECKPOINT).get("micro_batch_size")}
        job = prepare(data, console, base, quantize, adapter, training, epochs, max_length, held_out)
        model, config = job.model, job.config
        model.set_adapter(None)
        before = measure(job, "before", console)  # a new adapter has this loss too, as it changes nothing
        model.set_adapter("default")
        with progress("fine-tuning", config.steps, console.quiet) as bar:
            rows = train(model, job.train_set, config, held_out=job.held_out, out=out, resume=resume, on_step=bar)
        model.save_adapter(out, base="refqlora" if base == BUNDLED else str(base))
        after = measure(job, "after", console)
        curve = held_out_losses(rows, before.loss, after.loss) if before and after else {}
        write_figure(out / "loss.png", loss_figure(rows, curve, f"Fine-tuning on {data.name}"))
        sample = write_sample(model, job.held_out or job.train_set)
    prompt = None if job.chat else sample["prompt"]
    facts = {
        "steps": config.steps,
        "trainable_parameters": sum(p.size for p in model.trainable().values()),
        "training_tokens": job.train_set.counted_tokens,
        "training_loss": {"first": rows[0]["loss"], "last": rows[-1]["loss"]},
        "held_out_loss": before and after and {"before": before.loss, "after": after.loss},
        "held_out_bits_per_byte": before and after and {"before": before.bits_per_byte, "after": after.bits_per_byte},
        "sample": sample,
        "generate": generate_command(out, None if base == BUNDLED else base, quantize, prompt),
    }
    tell(facts, out, console)
    return facts


def check_place(out: Path, resume: bool) -> None:
    """Raise ValueError or FileNotFoundError unless a run can begin, or with `resume` continue, in `out`."""
    check_start(out, resume)
    for name in (CHECKPOINT, adapter_files.WEIGHTS, adapter_files.CONFIG):
        if not resume and (out / name).exists():
            raise ValueError(
                f"{out / name}: an adapter has been trained here: choose another --out, or see its results again with "
                "--resume"
            )


def prepare(
    data: Path,
    console: Console,
    base: str | Path,
    quantize: bool,
    adapter: dict[str, Any],
    training: dict[str, Any],
    epochs: float | None,
    max_length: int | None,
    held_out: float,
) -> Job:
    """Load the model and the data, add the adapter, plan the memory, and print a summary."""
    seed, adapters = training.get("seed", 0), {"default": LoraConfig(**adapter)}
    directory = model_directory(base)
    model = Model.from_pretrained(directory, quantize="nf4" if quantize else None, adapters=adapters, seed=seed)
    tokenizer = model.tokenizer
    eos = model.config.ends[0] if model.config.ends else -1  # the first one ends the texts to learn from
    if not 0 <= eos < model.config.vocab_size or tokenizer.id_to_token(eos) is None:
        raise ValueError(f"{base}: eos_token_id: expected a token that ends texts, got {model.config.eos_token_id}")
    context = model.config.max_positions
    max_length = min(MAX_LENGTH, context) if max_length is None else max_length
    if not 2 <= max_length <= context:
        raise ValueError(f"max length: expected 2 to {context}, the model's context, got {max_length}")

    items = read_data(data, load_chat_template(directory, tokenizer, eos), partial(show, console))
    train_set, eval_set = datasets(items, tokenizer, eos, max_length, held_out, seed)
    if truncated := train_set.truncated + eval_set.truncated:
        show(console, f"{truncated} examples are longer than {max_length} tokens and were cut")
    if epochs is not None:
        steps = epochs * len(train_set) / training.get("batch_size", TrainingConfig.batch_size)
        if not 0 < steps < 1e12:
            raise ValueError(f"epochs: expected a number above 0 and of at most {10**12:,} steps, got {epochs}")
        training = {**training, "steps": max(1, round(steps))}
    config = TrainingConfig(**training)
    show(
        console,
        f"{len(train_set):,} sequences ({train_set.counted_tokens:,} tokens count), {len(eval_set):,} held out; "
        f"{sum(p.size for p in model.trainable().values()):,} trainable parameters; "
        f"{config.steps:,} steps of {config.batch_size}",
    )
    config = fitted(model, config, max(map(len, (*train_set.tokens, *eval_set.tokens))), console)
    return Job(model, train_set, eval_set or None, config, isinstance(items[0], Conversation))


def fitted(model: Model, config: TrainingConfig, length: int, console: Console) -> TrainingConfig:
    """`config` with micro-batches and recomputation such that a step fits in the available memory; prints the plan.

    length: tokens in the longest sequence. Raises MemoryError if a step cannot fit.
    """
    free = available_bytes()
    room = math.inf if free is None else SPARE * free
    plan = plan_step(model, length, config.batch_size, room, config.micro_batch_size, config.recompute)
    how = f"{config.batch_size} sequences of up to {length} tokens"
    how += f", {plan.micro_batch} at a time" if plan.micro_batch < config.batch_size else ""
    how += ", each layer recomputed in the backward" if plan.recompute else ""
    left = "" if free is None else f"; {size_text(free)} are free"
    if plan.nbytes > room:
        share = f"of which {100 * SPARE:.0f} % can be planned for"
        raise MemoryError(f"a step of {how}, needs {size_text(plan.nbytes)}{left}, {share}")
    held = sum(p.nbytes for p in (*model.params.values(), *model.trainable().values()))
    show(console, f"memory: {size_text(held)} for the model, {size_text(plan.nbytes)} more for a step of {how}{left}")
    micro_batch = config.micro_batch_size if plan.micro_batch == config.batch_size else plan.micro_batch
    return replace(config, micro_batch_size=micro_batch, recompute=plan.recompute)


def measure(job: Job, when: str, console: Console) -> Evaluation | None:
    """The held-out loss, with a progress bar; None if nothing is held out."""
    if job.held_out is None:
        return None
    with progress(f"held-out loss {when}", len(job.held_out), console.quiet) as bar:
        return evaluate(job.model, job.held_out, job.config.micro_batch_size or job.config.batch_size, bar)


def tell(facts: dict[str, Any], out: Path, console: Console) -> None:
    """Print the results."""
    if held_out := facts["held_out_loss"]:
        said = f"held-out loss {held_out['before']:.4f} before, {held_out['after']:.4f} after (nats a token)"
    else:
        said = "training loss {first:.4f} in the first step, {last:.4f} in the last".format(**facts["training_loss"])
    show(console, said)
    if held_out and held_out["after"] > held_out["before"]:
        warnings.warn(
            f"the held-out loss rose from {held_out['before']:.4f} to {held_out['after']:.4f}: this adapter is worse "
            "than none; train on more text, for fewer steps, or with a lower learning rate",
            stacklevel=3,
        )
    files = "adapter_model.safetensors, adapter_config.json, metrics.jsonl, loss.png"
    show(console, f"wrote {out}/: {files}")
    show_sample(facts["sample"], facts["generate"], console)


# ---- the command ----


MORE = (
    "DATA is a .jsonl or .json file of examples: prompt and completion, messages, Alpaca's instruction and output, "
    "ShareGPT's conversations, or text; then only the completion or the assistant's messages count in the loss. "
    "Or DATA is a text file, or a directory of them; then all tokens count. The tokenizer's chat template writes the "
    'messages; without one, each message is a line "role: content".'
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--data", type=Path, required=True, help="examples (.jsonl, .json), a text file, or a directory of texts"
    )
    model_option(options)
    out_option(options, "refqlora-adapter")
    options.add_argument("--no-quantize", action="store_true", help="plain LoRA: leave the base in float32")
    group = options.add_argument_group("adapter")
    group.add_argument("--rank", type=count, default=16, help="r, the rank of B A")
    group.add_argument("--alpha", type=float, default=32.0, help="B A is scaled by alpha/r")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout rate of the adapter's input")
    group.add_argument(
        "--targets", default="all-linear", help="all-linear, names such as q_proj,v_proj, or a regular expression"
    )
    group.add_argument("--exclude", default=None, help="linears without an adapter, named as in --targets")
    group.add_argument("--layers", type=natural, nargs="+", default=None, help="numbers of the layers with an adapter")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    group.add_argument(
        "--dora", action="store_true", help="learn the weights' magnitude and direction separately (DoRA)"
    )
    group.add_argument("--init", choices=INITS, default="default", help="initialisation of A and B")
    for what, kind in (("rank", count), ("alpha", float)):
        group.add_argument(
            f"--{what}-pattern",
            type=_named(kind),
            nargs="+",
            metavar="NAME=VALUE",
            help=f"another {what} for linears of this name, such as q_proj=8",
        )
    group = options.add_argument_group("training")
    group.add_argument("--steps", type=count, default=None, help="training steps, instead of --epochs")
    group.add_argument("--epochs", type=float, default=None, help="passes over the data (default: 3)")
    group.add_argument("--batch-size", type=count, default=16, help="sequences in a step")
    group.add_argument(
        "--micro-batch-size", type=count, default=None, help="sequences at a time (default: as many as fit in memory)"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="schedule of the learning rate")
    group.add_argument("--warmup", type=natural, default=0, help="steps in which the learning rate rises")
    group.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients to this global norm; 0: never")
    group.add_argument(
        "--max-length", type=count, default=None, help="tokens in a sequence (default: 512, or the model's context)"
    )
    group.add_argument("--held-out", type=float, default=0.05, help="fraction of the data for evaluation; 0: none")
    group.add_argument("--eval-every", type=natural, default=100, help="steps between evaluations; 0: only at the end")
    group.add_argument("--checkpoint-every", type=count, default=50, help="steps between checkpoints")
    group.add_argument(
        "--recompute",
        action="store_true",
        help="gradient checkpointing: less memory, a third more time (default: if a step does not fit without)",
    )
    common(options)


def run(a: argparse.Namespace) -> None:
    if a.steps is not None and a.epochs is not None:
        raise ValueError("--steps and --epochs exclude each other")
    if a.epochs is not None and not 0 < a.epochs < math.inf:
        raise ValueError(f"--epochs: expected a number above 0, got {a.epochs}")
    same = ["batch_size", "micro_batch_size", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm"]
    same += ["eval_every", "checkpoint_every", "recompute", "seed"]
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
    try:
        facts = finetune(
            a.data,
            a.out,
            console(a),
            base=a.model,
            quantize=not a.no_quantize,
            adapter=adapter,
            training={"steps": a.steps or 1, **{option: getattr(a, option) for option in same}},
            epochs=a.epochs if a.epochs is not None else 3.0 if a.steps is None else None,
            max_length=a.max_length,
            held_out=a.held_out,
            resume=a.resume,
        )
    except MemoryError as error:
        raise MemoryError(f"{error or 'memory is used up'}: {LESS}") from None
    report(a, facts)


def _names(text: str) -> str | tuple[str, ...]:
    """Names separated by commas; other text is a regular expression."""
    return tuple(text.split(",")) if re.fullmatch(r"[\w.,]+", text) else text


def _named(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def name_and_value(text: str) -> tuple[str, Any]:
        name, _, value = text.rpartition("=")
        try:
            if name:
                return name, kind(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text}")

    return name_and_value
