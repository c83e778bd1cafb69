"""The usual GPU stack: what can be counted is, what cannot is a range, and each option changes what it should."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest

import refqlora as rq
from refqlora.lora_config import LoraConfig
from refqlora.memory.models import adapter_size, base_bytes, linear_sizes, model_config, parameter_count
from refqlora.memory.setup import Setup
from refqlora.memory.stack import CONTEXT, TIERS, StackSetup, estimate
from refqlora.memory.tape import model_keeps

LLAMA = model_config("llama-3.1-8b")
SETUP = StackSetup(LLAMA, seq=2048)
VARIANTS = {
    "qlora": SETUP,
    "lora": replace(SETUP, method="lora"),
    "full": replace(SETUP, method="full"),
    "recomputed": replace(SETUP, recompute=True),
    "paged": replace(SETUP, optimizer="paged"),
    "a plain loop": replace(SETUP, autocast=False, holds_output=True),
    "upcast": replace(SETUP, upcast=True),
    "Gemma 2": replace(SETUP, config=model_config("gemma-2-2b")),
    "Phi-3": replace(SETUP, config=model_config("phi-3-mini"), recompute=True),
}


def nbytes(setup, *categories):
    return sum(line.nbytes.expected for line in estimate(setup).lines if line.category in categories)


def allocated(setup):
    return estimate(setup).total("allocated").expected


@pytest.mark.parametrize("name", VARIANTS)
def test_lines_tiers_and_moments_fit_together(name):
    found = estimate(VARIANTS[name])
    for line in found.lines:
        assert 0 <= line.nbytes.low <= line.nbytes.expected <= line.nbytes.high, line
        assert line.tier in TIERS
        assert line.what
        assert line.formula or line.source, line
    totals = [found.total(tier) for tier in TIERS]
    assert totals[0].expected == pytest.approx(max(found.moments.values()))
    assert max(found.moments, key=found.moments.get) == found.moment
    for smaller, larger in pairwise(totals):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
        assert smaller.expected < larger.expected
    assert totals[2].expected - totals[1].expected == CONTEXT[1]


def test_what_a_line_is_uncertain_of_has_a_source():
    for setup in VARIANTS.values():
        for line in estimate(setup).lines:
            assert line.nbytes.low == line.nbytes.high or line.source, line


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_those_of_the_papers(double_quant):
    weights = ("embeddings", "head", "norms", "codes", "constants", "linears")
    setup = replace(SETUP, double_quant=double_quant)
    assert nbytes(setup, *weights) == base_bytes(LLAMA, double_quant=double_quant)
    assert nbytes(replace(SETUP, method="lora"), *weights) == 2 * parameter_count(LLAMA)
    tied = model_config("llama-3.2-1b")
    assert nbytes(StackSetup(tied, "lora"), *weights) == 2 * parameter_count(tied)


def test_the_upcast_doubles_what_is_not_quantised():
    rest = parameter_count(LLAMA) - sum(linear_sizes(LLAMA))
    more = nbytes(replace(SETUP, upcast=True), "embeddings", "head", "norms") - nbytes(
        SETUP, "embeddings", "head", "norms"
    )
    assert more == 2 * rest
    assert allocated(replace(SETUP, upcast=True)) > allocated(SETUP) + more  # activations are wider too


def test_moments_by_optimizer():
    n = adapter_size(LLAMA, LoraConfig(rank=16))
    found = {name: nbytes(replace(SETUP, optimizer=name), "optimizer") for name in ("adamw32", "adamw8bit", "paged")}
    assert found == {"adamw32": 8 * n, "adamw8bit": 2 * n * (1 + 4 / 256), "paged": 8 * n}
    paged = [line for line in estimate(replace(SETUP, optimizer="paged")).lines if line.category == "optimizer"]
    assert paged[0].nbytes.low == 0
    assert nbytes(replace(SETUP, adapter_dtype="bfloat16"), "optimizer") == 4 * n


def test_logits_are_three_times_float32():
    bytv = SETUP.seq * LLAMA.vocab_size
    assert estimate(SETUP).moment == "the loss"
    assert nbytes(SETUP, "logits") == 12 * bytv
    assert nbytes(replace(SETUP, autocast=False, holds_output=True), "logits") == 14 * bytv
    assert nbytes(replace(SETUP, loss_chunks=8, recompute=False), "logits") == 12 * bytv / 8


def test_activations_are_the_tapes():
    setup = replace(SETUP, lora=LoraConfig(rank=8, targets=("q_proj", "v_proj"), dropout=0.1))
    kept, again = model_keeps(LLAMA, setup.run, setup.seq)
    assert nbytes(setup, "activations") == sum(one.nbytes for one in kept.values())
    assert again == {}
    assert any("dropout" in what for what in kept)


def test_recomputing_leaves_one_layer():
    setup = replace(SETUP, recompute=True, loss_chunks=64)
    found = estimate(setup)
    assert found.moment == "the last layer's backward"
    kept, again = model_keeps(LLAMA, setup.run, setup.seq, recompute=True)
    assert kept["each layer: x"].nbytes == 32 * 2 * 2048 * 4096
    assert nbytes(setup, "recomputed") == sum(one.nbytes for one in again.values())
    whole, _ = model_keeps(LLAMA, setup.run, setup.seq)
    assert sum(one.nbytes for one in again.values()) < sum(one.nbytes for one in whole.values()) / 31


def test_activations_grow_with_the_tokens():
    one, two, three = (nbytes(replace(SETUP, batch=b), "activations", "logits") for b in (1, 2, 3))
    weights = 2 * adapter_size(LLAMA, LoraConfig(rank=16))  # A and B in 16 bits, which autocast keeps
    shared = weights + 2 * 2 * SETUP.seq * LLAMA.rotary_dim  # cos and sin
    assert two - one == three - two
    assert one - (two - one) == pytest.approx(shared, rel=0.02)


def test_full_fine_tuning_peaks_in_the_update():
    p = parameter_count(LLAMA)
    found = estimate(replace(SETUP, method="full", seq=128))
    assert found.moment == "the update"
    assert found.moments["the update"] - found.moments["between steps"] == 2 * p
    in_float32 = estimate(replace(SETUP, method="full", seq=128, base_dtype="float32"))
    assert in_float32.moments["between steps"] == pytest.approx(16 * p, rel=0.001)


def test_fields_that_setup_has_too_mean_the_same():
    shared = {field.name for field in fields(Setup)} & {field.name for field in fields(StackSetup)}
    assert shared == {"config", "method", "batch", "seq", "lora", "double_quant", "recompute"}
    ours, theirs = Setup(LLAMA), StackSetup(LLAMA)
    assert all(getattr(ours, name) == getattr(theirs, name) for name in shared)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "dora"),
        ("optimizer", "sgd"),
        ("batch", 0),
        ("seq", 1.5),
        ("loss_chunks", 0),
        ("recompute", 1),
        ("autocast", None),
        ("upcast", "yes"),
        ("adapter_dtype", "float16"),
        ("base_dtype", "nf4"),
        ("config", model_config("gpt2")),
        ("lora", LoraConfig(dora=True)),
        ("lora", LoraConfig(layers=(0,))),
    ],
)
def test_what_cannot_be_estimated_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected "):
        replace(SETUP, **{field: value})


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match=r"^tier: expected one of allocated, reserved, process"):
        estimate(SETUP).total("nvidia")


def test_a_model_of_one_layer():
    small = rq.Config(50, 16, 24, 1, 2, 1, 8)
    assert allocated(StackSetup(small, "lora", seq=4)) > 0
