"""A look at what an adapter has learnt: one prompt of its data, continued without it and with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..functional import IGNORE
from ..model import Model
from ..text.dataset import Dataset
from ..text.generation import complete
from .options import show

if TYPE_CHECKING:
    from rich.console import Console

LENGTH = 40  # tokens that the base and the adapter write
SHOWN = 300  # characters of each text that are printed


def write_sample(model: Model, dataset: Dataset) -> dict[str, str]:
    """What the base and the adapter write after the first prompt of `dataset`, or after a text's first few tokens."""
    tokens, labels = dataset.tokens[0], dataset.labels[0]
    first = int(np.argmax(labels != IGNORE))  # the last token of the prompt
    prompt = tokens[: first + 1] if first else tokens[: max(1, min(LENGTH, len(tokens) // 2))]
    prompt = prompt[-max(1, model.config.max_positions - LENGTH) :]
    sample = {"prompt": model.tokenizer.decode(prompt.tolist())}
    for name, active in (("base", None), ("adapter", "default")):
        model.set_adapter(active)
        sample[name] = complete(model, prompt.tolist(), max_new_tokens=LENGTH, stop=model.config.ends)
    return sample


def generate_command(adapter: Path, base: str | Path | None, quantized: bool, prompt: str | None) -> str:
    """The `refqlora generate` command that continues `prompt`, or holds a conversation if it is None. base: None for
    the bundled one."""
    words = ["refqlora", "generate", "--adapter", str(adapter)]
    words += [] if base is None else ["--model", str(base)]
    words += [] if quantized else ["--no-quantize"]
    return shlex.join([*words, *(["--chat"] if prompt is None else ["--prompt", prompt.replace("\n", "\\n")])])


def show_sample(sample: dict[str, str], command: str, console: Console) -> None:
    """Print the sample, one line for each text, and the command."""
    show(console, "\na prompt of the data, and its continuations:")
    for name, text in sample.items():
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip().replace("\n", "⏎ "))
        line = f"… {line[-SHOWN:]}" if len(line) > SHOWN else line
        show(console, f"  {name:8} {line}")
    console.print(f"\n{command}", highlight=False, markup=False, soft_wrap=True)  # unbroken, for copying
