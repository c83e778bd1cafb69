"""The loop: micro-batches add up, the loss falls, and a run that is killed and resumed ends with the same bits."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from scipy.special import logsumexp

import refqlora as rq
from refqlora import resume, training
from refqlora.files import reading as files
from refqlora.files import writing
from refqlora.functional import IGNORE, cross_entropy
from refqlora.resume import CHECKPOINT, METRICS
from refqlora.text.encoding import tokenize_examples
from refqlora.text.examples import Example
from refqlora.training import TrainingConfig, evaluate, loss_and_gradients, train

TARGETS = ("q_proj", "o_proj", "down_proj")


def new_model(seed=0, dtype=np.float32, quantize=False, adapter=True, **changes):
    """The tiny Llama; with `adapter` (True or options) one on some linears, its B not zero."""
    model = rq.Model.from_config(tiny.config(**changes), seed, dtype)
    if quantize:
        model.quantize()
    if adapter:
        model.add_adapter(**{"rank": 4, "alpha": 8, "targets": TARGETS, **(adapter if adapter is not True else {})})
        rng = np.random.default_rng(1)
        for name, p in model.trainable().items():
            if "lora_B" in name:
                p[...] = rng.normal(0, 0.3, p.shape)
    return model


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


def run(model, steps, dataset=None, **options):
    names = ("held_out", "out", "resume", "on_step")
    settings = {key: value for key, value in options.items() if key not in names}
    config = TrainingConfig(**{"steps": steps, "batch_size": 4, "lr": 1e-2, **settings})
    return train(model, dataset or tiny.examples(), config, **{k: options[k] for k in names if k in options})


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

    with pytest.raises(FloatingPointError, match=r"gradient of model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight: "):
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
    with pytest.raises(FloatingPointError, match=f"gradient of {name}: 1 of 160 values are NaN or infinite"):
        run(new_model(), 2)


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
        ({"steps": 0}, "steps must be a whole number of 1 or more, not 0"),
        ({"steps": 10.0}, "steps must be a whole number of 1 or more, not 10.0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"micro_batch_size": 0}, "micro_batch_size must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"eval_every": -1}, "eval_every must be a whole number of 0 or more, not -1"),
        ({"seed": -1}, "seed must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"warmup": 11}, "warmup_steps: .* found 11"),
        ({"schedule": "sine"}, "schedule: .*'sine'"),
        ({"floor": 1.0}, "floor and peak"),
        ({"lr": -1e-3}, "lr: .* found -0.001"),
        ({"lr": math.nan}, "lr: .* found nan"),
        ({"lr": math.inf}, "lr: .* found inf"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 10, **settings})


# ---- resuming, killed at any moment ----

KILLED = {"steps": 13, "batch_size": 5, "micro_batch_size": 2, "lr": 1e-2, "schedule": "cosine", "warmup": 3}
KILLED |= {"eval_every": 2, "recompute": True, "checkpoint_every": 4, "weight_decay": 0.01}


def child(out, point=None, at=1, plant=None, pause=0.0):
    """Train in `out`, resuming what is there; die at the `at`-th time that `point` is reached."""
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"  # so that all runs do the same arithmetic
    model = rq.Model.from_config(tiny.config(), seed=3)
    model.quantize()
    model.add_adapter(rank=4, dropout=0.1, targets=TARGETS)
    dataset = tiny.examples()
    if point is not None:
        POINTS[point](at)
    config = TrainingConfig(**KILLED)
    if plant is not None:
        config = plant(config)
    train(
        model,
        dataset.subset(range(9)),
        config,
        held_out=dataset.subset(range(9, 12)),
        out=out,
        resume=True,
        on_step=lambda row: time.sleep(pause),
    )
    model.save_adapter(out)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, function):
    """`function`, which dies before (where `number` is negative, after) its |number|-th call."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        result = function(*args, **kwargs)
        if calls == -number:
            die()
        return result

    return wrapped


def kill_in_the_checkpoint(at):
    """When two tensors of the `at`-th checkpoint are written."""
    whole, bytes_of = resume.write_tensors, writing.raw
    calls = 0

    def write(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            writing.raw = at_call(3, bytes_of)
        whole(*args)

    resume.write_tensors = write


def kill_at_the_rename(name, at):
    """Before the `at`-th rename to `name`; after it, if negative."""
    real = os.replace
    counted = at_call(at, real)
    os.replace = lambda source, target: (counted if Path(target).name == name else real)(source, target)


def kill_in_a_line(at):
    calls = 0

    def opened(path, mode, **options):
        nonlocal calls
        calls += 1
        file = open(path, mode, **options)  # noqa: SIM115  (train closes it)
        if calls == at:
            line = json.dumps({"step": 1, "loss": 1.0})
            file.write(line[: len(line) // 2])
            file.close()
            die()
        return file

    training.open = opened


def kill_after_the_update(at):
    rq.AdamW.step = at_call(-at, rq.AdamW.step)


def kill_before_the_checkpoint(at):
    training.save_checkpoint = at_call(at, training.save_checkpoint)


POINTS = {
    "in the middle of the checkpoint's temporary file": kill_in_the_checkpoint,
    "the temporary file is written, not yet renamed": lambda at: kill_at_the_rename(CHECKPOINT, at),
    "the checkpoint is renamed": lambda at: kill_at_the_rename(CHECKPOINT, -at),
    "in the middle of a line of the metrics": kill_in_a_line,
    "the metrics are written anew, not yet renamed": lambda at: kill_at_the_rename(METRICS, at),
    "parameters are updated, the row not yet written": kill_after_the_update,
    "the row is written, the checkpoint not yet begun": kill_before_the_checkpoint,
}


@pytest.fixture(scope="module")
def spawn():
    """spawn(*args) -> a new process that runs `child`, forked from a server that has imported all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver on this system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tiny", "refqlora.training"])
    patch = pytest.MonkeyPatch()
    patch.setenv("OPENBLAS_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    def start(*args):
        process = context.Process(target=child, args=args)
        process.start()
        return process

    def spawn(*args):
        process = start(*args)
        process.join(120)
        return process.exitcode

    spawn.start = start
    yield spawn
    patch.undo()


@pytest.fixture(scope="module")
def uninterrupted(spawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert spawn(out) == 0
    rows = read_rows(out)
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert rows[-1]["loss"] < rows[0]["loss"]
    return out


def bits(arrays):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def read_rows(out):
    return [json.loads(line) for line in (out / METRICS).read_text().split("\n")[:-1]]


def untimed(out):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(out)]


def assert_same_run(found, expected):
    """Adapter, moments and step to the bit, every row but the time it took, and the files there are."""
    for file in ("adapter_model.safetensors", CHECKPOINT):
        assert bits(load_file(found / file)) == bits(load_file(expected / file)), file
    assert (found / METRICS).read_bytes().endswith(b"\n")
    assert untimed(found) == untimed(expected)
    assert visible(found) == visible(expected)


def visible(out):
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_and_resumed(point, at, spawn, uninterrupted, tmp_path):
    assert spawn(tmp_path, point, at) == -signal.SIGKILL
    assert spawn(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_killed_at_every_point_in_a_row(spawn, uninterrupted, tmp_path):
    """Each new start dies again: at each point, and in its first and its third update."""
    for point in POINTS:
        if point != "in the middle of a line of the metrics":
            assert spawn(tmp_path, point, 1) == -signal.SIGKILL, point
        assert spawn(tmp_path, "parameters are updated, the row not yet written", 1) == -signal.SIGKILL
        if not (tmp_path / CHECKPOINT).exists():
            assert spawn(tmp_path, "in the middle of a line of the metrics", 3) == -signal.SIGKILL
    assert spawn(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_until_it_is_done(seed, spawn, uninterrupted, tmp_path):
    """Each start is killed up to 6 rows further on and some milliseconds later, wherever it is then. Where the run was
    done before three kills had met it, there is another one."""
    rng, kills = random.Random(seed), 0
    for number in range(20):
        out = tmp_path / str(number)
        kills += kill_until_done(lambda out=out: spawn.start(out, None, 1, None, 0.002), out, rng)
        assert_same_run(out, uninterrupted)
        if kills >= 3:
            return
    pytest.fail("too few kills")


def kill_until_done(start, out, rng):
    """-> the number of kills."""
    for kills in range(50):
        process = start()
        lines = count_lines(out) if kills else 0
        wanted, wait = rng.randrange(-3, 7), rng.uniform(0, 0.03)
        while process.exitcode is None and count_lines(out) < lines + wanted:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("it does not get on")


def count_lines(out):
    try:
        return (out / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def forget_the_moments(config):
    load_state = rq.AdamW.load_state

    def load_and_forget(self, arrays):
        load_state(self, arrays)
        for x in self.state_arrays().values():
            if x.ndim:
                x[...] = 0

    rq.AdamW.load_state = load_and_forget
    return config


def another_seed(config):
    identity = training.identity
    training.identity = lambda model, dataset, config: identity(model, dataset, replace(config, seed=0))
    return replace(config, seed=1)


def another_micro_batch(config):
    identity = training.identity
    training.identity = lambda model, dataset, config: identity(model, dataset, replace(config, micro_batch_size=2))
    return replace(config, micro_batch_size=3)


@pytest.mark.parametrize("plant", [forget_the_moments, another_seed, another_micro_batch])
def test_a_planted_loss_shows_in_the_bits(plant, spawn, uninterrupted, tmp_path):
    assert spawn(tmp_path, "the checkpoint is renamed", 1) == -signal.SIGKILL
    assert spawn(tmp_path, None, 1, plant) == 0
    found, expected = (load_file(out / "adapter_model.safetensors") for out in (tmp_path, uninterrupted))
    assert found.keys() == expected.keys()
    assert all(not np.array_equal(found[name], expected[name]) for name in found)
    assert untimed(tmp_path)[:4] == untimed(uninterrupted)[:4]
    assert all(a["loss"] != b["loss"] for a, b in zip(untimed(tmp_path)[6:], untimed(uninterrupted)[6:], strict=True))


# ---- what resume takes and what it refuses ----

STEPS = 4


def short_run(out, *, model=None, dataset=None, resume=True, stop=None, **settings):
    """Four steps, a checkpoint after each second; stopped by an error after step `stop`."""

    class Stopped(Exception):
        pass

    def stop_it(row):
        if row["step"] == stop:
            raise Stopped

    options = {"checkpoint_every": 2, "batch_size": 3, "out": out, "resume": resume, "on_step": stop_it, **settings}
    model = model or new_model()
    try:
        run(model, options.pop("steps", STEPS), dataset, **options)
    except Stopped:
        return None
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory in which `short_run` has ended, to be read only; its model."""
    out = tmp_path_factory.mktemp("finished")
    return out, short_run(out)


@pytest.fixture
def half(tmp_path):
    """A directory in which `short_run` was stopped at its first checkpoint."""
    assert short_run(tmp_path, stop=2) is None
    return tmp_path


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_stopped_and_resumed(half, finished):
    assert bits(short_run(half).trainable()) == bits(finished[1].trainable())
    assert untimed(half) == untimed(finished[0])


def test_nothing_to_resume_starts_anew(tmp_path, finished):
    assert bits(short_run(tmp_path / "a" / "b").trainable()) == bits(finished[1].trainable())
    assert untimed(tmp_path / "a" / "b") == untimed(finished[0])


def test_a_finished_run_does_nothing_more(tmp_path, finished):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    steps = []
    model = new_model()
    rows = run(model, STEPS, checkpoint_every=2, batch_size=3, out=tmp_path, resume=True, on_step=steps.append)
    assert steps == []
    assert rows == read_rows(finished[0])
    assert bits(model.trainable()) == bits(finished[1].trainable())
    assert contents(tmp_path) == contents(finished[0])


def test_what_changes_no_bit_may_differ(half, finished):
    """Recomputed or not, evaluated or not, saved more often or not: it is the same run."""
    options = {"recompute": True, "held_out": tiny.examples(), "eval_every": 1, "checkpoint_every": 1}
    assert bits(short_run(half, **options).trainable()) == bits(finished[1].trainable())
    assert [row["loss"] for row in read_rows(half)] == [row["loss"] for row in read_rows(finished[0])]


def scaled_base():
    """A base whose 4-bit codes, and codes of constants, are those of the other, but not its weights."""
    model = rq.Model.from_config(tiny.config(), 0)
    for name in model.config.linears():
        model.params[name + ".weight"] *= 2
    model.quantize()
    model.add_adapter(rank=4, alpha=8, targets=TARGETS)
    return model


def one_letter_more():
    data = [*tiny.EXAMPLES[:-1], Example(tiny.EXAMPLES[-1].prompt, tiny.EXAMPLES[-1].completion + "!")]
    return tokenize_examples(data, tiny.tokenizer(), 64, 0)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: {"seed": 1}, "seed was 0 there and is 1 here"),
        (lambda: {"lr": 2e-2}, "lr was 0.01 there and is 0.02 here"),
        (lambda: {"steps": 5}, "steps was 4 there and is 5 here"),
        (lambda: {"warmup": 1}, "warmup was 0"),
        (lambda: {"batch_size": 4}, "batch_size was 3"),
        (lambda: {"micro_batch_size": 1}, "micro_batch_size was None"),
        (lambda: {"model": new_model(quantize=True, adapter={"rank": 5})}, "adapter was {'rank': 4,.*'rank': 5,"),
        (lambda: {"model": new_model(quantize=True, adapter={"dropout": 0.5})}, "adapter was .*'dropout': 0.5"),
        (lambda: {"model": new_model(quantize=True, eps=1e-5)}, "model was .*'eps': 1e-06.*'eps': 1e-05"),
        (lambda: {"model": new_model(adapter=False)}, "adapter was {.* there and is None here"),
        (lambda: {"model": new_model()}, "the weights' checksum was"),
        (lambda: {"model": new_model(seed=1, quantize=True)}, "the weights' checksum was"),
        (lambda: {"model": scaled_base()}, "the weights' checksum was"),
        (lambda: {"dataset": tiny.examples().subset([*range(1, 12), 0])}, "the data's checksum was"),
        (lambda: {"dataset": one_letter_more()}, "the data's checksum was"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(other, named, tmp_path):
    short_run(tmp_path, model=new_model(quantize=True), stop=3)
    before = contents(tmp_path)
    other = {"model": new_model(quantize=True), **other()}
    weights = bits(other["model"].trainable())
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: is of another run: {named}"):
        short_run(tmp_path, **other)
    assert contents(tmp_path) == before
    assert bits(other["model"].trainable()) == weights


def test_scaled_bases_differ_in_their_scale_only():
    """What the test above relies on."""
    a, b = (m.params["model.layers.0.mlp.up_proj.weight"] for m in (new_model(quantize=True), scaled_base()))
    np.testing.assert_array_equal(a.packed, b.packed)
    np.testing.assert_array_equal(a.absmax, b.absmax)


def cut_at(share):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content)) if share < 1 else -1])

    return damage


def scribble(path):
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


def edit(change):
    def damage(path):
        tensors, metadata = load_file(path), files.read_metadata(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return damage


def another_shape(tensors, metadata):
    name = next(name for name in tensors if name.startswith("param."))
    tensors[name] = tensors[name][:1]


@pytest.mark.parametrize(
    "damage",
    [
        *map(cut_at, (0, 0.001, 0.01, 0.1, 0.5, 0.99, 1)),
        scribble,
        edit(lambda tensors, metadata: metadata.pop("identity")),
        edit(lambda tensors, metadata: tensors.pop("adamw.step")),
        edit(lambda tensors, metadata: tensors.pop(next(name for name in tensors if name.startswith("adamw.v.")))),
        edit(lambda tensors, metadata: tensors.pop(next(name for name in tensors if name.startswith("param.")))),
        edit(lambda tensors, metadata: tensors.update(more=np.zeros(3))),
        edit(another_shape),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, half):
    damage(half / CHECKPOINT)
    before = contents(half)
    model = new_model()
    weights = bits(model.trainable())
    with pytest.raises(ValueError, match=CHECKPOINT):
        short_run(half, model=model)
    assert contents(half) == before
    assert bits(model.trainable()) == weights


def test_rows_that_are_lost_are_missed(half):
    (half / METRICS).write_text("".join((half / METRICS).read_text().splitlines(True)[:1]))
    with pytest.raises(ValueError, match=rf"{METRICS}: has 1 rows, {CHECKPOINT} beside it is at step 2"):
        short_run(half)


def test_an_unfinished_run_is_not_written_over(half):
    before = contents(half)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: holds a run stopped at step 2 of 4: resume it, or remove"):
        short_run(half, resume=False)
    assert contents(half) == before
    (half / CHECKPOINT).unlink()
    short_run(half, resume=False)
    assert len(read_rows(half)) == STEPS


def test_what_is_resumed_is_the_last_run_and_not_one_before(tmp_path, finished):
    """A finished run, then the same anew, stopped before its first checkpoint: its rows are not the first run's."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    assert short_run(tmp_path, resume=False, stop=1) is None
    assert bits(short_run(tmp_path).trainable()) == bits(finished[1].trainable())
    assert untimed(tmp_path) == untimed(finished[0])


def test_rows_are_there_once_at_any_moment(half, finished):
    """Also while a run that was resumed, or begun anew, has not come to its next checkpoint."""
    for _ in range(2):
        assert short_run(half, stop=3) is None
        assert [row["step"] for row in read_rows(half)] == [1, 2, 3]
    short_run(half)
    assert [row["step"] for row in read_rows(half)] == [1, 2, 3, 4]
    assert short_run(half, resume=False, stop=1) is None
    assert untimed(half) == untimed(finished[0])[:1]


def test_full_training_resumes(tmp_path):
    """Its checkpoint holds all the weights; bfloat16 would lose bits of them."""
    whole = short_run(tmp_path / "a", model=new_model(adapter=False))
    assert short_run(tmp_path / "b", model=new_model(adapter=False), stop=3) is None
    resumed = short_run(tmp_path / "b", model=new_model(adapter=False))
    assert bits(resumed.params) == bits(whole.params)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(whole.params[name].astype(ml_dtypes.bfloat16).astype(np.float32), whole.params[name])
