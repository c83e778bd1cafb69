"""What is predicted of a step's memory is what the allocator sees; and plans fit in the room that there is."""

import gc
import tracemalloc

import numpy as np
import pytest
import tiny

import refqlora as rq
from refqlora.architectures import ARCHITECTURES
from refqlora.lora_config import LoraConfig
from refqlora.memory.planned import Plan, plan, plan_step, size_text
from refqlora.memory.predicted import step_bytes
from refqlora.text.dataset import Dataset
from refqlora.training import loss_and_gradients

SIZES = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "layers": 3, "heads": 6, "kv_heads": 3}
SIZES |= {"head_dim": 32, "max_positions": 512, "tied": True}


def peak(model, tokens, **options):
    """Bytes at the peak of a step, over those before it; tokens and labels count."""
    labels = tokens.copy()
    loss_and_gradients(model, tokens[:1, :4], labels[:1, :4])  # what is made once and kept
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        loss_and_gradients(model, tokens, labels, rng=np.random.default_rng(0), **options)
        return tracemalloc.get_traced_memory()[1] - before + tokens.nbytes + labels.nbytes
    finally:
        tracemalloc.stop()


CASES = {
    "a QLoRA step": {},
    "a short one": {"batch": 8, "length": 16},
    "a long one": {"batch": 1, "length": 512},
    "recomputed": {"recompute": True},
    "one at a time": {"micro": 1},
    "one at a time, recomputed": {"micro": 1, "recompute": True},
    "plain LoRA": {"quantize": False},
    "few linears": {"lora": {"rank": 8, "targets": ("q_proj", "v_proj")}},
    "dropout": {"lora": {"rank": 8, "dropout": 0.1}},
    "DoRA": {"lora": {"rank": 8, "dora": True}},
    "DoRA with dropout": {"lora": {"rank": 8, "dora": True, "dropout": 0.1}},
    "full training": {"lora": None},
    "full training, one at a time": {"lora": None, "micro": 1},
    "full training, recomputed": {"lora": None, "recompute": True},
    "full training, untied": {"lora": None, "tied": False},
    "a large vocabulary": {"vocab_size": 40000, "length": 32},
    "a small vocabulary": {"vocab_size": 64},
    "a head in 16 bits": {"half": True, "vocab_size": 20000, "batch": 1, "length": 32},
    "float64": {"dtype": np.float64},
    "wide": {"hidden_size": 512, "intermediate_size": 1024, "heads": 16, "kv_heads": 8, "layers": 2, "length": 32},
    "qwen3": {"model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "kv_heads": 6, "activation": "gelu_tanh"},
    "phi3": {"model_type": "phi3"},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma2, recomputed": {"model_type": "gemma2", "final_logit_softcapping": 30.0, "recompute": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_peak_of_a_step_is_predicted(case):
    options = {"batch": 4, "length": 128, "lora": {"rank": 8}, "quantize": True, "dtype": np.float32, **case}
    sizes = {
        key: value for key, value in options.items() if key in {*SIZES, "model_type", "activation"} or "soft" in key
    }
    config = rq.Config(**{**SIZES, **sizes, **ARCHITECTURES[options.get("model_type", "llama")].fixed})
    model = rq.Model.from_config(config, 0, options["dtype"])
    lora = options["lora"]
    if lora is not None:
        if options["quantize"]:
            model.quantize()
        model.add_adapter(**lora)
    if options.get("half"):
        model.params[config.head] = model.params[config.head].astype(np.float16)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (options["batch"], options["length"]))
    micro, recompute = options.get("micro"), options.get("recompute", False)
    found = peak(model, tokens, micro_batch_size=micro, recompute=recompute)
    predicted = step_bytes(
        config,
        None if lora is None else LoraConfig(**lora),
        options["length"],
        options["batch"],
        micro_batch=micro,
        recompute=recompute,
        quantized=lora is not None and options["quantize"],
        half_head=options.get("half", False),
        itemsize=model.dtype.itemsize,
    )
    assert predicted == pytest.approx(found, rel=0.2)


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
    assert plan_step(model, 128, 4, 1e12, micro).nbytes == pytest.approx(found, rel=0.2)


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
    assert found == Plan(4, False, 2 * trained + step_bytes(model.config, LoraConfig(rank=4), 32, 4))
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
