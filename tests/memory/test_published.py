"""Published measurements: each is told with its source and tier, and what the estimate is far off has a reason."""

from dataclasses import replace

import pytest

from refqlora.memory.models import base_bytes, model_config
from refqlora.memory.published import FAR, USUAL, comparisons, measurements, median_errors
from refqlora.memory.stack import CONTEXT, TIERS, estimate

FOUND = comparisons()


def of(stack, what, tier="process"):
    found = [c for c in FOUND if (c.measurement.stack, c.measurement.what, c.measurement.tier) == (stack, what, tier)]
    assert len(found) == 1, (stack, what, tier)
    return found[0]


def test_each_measurement_is_told_in_full():
    for one in measurements():
        assert one.what
        assert one.source
        assert one.versions
        assert one.tier in TIERS
        assert one.nbytes > 1e9
        assert one.when in ("peak", "between steps", "loaded")
    keys = {(one.source, one.what, one.tier, one.when) for one in measurements()}
    assert len(keys) == len(measurements()) >= 50


def test_all_sources_are_there():
    sources = " ".join(one.source for one in measurements())
    for name in ("PEFT", "litgpt", "torchtune", "unsloth", "figure 6", "bitsandbytes #1569", "fms-acceleration"):
        assert name in sources


@pytest.mark.parametrize("one", FOUND, ids=lambda c: f"{c.measurement.source[:20]}: {c.measurement.what}")
def test_what_is_far_off_has_a_reason(one):
    assert abs(one.error) < FAR or one.measurement.why, one.error


def test_the_medians_by_tier():
    usual, everything = median_errors(FOUND), median_errors(FOUND, None)
    assert {tier: n for tier, (n, _) in usual.items()} == {"allocated": 14, "reserved": 2, "process": 19}
    assert sum(n for n, _ in everything.values()) == len(FOUND)
    assert usual["allocated"][1] < 0.05
    assert usual["reserved"][1] < 0.15
    assert usual["process"][1] < 0.08


def test_the_medians_are_of_the_stack_that_is_asked_for():
    errors = sorted(abs(c.error) for c in FOUND if c.measurement.stack == "litgpt")
    assert median_errors(FOUND, "litgpt") == {"allocated": (7, errors[3])}
    assert median_errors(FOUND, "nobody") == {}


def test_most_measurements_of_a_process_lie_within_low_and_high():
    """The range is of what is not known beforehand, above all the allocator's waste."""
    within = [c.within for c in FOUND if c.measurement.stack == USUAL and c.measurement.tier != "allocated"]
    assert sum(within) >= 0.9 * len(within)


def test_what_is_said_of_the_outliers_is_so():
    upcast = [of(USUAL, f"Mistral-7B, qlora, upcast, batch {b}", "allocated") for b in (4, 8)]
    missing = [c.measurement.nbytes - c.estimate.expected for c in upcast]
    assert (missing[1] - missing[0]) / 4 == pytest.approx(0.58e9, rel=0.02)
    logits = 4 * 4096 * 32000
    assert logits == pytest.approx(0.52e9, rel=0.01)
    tables = 32 * 2 * 32768 * 128 * 2
    assert tables == pytest.approx(0.54e9, rel=0.01)

    for batch in (4, 8):
        ratios = [of(USUAL, f"Mistral-7B, qlora, batch {batch}", tier).measurement.nbytes for tier in TIERS[::2]]
        assert ratios[1] / ratios[0] == pytest.approx(1.33, abs=0.02)

    sixteen = of(USUAL, "Llama-2-7B, 16 bits, batch 4 of 1,024").measurement.setup
    assert estimate(sixteen).total("allocated").expected + CONTEXT[0] == pytest.approx(16.7e9, rel=0.005)

    assert base_bytes(model_config("qwen2.5-14b")) > of("unsloth", "qwen2.5-14b, QLoRA").measurement.nbytes

    older = of("litgpt", "Llama-2-7B, nf4, batch 1", "allocated")
    assert older.measurement.nbytes - older.estimate.expected == pytest.approx(2.8e9, rel=0.02)
    inputs = 32 * 1304 * 2 * (2 * 4096 + 11008)  # of q, k, v; of gate and up; of down; o's is kept by attention
    assert inputs == pytest.approx(1.6e9, rel=0.01)


def test_four_bits_with_the_upcast_need_more_than_without():
    lora, qlora, upcast = (of(USUAL, f"Ministral-8B, {name}") for name in ("LoRA", "QLoRA", "QLoRA, upcast"))
    assert qlora.estimate.expected < upcast.estimate.expected
    under_autocast = [
        estimate(replace(c.measurement.setup, autocast=True, holds_output=False)).total().expected / 1e9
        for c in (lora, qlora, upcast)
    ]
    assert under_autocast == pytest.approx([62, 45, 65], abs=0.6)
    assert qlora.measurement.nbytes < lora.measurement.nbytes < upcast.measurement.nbytes


def test_double_quantisation_saves_what_was_measured():
    for size, saved in ((7, 0.30e9), (13, 0.59e9)):
        pair = [of("litgpt", f"Llama-2-{size}B, {kind}, batch 1", "allocated") for kind in ("nf4", "nf4-dq")]
        assert pair[0].estimate.expected - pair[1].estimate.expected == pytest.approx(saved, abs=5e6)
