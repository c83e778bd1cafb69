"""The engine against the page that defines it, bit for bit where it quantises; and the page's own gradients and run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradcheck import TOLERANCE, central_difference, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refqlora as rq
from refqlora import minimal
from refqlora.codebooks import dynamic_map
from refqlora.lora import LoRA, linear_backward, linear_forward

PAGE = Path(minimal.__file__)


def same(found, expected):
    """Equal to the bit, -0.0 included."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- codes -------------------------------------------------------------------------------------------------


def test_the_values_that_codes_stand_for():
    same(minimal.NF4, rq.NF4)
    same(minimal.DYNAMIC, dynamic_map())


@st.composite
def tensors(draw):
    """float32, even in number: full blocks and partial ones, in both levels of constants, of any scale."""
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(1, 40).map(lambda n: 64 * n)),
            st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 100).map(lambda n: 2 * n)),
            st.tuples(st.sampled_from([2, 62, 64, 64 * 256, 64 * 256 + 2, 64 * 512])),
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal(shape)
    flat = w.reshape(-1)
    kind = draw(st.sampled_from(["plain", "zeros", "outlier", "sparse", "ties"]))
    if kind == "zeros":
        flat[rng.integers(w.size) :] = 0
    elif kind == "outlier":
        flat[rng.integers(w.size)] = 1e4
    elif kind == "sparse":
        flat[rng.random(w.size) < 0.95] = -0.0
    elif kind == "ties":  # which scaling turns into near ties: one rounding more, and another code is the nearest
        flat[:] = rng.choice((rq.NF4[:-1] + rq.NF4[1:]) / 2, w.size)
        flat[::32] = 1
    scale = 10.0 ** draw(st.sampled_from([-44, -40, -38, -30, -3, -2, -1, 0, 1, 30]))
    return (w * scale * rng.uniform(1, 2)).astype(np.float32)


@settings(deadline=None, max_examples=200)
@given(tensors())
@example(np.zeros(64, np.float32))
@example(np.zeros((3, 70), np.float32))
@example(np.full(64 * 300, 0.5, np.float32))  # each constant is the mean
def test_quantize_and_dequantize_to_the_bit(w):
    q, page = rq.quantize(w), minimal.quantize(w)
    for found, expected in zip((q.packed, q.absmax, q.nested_absmax, q.offset), page, strict=False):
        same(found, expected)
    same(rq.dequantize(q), minimal.dequantize(*page))


# ---- the linear layer --------------------------------------------------------------------------------------


def layer():
    x, A, B, dy = draw(7, 10), draw(3, 10, seed=1), draw(12, 3, seed=2), draw(7, 12, seed=3)
    w = draw(12, 10, seed=4).astype(np.float32)
    return x, w, A, B, 1.7, dy


def test_the_linear_layer():
    x, w, A, B, s, dy = layer()
    W = minimal.quantize(w)
    y, cache = linear_forward(x, rq.quantize(w), None, LoRA(A, B, s))
    dx, grads = linear_backward(dy, cache)
    expected = minimal.linear_forward(x, W, A, B, s), *minimal.linear_backward(dy, x, W, A, B, s)
    for found, value in zip((y, dx, grads["lora_A.weight"], grads["lora_B.weight"]), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-13)


def test_gradients_of_the_linear_layer():
    x, w, A, B, s, dy = layer()
    W = minimal.quantize(w)

    def loss():
        return (dy * minimal.linear_forward(x, W, A, B, s)).sum()

    for value, gradient in zip((x, A, B), minimal.linear_backward(dy, x, W, A, B, s), strict=True):
        assert gradient.shape == value.shape
        numeric = central_difference(loss, value, np.arange(value.size))
        assert relative_error(numeric, gradient.reshape(-1)) < TOLERANCE


def test_gradients_of_the_network():
    W1, W2 = minimal.quantize(draw(6, 1024).astype(np.float32)), minimal.quantize(draw(128, 6).astype(np.float32))
    params = [draw(*shape) / 3 for shape in ((3, 1024), (6, 3), (3, 6), (128, 3))]
    windows = np.random.default_rng(5).integers(128, size=(4, 9))
    loss, grads = minimal.network(windows, W1, W2, *params)
    assert 1 < loss < 30
    for p, gradient in zip(params, grads, strict=True):
        assert gradient.shape == p.shape
        elements = np.random.default_rng(6).choice(np.flatnonzero(gradient), 18, replace=False)
        numeric = central_difference(lambda: minimal.network(windows, W1, W2, *params)[0], p, elements)
        assert relative_error(numeric, gradient.reshape(-1)[elements]) < TOLERANCE


# ---- the optimiser -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay):
    page = [draw(3, 5), draw(7, seed=1)]
    state = [np.zeros((2, *p.shape)) for p in page]
    params = {str(i): p.copy() for i, p in enumerate(page)}
    optimiser = rq.AdamW(params, weight_decay=decay)
    for t in range(1, 21):
        grads = [draw(3, 5, seed=2 * t), draw(7, seed=2 * t + 1)]
        minimal.adamw(page, grads, state, t, lr=0.01 / t, decay=decay)
        optimiser.step({str(i): g for i, g in enumerate(grads)}, lr=0.01 / t)
    for i, p in enumerate(page):
        np.testing.assert_allclose(params[str(i)], p, rtol=1e-12, atol=1e-14)
    assert abs(page[0] - draw(3, 5)).max() > 1e-2


# ---- the page ----------------------------------------------------------------------------------------------


def test_it_fits_on_a_page_and_stands_alone():
    source = PAGE.read_text()
    assert len(source.splitlines()) <= 120
    modules = re.findall(r"^ *(?:from|import) (\S+)", source, re.MULTILINE)
    assert sorted(set(modules)) == ["inspect", "numpy", "pydoc_data.topics", "scipy.special"]


def test_its_run_learns_english_on_the_frozen_base():
    run = subprocess.run([sys.executable, "-m", "refqlora.minimal"], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    rows = re.findall(r"step +(\d+): loss ([\d.]+) on Python code, ([\d.]+) on English", run.stdout)
    step, code, english = np.array(rows, float).T
    assert step.tolist() == [0, 100, 200, 300] * 2
    assert code[3] < code[0] - 2  # the base learns Python code from nothing
    assert abs(code[4] - code[3]) < 0.1  # 4 bits cost little
    assert english[7] < english[4] - 0.3  # the adapter learns English
    weights = [rq.quantize(np.zeros(shape, np.float32)) for shape in ((128, 1024), (128, 128))]
    assert run.stdout.count(f"147,456 frozen weights take {sum(q.nbytes for q in weights):,} bytes, not 589,824;") == 2
