"""Plans of a step fit in the room that there is, and training takes what was planned."""

import gc
import tracemalloc

import numpy as np
import pytest
import tiny

import refqlora as rq
from refqlora.memory.planned import Plan, plan, plan_step, size_text
from refqlora.memory.predicted import step_bytes
from refqlora.text.dataset import Dataset

SIZES = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "layers": 3, "heads": 6, "kv_heads": 3}
SIZES |= {"head_dim": 32, "max_positions": 512, "tied": True}


@pytest.mark.parametrize("lora", [{"rank": 8}, None], ids=["adapter", "full"])
@pytest.mark.parametrize("micro", [None, 1])
def test_training_takes_no_more_than_its_steps(lora, micro):
    """What one step leaves does not lie beside the next."""
    config = rq.Config(**SIZES)
    model = rq.Model.from_config(config)
    if lora is not None:
        model.quantize()
        model.add_adapter(**lora)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 128))
    dataset = Dataset(list(tokens), list(tokens), np.ones(config.vocab_size, np.int64))
    settings = rq.TrainingConfig(steps=3, batch_size=4, micro_batch_size=micro)
    rq.train(model, dataset, settings)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rq.train(model, dataset, settings)
        found = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert plan_step(model, 128, 4, 1e12, micro).nbytes == pytest.approx(found, rel=0.03)


# ---- plans ----


def need(micro_batch, recompute):
    return 100 * micro_batch // (4 if recompute else 1)


@pytest.mark.parametrize(
    ("room", "given", "expected"),
    [
        (1600, {}, Plan(16, False, 1600)),
        (1599, {}, Plan(8, False, 800)),
        (100, {}, Plan(1, False, 100)),
        (99, {}, Plan(2, True, 50)),
        (25, {}, Plan(1, True, 25)),
        (24, {}, Plan(1, True, 25)),  # nothing fits: what needs least
        (1600, {"recompute": True}, Plan(16, True, 400)),
        (500, {"micro_batch": 4}, Plan(4, False, 400)),
        (399, {"micro_batch": 4}, Plan(4, True, 100)),
        (99, {"micro_batch": 4}, Plan(4, True, 100)),
    ],
)
def test_the_quickest_plan_that_fits(room, given, expected):
    assert plan(need, 16, room, **given) == expected


def test_halves_are_rounded_up():
    seen = []
    plan(lambda size, recompute: seen.append(size) or 2, 5, 1)
    assert seen == [5, 3, 2, 1] * 2


def test_a_step_is_planned_with_its_gradients_and_moments():
    model = rq.Model.from_config(tiny.config())
    model.quantize()
    model.add_adapter(rank=4)
    found = plan_step(model, 32, 4, 1e12)
    trained = sum(p.nbytes for p in model.trainable().values())
    assert found == Plan(4, False, step_bytes(model, 32, 4, 4))
    assert found.nbytes > 3 * trained
    assert plan_step(model, 32, 2_000_000_000, 1e10).nbytes > 1e10  # the batch alone does not fit


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.23 kB"),
        (12_345_678, "12.3 MB"),
        (9.87e11, "987 GB"),
        (4.5e15, "4,500,000 GB"),
    ],
)
def test_sizes_in_three_figures(nbytes, text):
    assert size_text(int(nbytes)) == text
