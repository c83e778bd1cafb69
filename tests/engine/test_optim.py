"""AdamW against its definition, clipping, and the learning rate's curves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refqlora.optim import CPU_BLOCK, SCHEDULES, AdamW, adamw_update, clip_by_global_norm, learning_rate

SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 3, 4), "scalar": ()}


def draw(shapes, rng, dtype=np.float64, scale=1.0):
    return {name: np.asarray(rng.standard_normal(shape) * scale, dtype) for name, shape in shapes.items()}


def reference_adamw(p, grads, *, lr, beta1, beta2, eps, decay, decoupled=True, eps_outside=True, corrected=True):
    """Algorithm 2 of the AdamW paper as printed, over a list of gradients; the switches plant mistakes."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        if not decoupled:
            g = g + decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t) if corrected else m
        v_hat = v / (1 - beta2**t) if corrected else v
        denominator = np.sqrt(v_hat) + eps if eps_outside else np.sqrt(v_hat + eps)
        p = p - lr * m_hat / denominator - (lr * decay * p if decoupled else 0)
    return p


def run_both(steps=20, **mistakes):
    """The largest difference between AdamW and the reference after some steps in float64."""
    rng = np.random.default_rng(0)
    setting = {"lr": 0.01, "eps": 1e-3}
    params = draw(SHAPES, rng)
    start = {name: p.copy() for name, p in params.items()}
    grads = [draw(SHAPES, rng, scale=0.01) for _ in range(steps)]
    optimiser = AdamW(params, betas=(0.8, 0.95), weight_decay=0.1, **setting)
    for g in grads:
        optimiser.step(g)
    return max(
        np.abs(
            params[name]
            - reference_adamw(p, [g[name] for g in grads], beta1=0.8, beta2=0.95, decay=0.1, **setting, **mistakes)
        ).max()
        for name, p in start.items()
    )


def test_equals_the_definition():
    assert run_both() < 1e-14


@pytest.mark.parametrize("mistake", ["decoupled", "eps_outside", "corrected"])
def test_a_planted_mistake_shows(mistake):
    assert run_both(**{mistake: False}) > 1e-3


def unblocked_adamw(p, g, m, v, step, lr, betas, eps, weight_decay):
    """What `adamw_update` does, in the plain lines that define its bits."""
    beta1, beta2 = betas
    p *= 1 - lr * weight_decay
    m += (g - m) * (1 - beta1)
    v[...] = v * beta2 + (g * (1 - beta2)) * g
    p += (m * -(lr / (1 - beta1**step))) / (np.sqrt(v) / math.sqrt(1 - beta2**step) + eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "block"), [(1, None), (1000, 1), (1000, 37), (1000, 5000), (2 * CPU_BLOCK + 5, None)])
def test_blocks_change_no_bit(size, block, dtype):
    rng = np.random.default_rng(size)
    p, m, g1, g2 = (rng.standard_normal(size).astype(dtype) for _ in range(4))
    v = rng.random(size).astype(dtype)
    blocked, plain = [p.copy(), m.copy(), v.copy()], [p.copy(), m.copy(), v.copy()]
    setting = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for step, g in enumerate([g1, g2], start=1):
        before = g.copy()
        adamw_update(blocked[0], g, *blocked[1:], step=step, **setting, block=block)
        unblocked_adamw(plain[0], g, *plain[1:], step=step, **setting)
        assert np.array_equal(g, before)
    for mine, expected in zip(blocked, plain, strict=True):
        assert mine.dtype == dtype
        assert mine.tobytes() == expected.tobytes()
    assert not np.array_equal(blocked[0], p)


def test_updates_in_place_and_the_first_step_has_the_size_of_lr():
    p = np.array([1.0, -2.0, 3.0], np.float32)
    same = p
    AdamW({"p": p}, lr=0.125).step({"p": np.array([1e-3, -5.0, 1e5], np.float32)})
    np.testing.assert_allclose(same, [0.875, -1.875, 2.875], rtol=1e-5)


def test_converges_on_a_quadratic():
    rng = np.random.default_rng(1)
    target = draw(SHAPES, rng)
    params = draw(SHAPES, rng)
    optimiser = AdamW(params)
    for step in range(1000):
        rate = learning_rate(step, peak=0.05, schedule="cosine", total_steps=1000)
        optimiser.step({name: p - target[name] for name, p in params.items()}, lr=rate)
    assert max(np.abs(p - target[name]).max() for name, p in params.items()) < 1e-4


def test_weight_decay_alone_shrinks_what_decays_and_only_that():
    zero = {"w": np.zeros(2), "b": np.zeros(2)}
    for decay in (lambda name: name == "w", {"w"}, ["w"]):
        params = {"w": np.ones(2), "b": np.ones(2)}
        optimiser = AdamW(params, lr=0.5, weight_decay=0.1, decay=decay)
        optimiser.step(zero)
        optimiser.step(zero, lr=0.25)
        np.testing.assert_allclose(params["w"], 0.95 * 0.975, rtol=1e-15)
        assert (params["b"] == 1).all()


def test_a_transposed_gradient_is_read_rightly():
    params, twin = {"p": np.ones((3, 4))}, {"p": np.ones((3, 4))}
    g = np.random.default_rng(0).standard_normal((4, 3)).T
    AdamW(params).step({"p": g})
    AdamW(twin).step({"p": np.ascontiguousarray(g)})
    assert np.array_equal(params["p"], twin["p"])


def test_continues_from_saved_state_bit_for_bit():
    rng = np.random.default_rng(3)
    grads = [draw(SHAPES, rng, np.float32) for _ in range(6)]
    params = draw(SHAPES, rng, np.float32)
    whole = {name: p.copy() for name, p in params.items()}
    optimiser = AdamW(whole, weight_decay=0.1)
    for g in grads:
        optimiser.step(g)

    first = AdamW(params, weight_decay=0.1)
    for g in grads[:3]:
        first.step(g)
    saved = {name: x.copy() for name, x in first.state_arrays().items()}
    second = AdamW(params, weight_decay=0.1)
    second.load_state(saved)
    saved["m.b.weight"][...] = 9  # copied, so this does not matter
    for g in grads[3:]:
        second.step(g)

    assert second.state["step"] == 6
    assert saved["step"].dtype == np.int64
    assert saved["step"] == 3
    for name in SHAPES:
        assert params[name].tobytes() == whole[name].tobytes()
        for moment in ("m", "v"):
            assert second.state[moment][name].tobytes() == optimiser.state[moment][name].tobytes()


def test_bytes_are_two_moments():
    params = draw(SHAPES, np.random.default_rng(0), np.float32)
    assert AdamW(params).nbytes == 2 * 4 * (15 + 7 + 24 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("b.weight"), "parameter b.weight: no gradient"),
        (
            lambda g: g.update({"a.weight": np.ones((5, 3))}),
            r"a\.weight: expected float64 \(3, 5\), got float64 \(5, 3\)",
        ),
        (
            lambda g: g.update({"b.weight": np.ones(7, np.float32)}),
            r"b\.weight: expected float64 .* got float32",
        ),
        (lambda g: g.update({"d.weight": np.ones(1)}), "d.weight: the optimiser has no such parameter"),
    ],
)
def test_a_wrong_gradient_is_named_and_changes_nothing(change, message):
    params = draw(SHAPES, np.random.default_rng(0))
    before = {name: p.copy() for name, p in params.items()}
    grads = draw(SHAPES, np.random.default_rng(1))
    change(grads)
    optimiser = AdamW(params)
    with pytest.raises(ValueError, match=message):
        optimiser.step(grads)
    assert optimiser.state["step"] == 0
    assert all(np.array_equal(params[name], p) for name, p in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": {}}, "no parameters"),
        ({"params": {"h": np.ones(2, np.float16)}}, "h: expected float32 or float64, got float16"),
        ({"params": {"t": np.ones((2, 3)).T}}, "t: .* not C-contiguous"),
        ({"betas": (0.9, 1.0)}, r"betas: .*\(0\.9, 1\.0\)"),
        ({"lr": -1.0}, "lr: .*-1"),
        ({"lr": math.nan}, "lr: .*nan"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"decay": ["q"]}, "decay: 'q' is not a parameter"),
    ],
)
def test_unusable_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**({"params": {"p": np.ones(2)}} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("v.p"), "v.p: missing"),
        (lambda s: s.pop("step"), "step: missing"),
        (lambda s: s.update({"m.p": np.ones(3)}), r"m\.p: expected float64 \(2,\), got float64 \(3,\)"),
        (lambda s: s.update({"m.q": np.ones(2)}), "m.q: the optimiser has no such entry"),
        (lambda s: s.update({"step": np.array(-1)}), "step: expected 0 or more, got -1"),
        (lambda s: s.update({"m.p": np.array([1, np.nan])}), r"m\.p: expected finite numbers, got nan at \(1,\)"),
    ],
)
def test_a_wrong_saved_state_is_named(change, message):
    optimiser = AdamW({"p": np.ones(2)})
    arrays = optimiser.state_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        optimiser.load_state(arrays)


# Clipping


def test_clipping_scales_to_the_norm_and_leaves_small_gradients_alone():
    grads = draw(SHAPES, np.random.default_rng(0))
    before = {name: g.copy() for name, g in grads.items()}
    expected = np.linalg.norm(np.concatenate([g.ravel() for g in grads.values()]))
    assert clip_by_global_norm(grads, 1e9) == pytest.approx(expected, rel=1e-15)
    assert all(np.array_equal(grads[name], g) for name, g in before.items())

    clip_by_global_norm(grads, 0.3)
    for name, g in before.items():
        np.testing.assert_allclose(grads[name], g * (0.3 / (expected + 1e-6)), rtol=1e-15)
    assert clip_by_global_norm(grads, math.inf) == pytest.approx(0.3 * expected / (expected + 1e-6), rel=1e-14)


@given(st.integers(1, 3 * CPU_BLOCK), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_norm_is_accurate_where_float32_sums_are_not(size, scale):
    g = np.full(size, scale, np.float32)
    norm = clip_by_global_norm({"g": g}, math.inf)
    assert norm == pytest.approx(math.sqrt(size) * float(np.float32(scale)), rel=1e-12)


def test_clipping_nothing_and_zero():
    zero = {"p": np.zeros(3, np.float32), "empty": np.zeros((0, 2), np.float32)}
    assert clip_by_global_norm(zero, 1.0) == 0.0
    assert clip_by_global_norm({}, 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_changes(bad):
    grads = {"fine": np.full(3, 100.0), "bad": np.array([1.0, bad, bad]), "worse": np.array([bad])}
    with pytest.raises(FloatingPointError, match="gradient of bad: 2 of 3 values"):
        clip_by_global_norm(grads, 1.0)
    assert (grads["fine"] == 100).all()
    with pytest.raises(FloatingPointError, match="gradient of huge: its square overflows"):
        clip_by_global_norm({"fine": np.ones(3), "huge": np.array([1e200])}, 1.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_unusable_max_norm(max_norm):
    with pytest.raises(ValueError, match="max_norm"):
        clip_by_global_norm({"p": np.ones(1)}, max_norm)


# The learning rate


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_curves(schedule, floor):
    setting = {"peak": 2.0, "schedule": schedule, "warmup_steps": 10, "total_steps": 110, "floor": floor}
    curve = np.array([learning_rate(step, **setting) for step in range(131)])
    np.testing.assert_allclose(curve[:11], np.linspace(0, 2, 11), rtol=1e-15)
    fall = curve[10:111]
    if schedule == "constant":
        assert (curve[10:] == 2).all()
        return
    assert fall[-1] == floor
    assert (curve[110:] == floor).all()
    assert (np.diff(fall) < 0).all()
    np.testing.assert_allclose(fall + fall[::-1], 2 + floor, rtol=1e-14)  # both fall symmetrically
    quarter = {"linear": 0.75, "cosine": 0.5 * (1 + math.sqrt(0.5))}[schedule]
    assert fall[25] == pytest.approx(floor + (2 - floor) * quarter, rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warmup_starts_at_the_peak(schedule):
    assert learning_rate(0, peak=0.1, schedule=schedule, total_steps=5) == 0.1


def test_warmup_to_the_very_end():
    rates = [learning_rate(s, peak=1.0, schedule="linear", warmup_steps=4, total_steps=4) for s in range(4)]
    assert rates == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, "schedule: expected one of constant, linear, cosine, got 'cosin'"),
        ({"warmup_steps": 11}, r"warmup_steps: .*\(10\), got 11"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"floor": 2.0}, "floor: expected a number from 0 to 1, got 2"),
        ({"peak": -1.0}, "peak: expected a number from 0 to 1e.300, got -1.0"),
        ({"peak": math.nan}, "peak: expected a number"),
        ({"step": -1}, "step: expected 0 or more, got -1"),
    ],
)
def test_unusable_curves(change, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(**({"step": 0, "peak": 1.0, "total_steps": 10} | change))
