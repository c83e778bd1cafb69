"""The error of quantising, and of any codebook in any block, against its definition."""

from dataclasses import astuple

import ml_dtypes
import numpy as np
import pytest

import refqlora as rq
from refqlora.blockwise import BLOCK_SIZES
from refqlora.codebooks import CODEBOOKS, FP4, INT4, NF4, small_float
from refqlora.quantization_error import (
    Error,
    error_between,
    error_by_bits,
    error_by_block_size,
    lloyd_step,
    outlier_damage,
    quantization_error,
    rounded,
    scaled_blocks,
)

NORMAL = np.random.default_rng(2).standard_normal((256, 512)).astype(np.float32)


def relative(w, back):
    return np.sqrt(((back - w.astype(np.float64)) ** 2).sum() / (w.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_error_is_its_definition(dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((700, 401)).astype(dtype)  # more than a chunk, and no multiple of one
    q = rq.quantize(w)
    e = rq.dequantize(q).astype(np.float64) - w.astype(np.float64)
    found = quantization_error(w, q)
    assert found.squares == pytest.approx((e**2).sum(), rel=1e-12)
    assert found.weight_squares == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-12)
    assert found.largest == np.abs(e).max()
    assert found.relative == pytest.approx(np.sqrt((e**2).sum() / (w.astype(np.float64) ** 2).sum()), rel=1e-12)
    assert 0.08 < found.relative < 0.1  # NF4 on normal weights


def test_errors_add_up_to_that_of_both():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((8, 64)).astype(np.float32) for _ in range(2))
    parts = [quantization_error(w, rq.quantize(w, double_quant=False)) for w in (a, b)]
    both = np.concatenate([a, b])
    whole = quantization_error(both, rq.quantize(both, double_quant=False))
    assert astuple(sum(parts, Error())) == pytest.approx(astuple(whole))


def test_zeros_have_none():
    w = np.zeros((4, 64), np.float32)
    assert quantization_error(w, rq.quantize(w)).relative == 0


# ---- any codebook, any block ----


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_rounded_is_what_quantize_gives_back(kind, block_size):
    q = rq.quantize(NORMAL, kind, block_size, double_quant=False)
    back = rounded(NORMAL, kind, block_size)
    assert back.shape == NORMAL.shape
    np.testing.assert_array_equal(back, rq.dequantize(q))


@pytest.mark.parametrize("block_size", [1, 7, 100, 600, 1000])
@pytest.mark.parametrize("codebook", [rq.normal_float(3), small_float(3, 0), np.linspace(-1, 1, 16, dtype=np.float32)])
def test_rounded_is_its_definition_in_blocks_of_any_size(codebook, block_size):
    w = NORMAL.reshape(-1)[:600].reshape(3, 200)
    expected = np.empty(600)
    for start in range(0, 600, block_size):
        block = w.reshape(-1)[start : start + block_size].astype(np.float64)
        distance = abs(block[:, None] / abs(block).max() - codebook)
        expected[start : start + block_size] = codebook[distance.argmin(axis=1)] * abs(block).max()
    np.testing.assert_allclose(rounded(w, codebook, block_size).reshape(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_is_taken(dtype):
    w = NORMAL[:2].astype(dtype)
    np.testing.assert_array_equal(rounded(w), rounded(w.astype(np.float32)))


def test_scaled_blocks():
    x, absmax = scaled_blocks(np.float32([[1, -4, 2], [0, 0, 0], [3, 1, 0.5]]), 3)
    np.testing.assert_allclose(x, [[0.25, -1, 0.5], [0, 0, 0], [1, 1 / 3, 1 / 6]], rtol=1e-6)
    np.testing.assert_array_equal(absmax, [[4], [0], [3]])
    x, absmax = scaled_blocks(np.float32([1, 2, 8, 2, 1]), 4)  # the last block is filled up
    np.testing.assert_array_equal(x[1], [1, 0, 0, 0])
    assert scaled_blocks(np.zeros((0, 3), np.float32), 4)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("w", "block_size", "said"),
    [
        (NORMAL, 0, "block_size: expected a whole number"),
        (NORMAL, 64.0, "block_size: expected a whole number"),
        ([1.0, 2.0], 64, "w: expected floats"),
        (np.arange(4), 64, "w: expected floats"),
        (np.float32([1, np.nan]), 64, "w: expected finite numbers"),
    ],
)
def test_what_cannot_be_rounded_is_refused(w, block_size, said):
    with pytest.raises(ValueError, match=said):
        rounded(w, "nf4", block_size)


def test_error_by_bits():
    found = error_by_bits(NORMAL)
    assert {family: list(errors) for family, errors in found.items()} == {
        "NormalFloat": [2, 3, 4, 5, 6, 7, 8],
        "integers": [2, 3, 4, 5, 6, 7, 8],
        "float E2M1": [4],
        "float of bitsandbytes": [4],
    }
    nf, ints = found["NormalFloat"], found["integers"]
    for error, codebook in (
        (nf[4], NF4),
        (ints[4], INT4),
        (found["float of bitsandbytes"][4], FP4),
        (nf[7], rq.normal_float(7)),
    ):
        assert error == pytest.approx(relative(NORMAL, rounded(NORMAL, codebook)), rel=1e-9)
    assert all(nf[bits] < ints[bits] for bits in (2, 3, 4, 5))
    assert all(nf[bits] > ints[bits] for bits in (6, 7, 8))
    one_block = error_by_bits(NORMAL, NORMAL.size)
    assert one_block["integers"][4] == pytest.approx(relative(NORMAL, rounded(NORMAL, INT4, NORMAL.size)), rel=1e-9)


def test_error_by_block_size():
    sizes = (16, *BLOCK_SIZES, NORMAL.size)
    found = error_by_block_size(NORMAL, sizes)
    assert list(found) == list(sizes)
    assert found[256] == pytest.approx(relative(NORMAL, rounded(NORMAL, NF4, 256)), rel=1e-9)
    assert (np.diff(list(found.values())) > 0).all()
    assert error_by_block_size(NORMAL, [64], "int4")[64] == pytest.approx(0.1077, abs=1e-3)


@pytest.mark.parametrize(("at", "block_size"), [(0, 64), (63, 64), (131, 64), (255, 100), (131, 256), (7, 1)])
def test_outlier_damage_is_its_definition(at, block_size):
    w = NORMAL.reshape(-1)[:256].reshape(2, 128)
    planted = w.reshape(-1).copy()
    planted[at] = 30 * np.sqrt((w.astype(np.float64) ** 2).mean())
    back = rounded(planted, NF4, block_size)
    others = np.arange(256) != at
    own = others & (np.arange(256) // block_size == at // block_size)
    block, tensor = outlier_damage(w, 30, block_size, at=at)
    assert tensor.relative == pytest.approx(relative(planted[others], back[others]), rel=1e-6)
    assert block.weight_squares == pytest.approx((planted[own].astype(np.float64) ** 2).sum(), rel=1e-9)
    if own.any():
        assert block.relative == pytest.approx(relative(planted[own], back[own]), rel=1e-6)
    np.testing.assert_array_equal(w.reshape(-1), NORMAL.reshape(-1)[:256])  # nothing is planted in w itself


def test_outlier_damage_grows_with_the_outlier_until_nothing_is_left():
    def damage(outlier):
        return sum((outlier_damage(NORMAL, outlier, 64, at=at)[0] for at in range(5, NORMAL.size, 8192)), Error())

    errors = [damage(outlier).relative for outlier in (0, 5, 10, 20, 40, 1000)]
    assert (np.diff(errors) > 0).all()
    assert errors[-1] == 1  # every other weight of the block has become 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outlier": -1}, "outlier: expected a number"),
        ({"outlier": "big"}, "outlier: expected a number"),
        ({"at": NORMAL.size}, "at: expected a whole number"),
        ({"at": 1.5}, "at: expected a whole number"),
        ({"w": [1.0]}, "w: expected floats"),
    ],
)
def test_an_odd_outlier_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        outlier_damage(**{"w": NORMAL, "outlier": 10, "block_size": 64, **options})


# ---- Lloyd's algorithm ----


def test_a_lloyd_step_is_its_definition():
    w = NORMAL.reshape(-1)[:1000]  # its last block is not full
    expected = NF4.copy()
    absmax = np.repeat([abs(w[i : i + 64]).max() for i in range(0, 1000, 64)], 64)[:1000].astype(np.float64)
    x = w / absmax
    codes = abs(x[:, None] - NF4).argmin(axis=1)
    for i in range(16):
        own = codes == i
        expected[i] = (absmax[own] ** 2 * x[own]).sum() / (absmax[own] ** 2).sum()
    np.testing.assert_allclose(lloyd_step(w, NF4), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block_size", [64, 1024])
def test_lloyd_steps_lower_the_error(block_size):
    codebook, errors = NF4, []
    for _ in range(5):
        errors.append(error_between(NORMAL, rounded(NORMAL, codebook, block_size)).relative)
        codebook = lloyd_step(NORMAL, codebook, block_size)
    assert (np.diff(errors) < 0).all()
    assert codebook.dtype == np.float32


def test_a_value_that_no_weight_takes_stays():
    np.testing.assert_array_equal(
        lloyd_step(np.float32([1, -1, 0.5, 0.5]), np.float32([-1, 0, 0.4, 1])), [-1, 0, 0.5, 1]
    )
