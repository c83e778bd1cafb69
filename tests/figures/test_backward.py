"""The diagram of the backward shows what a real layer keeps and computes, in its shapes."""

import re
from collections import Counter
from math import prod

import numpy as np
import pytest
from matplotlib.colors import to_hex

import refqlora as rq
from refqlora.figures import FROZEN, TRAINED
from refqlora.figures.backward import ATTENTION, MLP, backward_figure
from refqlora.memory.held import cache_bytes

SIZES = {"B": 2, "T": 5, "D": 11, "H": 6, "K": 3, "h": 4, "F": 13, "r": 7}
STEPS = {step.name: step for step in MLP} | {step.name: step for step in ATTENTION}
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def layer():
    """A quantised Llama of these sizes, the cache of its layer, and its gradients."""
    s = SIZES
    sizes = {"vocab_size": 19, "hidden_size": s["D"], "intermediate_size": s["F"], "layers": 1}
    model = rq.Model.from_config(rq.Config(**sizes, heads=s["H"], kv_heads=s["K"], head_dim=s["h"]))
    model.quantize()
    model.add_adapter(rank=s["r"])
    tokens = np.arange(s["B"] * s["T"]).reshape(s["B"], s["T"])
    logits, cache = model.forward(tokens)
    kept = cache["layers"][0]
    return model, kept, model.backward(np.ones_like(logits), cache)


def number(product):
    """What "2Hh" is with these sizes."""
    factor, names = re.fullmatch(r"(\d*)([A-Za-z]*)", product).groups()
    return int(factor or 1) * prod(SIZES[name] for name in names)


def shapes(text):
    """The shapes that "(B, T, D), 2 × (r, D)" stands for, and how often each."""
    found = Counter()
    for times, shape in re.findall(r"(?:(\d+) × )?\(([^)]*)\)", text):
        found[tuple(number(part) for part in shape.split(", "))] += int(times or 1)
    return found


@pytest.mark.parametrize("step", [*ATTENTION, *MLP], ids=lambda step: step.name)
def test_it_keeps_what_a_layer_keeps_and_trains_what_a_layer_trains(step, layer):
    model, kept, grads = layer
    held = cache_bytes(model, kept)
    numbers = sum(held[part] for part in step.parts) // 4
    said = sum(number(term) for term in step.per_token.split(" + ")) if step.kept else 0
    assert numbers == said * SIZES["B"] * SIZES["T"]
    own = [grad.shape for name, grad in grads.items() if name.startswith(tuple(LAYER + part for part in step.parts))]
    assert shapes(step.trained) == Counter(own if step.parts else [])
    assert step.weight == any(LAYER + part + ".weight" in model.params for part in step.parts)


def test_every_part_of_a_layer_is_there(layer):
    _, kept, grads = layer
    parts = [part for step in (*ATTENTION, *MLP) for part in step.parts]
    assert parts == list(kept)
    assert sum(sum(shapes(step.trained).values()) for step in (*ATTENTION, *MLP)) == len(grads)


def test_the_arrows_have_the_shapes_of_what_flows(layer):
    _, kept, _ = layer
    q, k, v, y, *_ = kept["attention"]
    flows = {
        "RMSNorm": [kept["self_attn.q_proj"][0]],
        "q, k, v": [q, k, v],
        "RoPE": [q, k, v],
        "attention": [y],
        "output": [kept["post_attention_layernorm"][0]],
        "gate, up": kept["activation"],
        "SwiGLU": [kept["mlp.down_proj"][0]],
        "down": [kept["input_layernorm"][0]],
    }
    assert {name: shapes(step.output) for name, step in STEPS.items()} == {
        name: Counter(array.shape for array in arrays) for name, arrays in flows.items()
    }


def test_the_picture_shows_them():
    figure = backward_figure()
    for axes, steps in zip(figure.axes, (MLP, ATTENTION), strict=True):
        texts = Counter(text.get_text() for text in axes.texts)
        for step in steps:
            lines = [step.name, step.output, step.backward, step.trained]
            assert all(texts[line] for line in lines if line)
        said = " ".join(text for text in texts)
        assert all(f"keeps {step.per_token}: " in said for step in steps if step.kept)
        assert texts["A, B"] == sum(bool(step.trained) for step in steps)
    colors = Counter(to_hex(patch.get_facecolor()) for axes in figure.axes for patch in axes.patches)
    assert colors[FROZEN] == 1 + sum(step.weight for step in (*ATTENTION, *MLP))  # and the legend's
    assert colors[TRAINED] == 1 + sum(bool(step.trained) for step in (*ATTENTION, *MLP))
