"""The bundled base is small, complete, and writes something like Python."""

import ast
import math
import re

import numpy as np
import pytest
import tiny
from safetensors import safe_open

import refqlora as rq
from refqlora.commands import pretrain
from refqlora.files.hub import BUNDLED
from refqlora.text import corpus
from refqlora.text.encoding import pack
from refqlora.text.generation import complete
from refqlora.text.tokenizer import load_tokenizer
from refqlora.training import evaluate

bundled = pytest.mark.skipif(not (BUNDLED / "model.safetensors").is_file(), reason="there is no bundled base")


@pytest.fixture(scope="module")
def its_model():
    return rq.Model.from_pretrained(BUNDLED)


@bundled
def test_the_bundled_base_is_small_and_whole(its_model):
    path = BUNDLED / "model.safetensors"
    assert path.stat().st_size <= 6_000_000
    with safe_open(path, framework="numpy") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
        assert {x.get_dtype() for x in stored.values()} == {"BF16"}
        assert {name: tuple(x.get_shape()) for name, x in stored.items()} == its_model.config.shapes()
    assert its_model.config == pretrain.BASE
    assert all(np.isfinite(p).all() for p in its_model.params.values())


@bundled
@pytest.mark.parametrize("text", ["def f(x):\n\treturn {x: '→ 🐟'}\r\n", "", " " * 7, tiny.TEXT, "\x00\x7f", "日本"])
def test_its_tokenizer_loses_nothing(text, its_model):
    tokenizer = load_tokenizer(BUNDLED)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == its_model.config.vocab_size
    assert tokenizer.token_to_id("<|endoftext|>") == its_model.config.eos_token_id == 0


@bundled
def test_it_has_learnt_python(its_model):
    """On source it was not trained on: far below the ln 2048 = 7.6 nats of one that knows nothing, and the tokenizer
    gives the source back. What it writes looks like Python."""
    tokenizer = load_tokenizer(BUNDLED)
    unseen = [document for document in corpus.modules(held_out=True) if document.name in ("bisect", "timeit", "shelve")]
    assert len(unseen) == 3
    assert [tokenizer.decode(tokenizer.encode(document.text).ids) for document in unseen] == [d.text for d in unseen]
    blocks = pack(unseen, tokenizer, its_model.config.max_positions, 0)
    blocks = blocks.subset(range(0, len(blocks), 6))
    untrained = evaluate(rq.Model.from_config(its_model.config), blocks).loss
    trained = evaluate(its_model, blocks)
    assert untrained == pytest.approx(math.log(2048), abs=0.2)
    assert trained.loss < 0.5 * untrained
    assert trained.bits_per_byte < 2
    its_model = rq.Model(its_model.config, dict(its_model.params))
    its_model.quantize()
    assert trained.loss < evaluate(its_model, blocks).loss < 1.1 * trained.loss

    prompts = (
        "class Reader:\n    def __init__(self, path):\n",
        "def count(items):\n",
        "class Queue:\n    def pop(self):\n",
    )
    options = {"tokenizer": tokenizer, "max_new_tokens": 60, "stop": (0,)}
    texts = [prompt + complete(its_model, prompt, **options) for prompt in prompts]
    lines = [text.split("\n")[:-1] for text in texts]  # the last line may be cut
    assert any(parses(some[:n]) for some in lines for n in range(3, len(some) + 1))
    words = {
        word for text, prompt in zip(texts, prompts, strict=True) for word in re.findall(r"\w+", text[len(prompt) :])
    }
    assert len(words & {"self", "return", "def", "if", "not", "None", "for", "in"}) >= 3


def parses(lines):
    try:
        return bool(ast.parse("\n".join(lines)))
    except SyntaxError:
        return False
