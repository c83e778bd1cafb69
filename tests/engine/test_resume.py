"""A run that is killed at any moment and resumed ends with the same bits; which runs are resumed and refused."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from runs import TARGETS, bits, new_model, read_rows, run
from safetensors.numpy import load_file, save_file

import refqlora as rq
from refqlora import resume, training
from refqlora.files import reading as files
from refqlora.files import writing
from refqlora.resume import CHECKPOINT, METRICS
from refqlora.text.encoding import tokenize_examples
from refqlora.text.examples import Example
from refqlora.training import TrainingConfig, train

# ---- resuming, killed at any moment ----

KILLED = {"steps": 13, "batch_size": 5, "micro_batch_size": 2, "lr": 1e-2, "schedule": "cosine", "warmup": 3}
KILLED |= {"eval_every": 2, "recompute": True, "checkpoint_every": 4, "weight_decay": 0.01}


def child(out, point=None, at=1, plant=None, pause=0.0):
    """Train in `out`, resuming a checkpoint that is there; die at the `at`-th time that `point` is reached. Ctrl-C ends
    it with exit code 130, but for a moment that it spends on loading what it needs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _train(out, point, at, plant, pause)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(out, point, at, plant, pause):
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
        resume=(out / CHECKPOINT).exists(),
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

    resume.open = opened


def kill_after_the_update(at):
    rq.AdamW.step = at_call(-at, rq.AdamW.step)


def kill_before_the_checkpoint(at):
    resume.save_checkpoint = at_call(at, resume.save_checkpoint)


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


# ---- Ctrl-C ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interrupted_at_random_moments_until_it_is_done(seed, spawn, uninterrupted, tmp_path):
    rng, stops = random.Random(seed), 0
    for number in range(20):
        out = tmp_path / str(number)
        for _ in range(50):
            process = spawn.start(out, None, 1, None, 0.002)
            wanted, wait = count_lines(out) + rng.randrange(1, 7), rng.uniform(0, 0.03)
            while process.exitcode is None and count_lines(out) < wanted:
                time.sleep(0.001)
            time.sleep(wait)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGINT)
            process.join(120)
            if process.exitcode == 0:
                break
            assert process.exitcode == 130
            assert files.read_metadata(out / CHECKPOINT)["step"] == str(len(read_rows(out)))  # nothing is lost
            stops += 1
        assert_same_run(out, uninterrupted)
        if stops >= 5:
            return
    pytest.fail("too few interrupts")


def interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)


def in_the_update(patch, at):
    real, calls = rq.optim.adamw_update, iter(range(10**6))
    arrays = len(new_model().trainable())

    def update(*args, **options):  # of the second array of a step: half of the update is made
        real(*args, **options)
        if next(calls) == (at - 1) * arrays + 1:
            interrupt()

    patch.setattr(rq.optim, "adamw_update", update)


def at_the_call(module, name):
    def plant(patch, at):
        real, calls = getattr(module, name), iter(range(1, 10**6))

        def wrapped(*args, **options):
            if next(calls) == at:
                interrupt()
            return real(*args, **options)

        patch.setattr(module, name, wrapped)

    return plant


INTERRUPTS = {  # where Ctrl-C comes, in the third step, and which step is saved
    "the gradients": (at_the_call(training, "loss_and_gradients"), 2),
    "half of the update": (in_the_update, 3),
    "the evaluation": (at_the_call(training, "evaluate"), 3),
    "a row's line": (at_the_call(resume.Run, "record"), 3),
}


@pytest.mark.parametrize(("plant", "step"), INTERRUPTS.values(), ids=INTERRUPTS)
def test_ctrl_c_writes_a_checkpoint_and_names_it(plant, step, tmp_path, monkeypatch):
    """And the resumed run has the bits, and the rows, of one never interrupted."""
    options = {"held_out": tiny.examples().subset([1]), "eval_every": 1}
    whole = short_run(tmp_path / "whole", **options)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "cut"
    plant(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt) as stop:
        short_run(out, **options)
    monkeypatch.undo()
    assert str(stop.value) == f"step {step} of 4 is saved in {out / CHECKPOINT}"
    assert files.read_metadata(out / CHECKPOINT)["step"] == str(step)
    assert len(read_rows(out)) == step
    assert signal.getsignal(signal.SIGINT) is before
    resumed = short_run(out, **options)
    assert bits(resumed.trainable()) == bits(whole.trainable())
    assert untimed(out) == untimed(tmp_path / "whole")


def test_without_a_directory_ctrl_c_saves_nothing():
    with pytest.raises(KeyboardInterrupt) as stop:
        run(new_model(), 4, on_step=interrupt)
    assert str(stop.value) == ""


def test_in_another_thread_training_is_not_interrupted(tmp_path):
    """Python lets only the main thread set a handler."""
    thread = threading.Thread(target=short_run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert len(read_rows(tmp_path)) == STEPS


def test_one_process_at_a_time(spawn, tmp_path):
    process = spawn.start(tmp_path, None, 1, None, 0.05)
    while process.exitcode is None and count_lines(tmp_path) < 1:
        time.sleep(0.001)
    with pytest.raises(ValueError, match=f"{tmp_path}: another process is writing here"):
        short_run(tmp_path)
    process.join(120)
    assert process.exitcode == 0


# ---- what resume takes and what it refuses ----

STEPS = 4


def short_run(out, *, model=None, dataset=None, resume=None, stop=None, **settings):
    """Four steps, a checkpoint after each second, resuming one that is there; stopped by an error after step `stop`."""
    resume = (out / CHECKPOINT).exists() if resume is None else resume

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


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_resume_is_an_error(there, tmp_path):
    out = tmp_path / "out"
    if there:
        assert short_run(out, stop=1) is None  # stopped before its first checkpoint
    with pytest.raises(FileNotFoundError, match=f"out/{CHECKPOINT}: no such file: there is no run to resume"):
        short_run(out, resume=True)


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
        (lambda: {"model": new_model(quantize=True, adapter={"rank": 5})}, "adapter's rank was 4 there and is 5 here"),
        (
            lambda: {"model": new_model(quantize=True, adapter={"dropout": 0.5})},
            "adapter's dropout was 0.0 there and is 0.5",
        ),
        (lambda: {"model": new_model(quantize=True, eps=1e-5)}, "model's eps was 1e-06 there and is 1e-05"),
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


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"lr": 1', "[" * 100_000, "9" * 5000])
def test_metadata_that_are_no_object_are_named(text, half):
    edit(lambda tensors, metadata: metadata.update(identity=text))(half / CHECKPOINT)
    for resumed in (True, False):
        with pytest.raises(
            ValueError, match=f"{CHECKPOINT}: identity in the metadata: expected a JSON object, got '"
        ) as e:
            short_run(half, resume=resumed)
        assert len(str(e.value)) < 400


@pytest.mark.parametrize("step", ["", "x", "-1", "1.5", "٣", "1" * 5000])
def test_a_step_that_is_no_number_is_named(step, half):
    edit(lambda tensors, metadata: metadata.update(step=step))(half / CHECKPOINT)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: step in the metadata: expected a number, got '"):
        short_run(half, resume=False)


@pytest.mark.parametrize("kind", ["param", "adamw.m", "adamw.v"])
def test_a_checkpoint_that_is_not_finite_is_refused(kind, half):
    name = f"{kind}.model.layers.1.mlp.down_proj.lora_B.weight"
    edit(lambda tensors, metadata: tensors[name].__setitem__((0, 0), np.nan))(half / CHECKPOINT)
    model = new_model()
    weights = bits(model.trainable())
    with pytest.raises(
        ValueError,
        match=rf"{CHECKPOINT}: .*{name.removeprefix('adamw.')}: expected finite numbers, got nan at \(0, 0\)",
    ):
        short_run(half, model=model)
    assert bits(model.trainable()) == weights


@pytest.mark.parametrize("line", ["3", "[1]", "null", "", '{"step": 2}', '{"step": 2', "\udcff", "[" * 100_000])
def test_a_row_that_is_none_is_named(line, half):
    lines = (half / METRICS).read_text().splitlines()
    (half / METRICS).write_bytes("\n".join([lines[0], line, ""]).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{METRICS}:2: expected the row of step 2: {CHECKPOINT} is at step 2"):
        short_run(half)


@pytest.mark.parametrize("name", [CHECKPOINT, METRICS])
def test_a_full_disk_names_the_file(name, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == CHECKPOINT:
        monkeypatch.setattr(writing, "raw", full)
    else:
        monkeypatch.setattr(resume, "open", lambda *args, **options: full(), raising=False)
    with pytest.raises(OSError, match=f"^{tmp_path / name}: No space left on device$"):
        short_run(tmp_path)


def test_rows_that_are_lost_are_missed(half):
    (half / METRICS).write_text("".join((half / METRICS).read_text().splitlines(True)[:1]))
    with pytest.raises(ValueError, match=rf"{METRICS}:2: expected the row of step 2: {CHECKPOINT} is at step 2"):
        short_run(half)


def test_an_unfinished_run_is_not_written_over(half):
    before = contents(half)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: holds an unfinished run, at step 2 of 4: resume it"):
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
    """Also while a resumed or new run has not reached its next checkpoint."""
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
