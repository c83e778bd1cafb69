"""The bits of a quantised tensor against the arrays that it holds, and one block's path against the definition."""

import doctest
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from refqlora import bits
from refqlora.bits import bit_budget, bits_by_formula, block_path, through_second_level
from refqlora.blockwise import BLOCK_SIZES
from refqlora.codebooks import DYNAMIC, NF4, dynamic_map, nearest
from refqlora.quantization import dequantize, quantize

SIZES = [1, 2, 63, 64, 65, 192, 64 * 256, 64 * 256 + 1, 98_304, 100_001]


def test_the_formulas():
    assert bits_by_formula() == 4 + 0.126953125
    assert bits_by_formula(nested_block=None) == 4.5
    assert bits_by_formula(32, 128) == float(4 + Fraction(8, 32) + Fraction(32, 32 * 128))
    assert bits_by_formula(64, 256, nested_bits=4) == 4 + 1 / 16 + 1 / 512
    assert bits_by_formula(64, None, bits=3) == 3.5


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_budget_is_that_of_the_arrays(size, double_quant):
    w = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    for block_size in BLOCK_SIZES[:3]:
        q = quantize(w, block_size=block_size, double_quant=double_quant)
        held = {"codes": q.packed, "constants": q.absmax}
        if double_quant:
            held |= {"second-level constants": q.nested_absmax, "mean": q.offset}
        budget = bit_budget(size, block_size, double_quant)
        assert budget == {part: 8 * len(array.tobytes()) / size for part, array in held.items()}
        assert sum(n for part, n in budget.items() if part != "mean") == pytest.approx(q.bits_per_param, rel=1e-15)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_without_partial_blocks_the_formula_is_exact(block_size):
    size = block_size * 256 * 3
    assert sum(bit_budget(size, block_size, double_quant=False).values()) == bits_by_formula(block_size, None)
    assert sum(bit_budget(size, block_size).values()) - 32 / size == pytest.approx(
        bits_by_formula(block_size), rel=1e-15
    )


def test_what_has_no_budget_is_refused():
    with pytest.raises(ValueError, match="size: expected a whole number from 1"):
        bit_budget(0)
    with pytest.raises(ValueError, match="bit_budget: block_size: expected one of"):
        bit_budget(100, block_size=100)


def constants(blocks=1000):
    return np.abs(np.random.default_rng(1).standard_normal((blocks, 64))).max(axis=1).astype(np.float32)


def test_by_default_the_second_level_is_the_engine_s():
    w = np.random.default_rng(2).standard_normal((300, 401)).astype(np.float32)
    one_level, q = quantize(w, double_quant=False), quantize(w)
    back = through_second_level(one_level.absmax)
    np.testing.assert_array_equal(back, q.constants())
    np.testing.assert_array_equal(dequantize(replace(one_level, absmax=back)), dequantize(q))


def test_another_second_level_is_its_definition():
    absmax, values = constants(), dynamic_map(signed=False)
    for block_size in (128, 256):
        back = through_second_level(absmax, values, block_size, subtract_mean=False)
        for start in range(0, len(absmax), block_size):
            block = absmax[start : start + block_size].astype(float)
            distances = abs(block[:, None] / block.max() - values)  # (block_size, 256): to each value of the map
            expected = values[distances.argmin(axis=1)] * block.max()
            np.testing.assert_allclose(back[start : start + block_size], expected, rtol=1e-6)


def test_the_mean_makes_the_constants_more_exact():
    def error(**options):
        return np.sqrt(np.mean((through_second_level(constants(), **options) - constants()) ** 2))

    with_mean, without = error(), error(subtract_mean=False)
    assert 2 * with_mean < without
    assert with_mean < error(codebook=dynamic_map(signed=False), subtract_mean=False) < without
    assert error(codebook=NF4) > 5 * with_mean


@pytest.mark.parametrize(("block", "block_size"), [(0, 64), (7, 64), (299, 64), (3, 32)])
def test_a_block_s_path_is_what_the_engine_does(block, block_size):
    w = np.random.default_rng(3).standard_normal((160, 120)).astype(np.float32)
    path, q = block_path(w, block, block_size), quantize(w, block_size=block_size)
    here = slice(block * block_size, (block + 1) * block_size)
    np.testing.assert_array_equal(path.weights, w.reshape(-1)[here])
    assert path.absmax == abs(path.weights).max()
    np.testing.assert_array_equal(path.codes, nearest(path.normalised, NF4))
    np.testing.assert_array_equal(path.packed, path.codes[0::2] << 4 | path.codes[1::2])
    np.testing.assert_array_equal(path.packed, q.packed[here.start // 2 : here.stop // 2])
    constants = quantize(w, block_size=block_size, double_quant=False).absmax[block // 256 * 256 :][:256]
    np.testing.assert_array_equal(path.constants, constants)
    assert path.absmax == constants[block % 256]
    assert path.nested_absmax == abs(constants - path.mean).max()
    assert path.absmax_code == nearest(np.array([(path.absmax - path.mean) / path.nested_absmax]), DYNAMIC)[0]
    assert path.absmax_back == DYNAMIC[path.absmax_code] * path.nested_absmax + path.mean
    np.testing.assert_array_equal(path.back, NF4[path.codes] * path.absmax_back)
    np.testing.assert_array_equal(path.back, dequantize(q).reshape(-1)[here])


def test_a_block_of_zeros_has_a_path():
    w = np.zeros((2, 64), np.float32)
    w[0] = 1
    path = block_path(w, 1)
    assert (path.absmax, path.mean, path.nested_absmax) == (0, 0.5, 0.5)
    assert (path.codes == 7).all()
    assert (path.back == 0).all()


@pytest.mark.parametrize("block", [2, -1, 0.0])
def test_only_a_full_block_has_a_path(block):
    with pytest.raises(ValueError, match="block: expected a whole number from 0 to 1, got"):
        block_path(np.ones(2 * 64 + 63, np.float32), block)


def test_the_examples_run():
    failed, tried = doctest.testmod(bits)
    assert tried >= 2
    assert failed == 0
