"""A tiny Llama of random weights, its tokenizer and some text, for tests that train and run a model."""

import functools
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import refqlora as rq
from refqlora.text.dataset import Dataset
from refqlora.text.encoding import tokenize_examples
from refqlora.text.examples import Document, Example
from refqlora.text.tokenizer import load_tokenizer, train_bpe

TEXT = """\
The mill stands where the river bends, and the miller's daughter counts the sacks: one for the baker, two for the inn,
three for the widow who pays in eggs. In summer the wheel turns slowly; in autumn it turns all night.

Zoë wrote it down in her naïve hand — «trois sacs, deux œufs» — and drew a small → beside each sum that was wrong.
The baker's boy read it, laughed, and drew a 🐟 under it. Nobody at the mill ever learnt who had drawn the fish.

When the river froze, the wheel stood still and the sacks were carried to the next mill, where the wind does the work.
"""
EXAMPLES = [
    Example(f"{name} brings {n} sacks to {place}.\n", f"{place} owes {name} {n * price} eggs{'!' * (n % 3)}\n")
    for n, (name, place, price) in enumerate(
        [(name, place, price) for name in ("Zoë", "Al", "Miriam") for place, price in (("inn", 2), ("bakery", 30))] * 2
    )
]
SOURCE = '''class Circle:
    """A circle, given by its radius."""

    def area(self, pi=3.14159):
        if self.radius_of < 0:
            raise ValueError("negative radius")
        return pi * self.radius_of ** 2


def main():
    return Circle(100).area()
'''
MAX_POSITIONS = 64


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens; 0 is the end of a text."""
    return train_bpe([Document("the mill", TEXT)], 300)


@functools.cache
def code_tokenizer() -> Tokenizer:
    """Byte-level BPE of 340 tokens, of SOURCE."""
    return train_bpe([Document("source", SOURCE * 3)], 340)


def unsure() -> rq.Model:
    """Random, in float64, with logits of order one."""
    model = rq.Model.from_config(config(), 2, np.float64)
    model.params["lm_head.weight"] *= 12
    return model


def config(**changes) -> rq.Config:
    """2 layers, every size another; `changes` replace its fields."""
    sizes = {"vocab_size": 300, "hidden_size": 40, "intermediate_size": 56, "layers": 2}
    heads = {"heads": 6, "kv_heads": 3, "head_dim": 8, "max_positions": MAX_POSITIONS, "eos_token_id": 0}
    return rq.Config(**{**sizes, **heads, **changes})


def examples(max_length: int = MAX_POSITIONS) -> Dataset:
    """EXAMPLES as sequences of different lengths; only what the completions have counts."""
    return tokenize_examples(EXAMPLES, tokenizer(), max_length, 0)


def save(path: Path, seed: int = 0, **changes) -> Path:
    """Write the model and its tokenizer to `path` as a Hugging Face directory; -> `path`."""
    rq.Model.from_config(config(**changes), seed).save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    load_tokenizer(path)
    return path


@contextmanager
def interrupted(module, step: int, checkpoint_every: int):
    """Ctrl-C after this step of the training that `module` does; a checkpoint now and then."""
    train = module.train

    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    def trained(model, dataset, config, **options):
        config = rq.TrainingConfig(**{**vars(config), "checkpoint_every": checkpoint_every})
        return train(model, dataset, config, **{**options, "on_step": stop})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", trained)
        yield
