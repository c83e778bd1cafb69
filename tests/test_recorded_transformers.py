"""The engine against what fixtures/record_transformers.py recorded from transformers, PEFT and torch.

A difference is that of a tensor's worst element, relative to the tensor's largest element. What remains is
the rounding of float32: our engine in float64 is as far from the recording.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import refqlora as rq
from refqlora.files import read_metadata, read_tensors

FILE = Path(__file__).parent / "fixtures" / "transformers.safetensors"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded():
    return dict(read_tensors(FILE))


@pytest.fixture(scope="module")
def settings():
    return json.loads(read_metadata(FILE)["recorded"])


def group(recorded, prefix):
    """{name: array} of the tensors PREFIX/name."""
    return {n.removeprefix(prefix + "/"): x for n, x in recorded.items() if n.startswith(prefix + "/")}


@pytest.fixture(params=[np.float32, np.float64])
def model(recorded, settings, request):
    """The recorded Llama, without an adapter."""
    params = {name: p.astype(request.param) for name, p in group(recorded, "base").items()}
    return rq.Model(rq.Config.from_dict(settings["config"]), params)


@pytest.fixture
def adapted(model, recorded, settings):
    """And with the recorded adapter."""
    lora = settings["lora"]
    model.add_adapter(
        rank=lora["r"], alpha=lora["lora_alpha"], targets=lora["target_modules"], rslora=lora["use_rslora"]
    )
    start = group(recorded, "adapter")
    assert model.trainable().keys() == start.keys()
    for name, p in start.items():
        model.trainable()[name][...] = p
    return model


def labels_of(recorded):
    """As refqlora takes them: the token that each position must predict."""
    labels = recorded["labels"]
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), -100)], axis=1)


def step(model, recorded):
    """-> logits, loss, gradients"""
    logits, cache = model.forward(recorded["tokens"])
    loss, dlogits = rq.cross_entropy(logits, labels_of(recorded))
    return logits, loss, model.backward(dlogits, cache)


def agree(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            agree(found[name], expected[name])
        return
    assert np.shape(found) == expected.shape
    assert np.abs(found - expected.astype(np.float64)).max() < TOLERANCE * np.abs(expected).max()


def test_the_recording(recorded, settings):
    """It is small, says what made it, and has the hard case: all sizes distinct, grouped heads, clipping."""
    assert FILE.stat().st_size < 300_000
    assert settings["versions"].keys() == {"torch", "transformers", "peft"}
    config, r = rq.Config.from_dict(settings["config"]), settings["lora"]["r"]
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.heads, config.kv_heads]
    sizes += [config.head_dim, config.heads * config.head_dim, config.kv_heads * config.head_dim, r]
    sizes += [*recorded["tokens"].shape, config.layers]
    assert len(set(sizes)) == len(sizes)
    assert recorded["norm"] > settings["step"]["max_norm"]
    assert all(x.any() for x in group(recorded, "adapter").values())
    counted = (recorded["labels"] != -100).sum(axis=1)
    assert len(set(counted)) == len(counted)


def test_the_base(model, recorded):
    logits, loss, grads = step(model, recorded)
    agree(logits, recorded["base_logits"])
    agree(loss, recorded["base_loss"])
    agree(grads, group(recorded, "base_gradient"))


def test_the_adapter(adapted, recorded):
    logits, loss, grads = step(adapted, recorded)
    agree(logits, recorded["logits"])
    agree(loss, recorded["loss"])
    agree(grads, group(recorded, "gradient"))


def test_ten_steps(adapted, recorded, settings):
    options = dict(settings["step"])
    max_norm = options.pop("max_norm")
    optimizer = rq.AdamW(adapted.trainable(), **options)
    for i in range(1, 11):
        _, _, grads = step(adapted, recorded)
        norm = rq.clip_by_global_norm(grads, max_norm)
        optimizer.step(grads)
        if i == 1:
            agree(norm, recorded["norm"])
            agree(adapted.trainable(), group(recorded, "adapter_1"))
    agree(adapted.trainable(), group(recorded, "adapter_10"))


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
def test_a_planted_error_shows(adapted, recorded, part):
    """One element of one matrix of the adapter, off by a thousandth."""
    adapted.trainable()[f"model.layers.0.{part}.lora_A.weight"][1, 2] += 1e-3
    _, _, grads = step(adapted, recorded)
    with pytest.raises(AssertionError):
        agree(grads, group(recorded, "gradient"))
