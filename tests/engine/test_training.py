"""The loop: micro-batches add up, the loss falls, rows record each step; bad settings are refused."""

import math

import numpy as np
import pytest
import tiny
from runs import bits, new_model, read_rows, run
from scipy.special import logsumexp

import refqlora as rq
from refqlora import training
from refqlora.files import reading as files
from refqlora.functional import IGNORE, cross_entropy
from refqlora.resume import CHECKPOINT
from refqlora.text.encoding import tokenize_examples
from refqlora.text.examples import Example
from refqlora.training import TrainingConfig, evaluate, loss_and_gradients


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# ---- one step ----

KINDS = {"adapter": {}, "quantised": {"quantize": True}, "full": {"adapter": False}}


@pytest.fixture
def uneven():
    """Tokens and labels (6, T) that count 9, 47, 0, 0, 1 and 20 labels."""
    rng = np.random.default_rng(5)
    tokens, labels = rng.integers(0, 300, (2, 6, 50))
    for row, count in zip(labels, (9, 47, 0, 0, 1, 20), strict=True):
        row[rng.permutation(50)[count:]] = IGNORE
    return tokens, labels


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 9])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_micro_batches_add_up_to_the_batch(kind, size, recompute, uneven):
    """Sizes 1 and 2 have a micro-batch in which nothing counts; in all of them the counts differ."""
    model = new_model(dtype=np.float64, **kind)
    logits, cache = model.forward(uneven[0])
    loss, dlogits = cross_entropy(logits, uneven[1])
    expected = model.backward(dlogits, cache)
    found_loss, found = loss_and_gradients(model, *uneven, micro_batch_size=size, recompute=recompute)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert found.keys() == expected.keys() == model.trainable().keys()
    for name in expected:
        assert np.abs(expected[name]).max() > 0
        assert relative(found[name], expected[name]) < 1e-12, name


def test_the_mean_of_means_is_another_gradient(uneven):
    """The planted mistake: each micro-batch divided by its own count, then averaged."""
    model = new_model(dtype=np.float64)
    loss, expected = loss_and_gradients(model, *uneven)
    parts = [loss_and_gradients(model, uneven[0][i : i + 1], uneven[1][i : i + 1]) for i in (0, 1, 4, 5)]
    assert abs(np.mean([part[0] for part in parts]) / loss - 1) > 1e-3
    for name in expected:
        assert relative(np.mean([part[1][name] for part in parts], axis=0), expected[name]) > 0.1, name


def test_a_step_needs_a_label_that_counts(uneven):
    with pytest.raises(ValueError, match="no label counts"):
        loss_and_gradients(new_model(), uneven[0], np.full_like(uneven[1], IGNORE))


# ---- evaluation ----


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_evaluate_is_the_mean_over_all_counted_tokens(batch_size):
    model, dataset = new_model(dtype=np.float64), tiny.examples()
    total, count = 0.0, 0
    for tokens, labels in zip(dataset.tokens, dataset.labels, strict=True):  # one at a time: no padding
        logits = model.forward(tokens[None].astype(int))[0][0]
        at = np.flatnonzero(labels != IGNORE)
        total += (logsumexp(logits, axis=-1)[at] - logits[at, labels[at]]).sum()
        count += len(at)
    nbytes = sum(len(example.completion.encode()) for example in tiny.EXAMPLES)  # the text's end has none
    found = evaluate(model, dataset, batch_size)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-12)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / nbytes, rel=1e-12)


def test_evaluate_is_without_dropout():
    results = {evaluate(new_model(adapter={"dropout": rate}), tiny.examples()) for rate in (0.0, 0.5)}
    assert len(results) == 1


def test_evaluate_refuses_what_counts_nothing():
    only_the_end = tokenize_examples([Example("", "\n")], tiny.tokenizer(), 64, 0)  # its first token has no context
    assert only_the_end.counted_tokens == 1
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(new_model(), only_the_end)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(new_model(), tiny.examples().subset([]))


# ---- training ----


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_few_examples_are_learnt_by_heart(kind):
    dataset = tiny.examples().subset(range(4))
    model = new_model(**{"adapter": {"rank": 8, "targets": "all-linear"}, **kind})
    model.params["lm_head.weight"] *= 20  # so that a frozen head can speak with certainty
    base = {name: p for name, p in model.params.items() if model.active and isinstance(p, np.ndarray)}
    before = bits(base)
    losses = [row["loss"] for row in run(model, 80, dataset, lr=2e-2, schedule="cosine")]
    assert losses[0] > 5
    assert losses[-1] < 0.1
    assert losses[-1] == pytest.approx(evaluate(model, dataset).loss, rel=0.05)
    assert bits(base) == before


def test_weight_decay_is_for_matrices():
    """After one step the decay shows as -lr decay w, on what has two dimensions and on nothing else."""
    plain, decayed = (new_model(adapter=False, dtype=np.float64, attention_bias=True) for _ in range(2))
    start = {name: p.copy() for name, p in plain.params.items()}
    run(plain, 1)
    run(decayed, 1, weight_decay=0.1)
    assert {p.ndim for p in plain.params.values()} == {1, 2}
    for name, p in plain.params.items():
        shrunk = -1e-2 * 0.1 * start[name] * (p.ndim == 2)
        np.testing.assert_allclose(decayed.params[name] - p, shrunk, rtol=1e-9, atol=1e-15, err_msg=name)
        assert not np.array_equal(p, start[name]), name


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model = new_model()
    name = "model.layers.1.mlp.down_proj.lora_B.weight"
    broken = {}

    def break_it(row):
        if row["step"] == 3:
            model.trainable()[name][0, 0] = np.nan
            broken.update({key: p.copy() for key, p in model.trainable().items()})

    with pytest.raises(FloatingPointError, match=rf"step 4, learning rate 0\.01: parameter {name}: 1 of 160 values"):
        run(model, 9, out=tmp_path, on_step=break_it, checkpoint_every=2)
    for key, p in model.trainable().items():
        np.testing.assert_array_equal(p, broken[key])  # the step was not made
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert files.read_metadata(tmp_path / CHECKPOINT)["step"] == "2"


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    name = "model.layers.1.self_attn.o_proj.lora_B.weight"
    backward = rq.Model.backward

    def broken(self, dlogits, cache):
        grads = backward(self, dlogits, cache)
        grads[name][1, 2] = np.inf
        return grads

    monkeypatch.setattr(rq.Model, "backward", broken)
    with pytest.raises(FloatingPointError, match=f"step 1, learning rate 0.01: gradient of {name}: 1 of 160 values"):
        run(new_model(), 2)


def test_what_overflows_in_the_optimiser_is_named(tmp_path):
    """A gradient whose square overflows v: no later gradient shows it, as its parameter never moves again."""
    model = new_model()
    name = "model.layers.1.mlp.down_proj.lora_B.weight"
    backward = rq.Model.backward

    def large(self, dlogits, cache):
        return {key: g + np.float32(1e30) * (key == name) for key, g in backward(self, dlogits, cache).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rq.Model, "backward", large)
        with pytest.raises(FloatingPointError, match=rf"step 2, .*: AdamW's v\.{name}: 160 of 160 values"):
            run(model, 9, out=tmp_path, checkpoint_every=2, max_grad_norm=0)
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_last_update_is_looked_at_too():
    """Where no gradient follows that would show it, and nothing is saved."""
    model = new_model()
    name = "model.layers.0.mlp.down_proj.lora_B.weight"

    def break_it(self, grads, lr):
        self.params[name][0, 0] = np.inf
        self.state["step"] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rq.AdamW, "step", break_it)
        with pytest.raises(
            FloatingPointError, match=f"step 1, .*: parameter {name}: 1 of 160 values are NaN or infinite"
        ):
            run(model, 1)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([2.0] * 10 + [3.5] * 10, "from 2.00 to 3.50"),
        ([2.0, 2.0, *[9.0] * 16, 2.1, 2.2], None),
        ([2.0] * 10 + [2.9] * 10, None),
        ([2.0, 3.2], "from 2.00 to 3.20"),
        ([2.0], None),
    ],
)
def test_a_run_that_diverges_is_told(losses, told, monkeypatch, recwarn):
    """Where the loss ends a nat above that of the first steps, by the mean of a tenth of them."""
    step, upcoming = training.loss_and_gradients, iter(losses)
    monkeypatch.setattr(
        training, "loss_and_gradients", lambda *args, **options: (next(upcoming), step(*args, **options)[1])
    )
    run(new_model(), len(losses), lr=1e-3)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (told is not None)
    if told:
        assert f"the training loss rose {told}: the run has diverged" in messages[0]
        assert "a learning rate below 0.001" in messages[0]


def test_rows_tell_what_was_done():
    dataset = tiny.examples()
    seen = []
    settings = {"schedule": "cosine", "warmup": 4, "floor": 1e-3, "eval_every": 3, "max_grad_norm": 1e-3, "seed": 7}
    rows = run(new_model(), 10, dataset, held_out=dataset.subset([1]), on_step=seen.append, **settings)
    assert seen == rows
    assert [row["step"] for row in rows] == list(range(1, 11))
    rates = [1e-2 * step / 4 for step in range(4)]
    rates += [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [3, 6, 9]
    for step, row in enumerate(rows):
        labels = dataset.batch(training.batch_indices(12, 4, step, 7))[1]
        assert row["tokens"] == (labels != IGNORE).sum()
        assert row["grad_norm"] > 1e-3  # of the gradient as it was, not as it was clipped


def test_clipping_can_be_turned_off():
    ends = []
    for norm in (0, 1e30, 1.0):
        model = new_model()
        model.params["lm_head.weight"] *= 20
        assert all(row["grad_norm"] > 2 for row in run(model, 3, max_grad_norm=norm))
        ends.append(bits(model.trainable()))
    assert ends[0] == ends[1] != ends[2]


def test_evaluation_takes_no_more_memory_than_a_micro_batch(monkeypatch):
    sizes = []
    forward = rq.Model.forward
    monkeypatch.setattr(
        rq.Model, "forward", lambda self, tokens, **kw: sizes.append(len(tokens)) or forward(self, tokens, **kw)
    )
    run(new_model(), 2, held_out=tiny.examples(), eval_every=1, micro_batch_size=3)
    assert max(sizes) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1 to 1000000000000, got 0"),
        ({"steps": 10.0}, "steps: expected .* got 10.0"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected"),
        ({"eval_every": -1}, "eval_every: expected a whole number from 0 to 1000000000000, got -1"),
        ({"seed": -1}, "seed: expected"),
        ({"warmup": -1}, "warmup: expected"),
        ({"warmup": 11}, "warmup_steps: .* got 11"),
        ({"schedule": "sine"}, "schedule: .*'sine'"),
        ({"floor": 1.0}, "floor: expected a number from 0 to 0.0002, got 1.0"),
        ({"lr": -1e-3}, "lr: .* got -0.001"),
        ({"lr": math.nan}, "lr: .* got nan"),
        ({"lr": math.inf}, "lr: .* got inf"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a number from 0 to inf, got -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: expected"),
        ({"steps": True}, "steps: expected .* got True"),
        ({"steps": 10**400}, "steps: expected .* got 1000*\\.\\.\\."),
        ({"lr": "x"}, "lr: expected a number from 0 to 1e.300, got 'x'"),
        ({"lr": 10**400}, "lr: expected"),
        ({"betas": 0.9}, "betas: expected two numbers from 0 to below 1, got 0.9"),
        ({"betas": (0.9, None)}, "betas: expected"),
        ({"floor": None}, "floor: expected"),
        ({"schedule": ["cosine"]}, "schedule: expected"),
        ({"recompute": 1}, "recompute: expected true or false, got 1"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 10, **settings})
