"""Fine-tuning on the user's own text: what `refqlora finetune` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from .backend import keep_freed_memory
from .checkpoint import BUNDLED
from .data import Dataset, load_tokenizer, pack_split, read_jsonl, read_texts, split, tokenize_examples
from .figures import loss_figure
from .hub import model_directory
from .model import Model
from .training import TrainingConfig, evaluate, train


def read_dataset(
    path: Path, tokenizer: Tokenizer, eos_id: int, max_length: int, held_out: float, seed: int
) -> tuple[Dataset, Dataset]:
    """(training, held-out) from a .jsonl file of examples, or from a text file or directory cut into blocks."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.suffix == ".jsonl":
        dataset = tokenize_examples(read_jsonl(path), tokenizer, max_length, eos_id)
        return split(dataset, held_out, seed)
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

    base: a model's directory, or its id on the hub, which is what the adapter then names. adapter: the options of
    Model.add_adapter. training: those of TrainingConfig; `epochs` may stand for its steps.
    Raises ValueError or FileNotFoundError, before anything is trained, for what is wrong with files or options.
    """
    keep_freed_memory()
    seed = training.get("seed", 0)
    directory = model_directory(base)
    model = Model.from_pretrained(directory, quantize="nf4" if quantize else None)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    eos = model.config.eos_token_id
    eos = eos[0] if isinstance(eos, tuple) and eos else eos
    if not isinstance(eos, int) or not 0 <= eos < model.config.vocab_size or tokenizer.id_to_token(eos) is None:
        raise ValueError(f"{base}: a token must end every text: the model's eos_token_id is {eos}")
    max_length = max_length or model.config.max_positions
    if not 1 <= max_length <= model.config.max_positions:
        raise ValueError(f"max length must be 1 to {model.config.max_positions}, the model's context, not {max_length}")
    train_set, eval_set = read_dataset(data, tokenizer, eos, max_length, held_out, seed)
    if train_set.truncated:
        console.print(
            f"{train_set.truncated} examples are longer than {max_length} tokens and were cut", highlight=False
        )
    model.add_adapter(**adapter, seed=seed)
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
    before = evaluate(model, eval_set, at_once)  # B is zero at first, so this is the new adapter's loss too
    model.set_adapter("default")
    rows = train(model, train_set, config, held_out=eval_set, out=out, resume=resume, title="fine-tuning")
    after = evaluate(model, eval_set, at_once)
    model.save_adapter(out, base="refqlora" if base == BUNDLED else str(base))
    loss_figure(out / "loss.png", rows, f"fine-tuning on {data.name}")
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
