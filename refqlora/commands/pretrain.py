"""The bundled base: a small Llama trained from scratch, by this engine, on the running Python's standard library."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import ml_dtypes

from ..backend import cores, keep_freed_memory
from ..config import Config
from ..figures import write_figure
from ..figures.loss import held_out_losses, loss_figure
from ..files.writing import write_bytes
from ..model import Model
from ..resume import CHECKPOINT, check_start
from ..text import corpus
from ..text.encoding import pack
from ..text.generation import complete
from ..text.tokenizer import train_bpe
from ..training import TrainingConfig, evaluate, train
from .options import common, console, count, out_option, report, show
from .progress import progress

CONTEXT = 256  # tokens in a block of training text
END = 0  # the token that ends a text

BASE = Config(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    layers=6,
    heads=6,
    kv_heads=3,
    head_dim=32,
    tied=True,
    max_positions=CONTEXT,
    bos_token_id=END,
    eos_token_id=END,
)

SAMPLING: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.8, "top_p": 0.95, "stop": (END,)}
PROMPTS = ("def read_lines(path):\n", "class Queue:\n", "import os\n")


def pretrain(
    out: Path,
    *,
    steps: int = 6000,
    batch_size: int = 8,
    lr: float = 2e-3,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `BASE` and its tokenizer and write them to `out`; -> the facts on the model card.

    The tokenizer is trained on the model's training text. AdamW with betas (0.9, 0.95), weight decay 0.1 on matrices,
    a cosine from `lr` to a tenth of it. Writes config.json, model.safetensors (bfloat16), tokenizer.json, README.md
    (the card), loss.png, and meanwhile a checkpoint from which `resume` continues.
    """
    config = TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        schedule="cosine",
        warmup=min(200, steps // 10),
        floor=lr / 10,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        seed=seed,
        eval_every=max(1, steps // 20),
        checkpoint_every=100,
    )
    check_start(out, resume)
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    documents, unseen = corpus.modules(held_out=False), corpus.modules(held_out=True)
    tokenizer = train_bpe(documents, BASE.vocab_size)
    write_bytes(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    text = pack(documents, tokenizer, CONTEXT, END)
    held_out = pack(unseen, tokenizer, CONTEXT, END)
    model = Model.from_config(BASE, seed)
    probe = held_out.subset(range(0, len(held_out), 8))  # for the curve
    before = evaluate(model, probe).loss
    with progress("pretraining", steps, quiet) as bar:
        rows = train(model, text, config, held_out=probe, out=out, resume=resume, on_step=bar)
    model.save_pretrained(out, ml_dtypes.bfloat16)
    stored = Model.from_pretrained(out)  # measure the weights as they are stored
    result = evaluate(stored, held_out)
    facts = {
        "command": f"refqlora pretrain --steps {steps} --batch-size {batch_size} --lr {lr:g} --seed {seed}",
        "python": platform.python_version(),
        "parameters": sum(param.size for param in stored.params.values()),
        "training_documents": len(documents),
        "training_bytes": sum(len(document.text.encode()) for document in documents),
        "training_tokens": text.counted_tokens,
        "tokens_seen": steps * batch_size * CONTEXT,
        "held_out_documents": len(unseen),
        "held_out_loss": result.loss,
        "held_out_bits_per_byte": result.bits_per_byte,
        "seconds": sum(row["seconds"] for row in rows),
        "cores": cores(),
        "curve": [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row],
        "samples": [(text, complete(stored, text, tokenizer=tokenizer, **SAMPLING, seed=seed)) for text in PROMPTS],
    }
    curve = held_out_losses(rows, before)
    write_figure(out / "loss.png", loss_figure(rows, curve, "Pretraining on the standard library's source"))
    write_bytes(out / "README.md", card(facts).encode())
    (out / CHECKPOINT).unlink(missing_ok=True)
    return facts


def card(facts: dict[str, Any]) -> str:
    """The model card, with the numbers of the run that made the model."""
    b = BASE
    curve = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in facts["curve"])
    samples = "\n\n".join(f"```python\n{prompt}{text.rstrip()}\n```" for prompt, text in facts["samples"])
    return f"""# The bundled base

A Llama of {facts["parameters"]:,} parameters, trained from scratch by refqlora on the source of Python
{facts["python"]}'s standard library and stored in bfloat16. It knows nothing else; it is a base to fine-tune.

    {facts["command"]}

| | |
|---|---|
| layers | {b.layers}, of {b.heads} query and {b.kv_heads} key/value heads of {b.head_dim} |
| hidden, feed-forward | {b.hidden_size}, {b.intermediate_size} |
| vocabulary | {b.vocab_size} tokens of byte-level BPE, embeddings tied |
| training text | {facts["training_documents"]} modules, {facts["training_bytes"]:,} bytes |
| in tokens | {facts["training_tokens"]:,} |
| tokens seen in training | {facts["tokens_seen"]:,} |
| held out | {facts["held_out_documents"]} modules |
| held-out loss | {facts["held_out_loss"]:.4f} nats a token |
| held-out bits per byte | {facts["held_out_bits_per_byte"]:.4f} |
| time in training steps | {facts["seconds"] / 60:.0f} minutes on {facts["cores"]} core{"s" * (facts["cores"] > 1)} |

Loss on an eighth of the held-out text during training (`loss.png` shows every step):

| step | loss |
|---|---|
{curve}

Continuations of prompts of one line (temperature 0.8, top-p 0.95, 100 tokens):

{samples}

The text it was trained on is under the Python Software Foundation's license.
"""


# ---- the command ----


MORE = "Takes about an hour on 2 cores."


def add(options: argparse.ArgumentParser) -> None:
    out_option(options, "refqlora-base")
    options.add_argument("--steps", type=count, default=6000, help="training steps")
    options.add_argument("--batch-size", type=count, default=8, help="blocks of 256 tokens in a step")
    options.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    common(options)


def run(a: argparse.Namespace) -> None:
    options = {"steps": a.steps, "batch_size": a.batch_size, "lr": a.lr, "seed": a.seed, "resume": a.resume}
    facts = pretrain(a.out, **options, quiet=a.json)
    show(
        console(a),
        f"held-out loss {facts['held_out_loss']:.4f}, {facts['held_out_bits_per_byte']:.4f} bits a byte, in {a.out}/",
    )
    report(a, facts)
