"""AdamW, clipping and schedules held live against torch and transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from refqlora.optim import AdamW, clip_by_global_norm, learning_rate
from refqlora.parity.oracles import their_adamw

SHAPES = {"a.weight": (64, 33), "b.weight": (16, 129), "norm.weight": (37,)}
SETTING = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
STEPS = 100


def numpy_run(start, grads, dtype):
    params = {name: p.astype(dtype) for name, p in start.items()}
    optimiser = AdamW(params, **SETTING, weight_decay=0.1, decay=lambda name: "norm" not in name)
    for g in grads:
        optimiser.step({name: x.astype(dtype) for name, x in g.items()})
    return params, optimiser.state["m"], optimiser.state["v"]


def torch_run(start, grads, dtype):
    start, *grads = ({name: x.astype(dtype) for name, x in tensors.items()} for tensors in (start, *grads))
    found = their_adamw(start, grads, {"a.weight", "b.weight"}, SETTING | {"weight_decay": 0.1})
    return found["params"], found["m"], found["v"]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    grads = [
        {name: (rng.standard_normal(shape) * 0.01).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    return start, grads


def largest(found, expected):
    """The largest difference over all tensors, relative to the largest value of each."""
    return max(np.abs(found[name] - x).max() / np.abs(x).max() for name, x in expected.items())


def test_adamw_in_float64(problem):
    for found, expected in zip(numpy_run(*problem, np.float64), torch_run(*problem, np.float64), strict=True):
        assert largest(found, expected) < 2e-15


def test_adamw_in_float32_differs_in_the_last_bits_only(problem):
    for found, expected in zip(numpy_run(*problem, np.float32), torch_run(*problem, np.float32), strict=True):
        assert all(x.dtype == np.float32 for x in found.values())
        assert largest(found, expected) < 2**-22


def test_decaying_the_wrong_parameter_shows(problem):
    start, grads = problem
    params = {name: p.copy() for name, p in start.items()}
    optimiser = AdamW(params, **SETTING, weight_decay=0.1)
    for g in grads:
        optimiser.step(g)
    assert largest(params, torch_run(start, grads, np.float32)[0]) > 1e-3


@pytest.mark.parametrize("max_norm", [0.3, 3.0, 1e6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-14)])
def test_clipping(problem, max_norm, dtype, tolerance):
    grads = {name: g.astype(dtype) for name, g in problem[0].items()}
    theirs = {
        name: torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.from_numpy(g).dtype)) for name, g in grads.items()
    }
    for name, p in theirs.items():
        p.grad = torch.from_numpy(grads[name].copy())
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    assert clip_by_global_norm(grads, max_norm) == pytest.approx(float(expected), rel=tolerance)
    assert (float(expected) > max_norm) == (max_norm < 1e6)
    for name, g in grads.items():
        np.testing.assert_allclose(g, theirs[name].grad.numpy(), rtol=tolerance)


def their_curve(make, peak, steps, **setting):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make(optimiser, **setting)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7, 50])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule, warmup):
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    length = {} if schedule == "constant" else {"num_training_steps": 50}
    expected = their_curve(make, 3e-4, 51, num_warmup_steps=warmup, **length)
    setting = {"peak": 3e-4, "schedule": schedule, "warmup_steps": warmup, "total_steps": 50}
    assert [learning_rate(step, **setting) for step in range(51)] == expected


def test_cosine_to_a_floor():
    transformers = pytest.importorskip("transformers")
    make = transformers.get_cosine_with_min_lr_schedule_with_warmup
    expected = their_curve(make, 3e-4, 51, num_warmup_steps=7, num_training_steps=50, min_lr=1e-4)
    setting = {"peak": 3e-4, "schedule": "cosine", "warmup_steps": 7, "total_steps": 50, "floor": 1e-4}
    np.testing.assert_allclose([learning_rate(s, **setting) for s in range(51)], expected, rtol=1e-14)
