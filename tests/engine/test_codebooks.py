"""Every codebook to the bit, and the nearest value against its definition, near every threshold."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

import refqlora.codebooks as codebooks
from refqlora.codebooks import (
    DYNAMIC,
    FP4,
    INT4,
    NF4,
    dynamic_map,
    fp4,
    integers,
    nearest,
    normal_float,
    outermost_probability,
    small_float,
)
from refqlora.files.reading import read_tensors
from refqlora.parity.checks import VECTORS

NF4_BITS = """
    bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
    3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000
"""

EVERY = {
    "nf4": NF4,
    "fp4": FP4,
    "int4": INT4,
    "dynamic": DYNAMIC,
    "dynamic_unsigned": dynamic_map(signed=False),
    "E2M1": small_float(2, 1),
    "E3M0": small_float(3, 0),
}
EVERY |= {f"normal_float({bits})": normal_float(bits) for bits in (2, 3, 5, 6, 7, 8)}
EVERY |= {f"integers({bits})": integers(bits) for bits in (2, 3, 5, 6, 7, 8)}


def bits(x):
    return [f"{b:08x}" for b in x.view(np.uint32)]


def definition(x, codebook):
    """`nearest`, as its docstring defines it."""
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    thresholds = (values[:-1] + values[1:]) / np.float32(2)
    return order[np.searchsorted(thresholds, x)]


def test_nf4_bits():
    assert bits(normal_float(4)) == NF4_BITS.split()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "dynamic", "dynamic_unsigned"])
def test_recorded_codebooks(kind):
    assert bits(EVERY[kind]) == bits(dict(read_tensors(VECTORS))[f"codebook/{kind}"])


def test_nf4_needs_the_seven_decimals(monkeypatch):
    monkeypatch.setattr(codebooks, "round", lambda p, decimals: p, raising=False)
    unrounded = codebooks._normal_float.__wrapped__(4)
    assert np.count_nonzero(unrounded != NF4) == 12


def test_nf4_needs_torch_s_spacing(monkeypatch):
    def numpys(*args):
        return np.linspace(*args, dtype=np.float32)

    monkeypatch.setattr(codebooks, "_linspace", numpys)
    assert np.any(codebooks._normal_float.__wrapped__(4) != NF4)
    assert np.any(dynamic_map.__wrapped__() != DYNAMIC)


@pytest.mark.parametrize("width", range(2, 9))
def test_normal_float_of_any_width(width):
    values = normal_float(width)
    assert values.dtype == np.float32
    assert values.shape == (2**width,)
    assert (np.diff(values) > 0).all()
    assert values[0] == -1
    assert values[-1] == 1
    assert values[2 ** (width - 1) - 1] == 0
    assert (values > 0).sum() == 2 ** (width - 1)


def test_normal_float_values_are_equally_likely_levels():
    """Between the ends the positive values are quantiles at even steps of probability."""
    scale = ndtri(0.9677083)
    steps = np.diff(ndtr(np.float64(NF4[7:]) * scale))
    np.testing.assert_allclose(steps, (0.9677083 - 0.5) / 8, rtol=2e-6)
    steps = np.diff(ndtr(np.float64(NF4[:8]) * scale))
    np.testing.assert_allclose(steps, (0.9677083 - 0.5) / 7, rtol=2e-6)


@pytest.mark.parametrize("family", [normal_float, integers])
@pytest.mark.parametrize("width", [1, 9, 0, -4, "4", 4.5, None])
def test_other_widths_are_refused(family, width):
    with pytest.raises(ValueError, match="bits: expected a whole number from 2 to 8"):
        family(width)


def test_the_outermost_probability_is_bitsandbytes():
    assert outermost_probability(4) == 0.9677083


def test_e2m1_and_e3m0():
    """The values of the OCP's E2M1; powers of two."""
    np.testing.assert_array_equal(small_float(2, 1)[:8], np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / np.float32(6))
    np.testing.assert_array_equal(small_float(3, 0)[:8], [0, *2.0 ** np.arange(-6, 1)])
    for values in (small_float(2, 1), small_float(3, 0), small_float(2, 5)):
        half = len(values) // 2
        np.testing.assert_array_equal(values[half:], -values[:half])
        assert (np.diff(values[:half]) > 0).all()
        assert not np.signbit(values[half])


def test_small_floats_are_those_of_ml_dtypes():
    code = np.arange(16, dtype=np.uint8)
    values = code.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(small_float(2, 1), values / 6)


def test_bitsandbytes_float_is_e2m1_but_for_its_smallest_value():
    ours, theirs = np.sort(small_float(2, 1)), np.sort(FP4)
    np.testing.assert_array_equal(np.flatnonzero(ours != theirs), [6, 9])
    assert ours[9] / theirs[9] == pytest.approx(16)


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (8, 0), (2, 6), (2, -1), (2.0, 1), ("2", 1)])
def test_small_floats_of_other_bits_are_refused(exponent, mantissa):
    with pytest.raises(ValueError, match="_bits: expected a whole number"):
        small_float(exponent, mantissa)


def test_fp4_is_a_float_whose_exponent_runs_backwards():
    twelfths = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    np.testing.assert_array_equal(fp4()[:8], np.float32(twelfths) / np.float32(12))
    np.testing.assert_array_equal(fp4()[8:], -fp4()[:8])
    assert not np.signbit(fp4()[8])


def test_int4_is_even():
    np.testing.assert_allclose(np.diff(INT4), 1 / 7, rtol=1e-6)
    assert INT4[8] == 0
    assert INT4[15] == 1
    assert nearest(np.float32([-1]), INT4) == 1  # -8/7 is never chosen


@pytest.mark.parametrize("width", range(2, 9))
def test_integers_of_any_width(width):
    values = integers(width)
    last = 2 ** (width - 1) - 1
    np.testing.assert_array_equal(values, np.arange(-last - 1, last + 1).astype(np.float32) / np.float32(last))


def test_dynamic_map_shape():
    signed, unsigned = dynamic_map(), dynamic_map(signed=False)
    for values in (signed, unsigned):
        assert values.shape == (256,)
        assert (np.diff(values) > 0).all()
        assert values[-1] == 1
    assert signed[127] == 0
    assert unsigned[0] == 0
    np.testing.assert_array_equal(signed[:127], -signed[128:255][::-1])
    # Decade i of the signed map holds 2^i values a side.
    counts = [np.sum((signed > 10.0 ** (i - 7)) & (signed < 10.0 ** (i - 6))) for i in range(7)]
    assert counts == [2**i for i in range(7)]


@pytest.mark.parametrize("kind", EVERY)
def test_codebooks_are_read_only(kind):
    with pytest.raises(ValueError, match="read-only"):
        EVERY[kind][0] = 0


@pytest.mark.parametrize("kind", EVERY)
def test_nearest_is_its_definition_near_every_threshold(kind):
    codebook = EVERY[kind]
    values = np.sort(codebook)
    marks = np.concatenate([values, (values[:-1] + values[1:]) / np.float32(2)])
    steps = np.arange(-300, 301, dtype=np.int32)
    near = (marks.view(np.int32)[:, None] + steps).view(np.float32).reshape(-1)
    near = near[np.isfinite(near)]
    for x in (near, -near):
        np.testing.assert_array_equal(nearest(x, codebook), definition(x, codebook))


@pytest.mark.parametrize("kind", EVERY)
def test_nearest_is_its_definition_at_the_ends_of_every_table_entry(kind):
    upper = np.arange(65536, dtype=np.uint32)[:, None] << 16
    x = (upper | np.uint32([0, 1, 0x7FFF, 0x8000, 0xFFFF])).view(np.float32).reshape(-1)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(nearest(x, EVERY[kind]), definition(x, EVERY[kind]))


@pytest.mark.parametrize("kind", EVERY)
def test_nearest_is_nearest(kind):
    """The definition itself, against distances in float64."""
    codebook = EVERY[kind]
    x = np.random.default_rng(0).uniform(-1.1, 1.1, 4000).astype(np.float32)
    distance = np.abs(np.float64(x)[:, None] - np.float64(codebook))
    chosen = np.take_along_axis(distance, nearest(x, codebook).astype(int)[:, None], axis=1)[:, 0]
    # A threshold is a rounded midpoint: beside it the other neighbour may be nearer by an ulp or two.
    assert (chosen <= distance.min(axis=1) + 2.0**-23).all()


@pytest.mark.parametrize("kind", EVERY)
def test_an_exact_tie_takes_the_lower_value(kind):
    values = np.sort(EVERY[kind])
    ties = (values[:-1] + values[1:]) / np.float32(2)
    np.testing.assert_array_equal(EVERY[kind][nearest(ties, EVERY[kind])], values[:-1])


def test_nearest_elsewhere_than_on_a_cpu(monkeypatch):
    """The way a GPU takes, with NumPy under another name."""
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    expected = {kind: nearest(x, codebook) for kind, codebook in EVERY.items()}
    monkeypatch.setattr(codebooks, "array_module", lambda x: SimpleNamespace(**vars(np)))
    monkeypatch.setattr(codebooks, "_nearest_table", None)
    for kind, codebook in EVERY.items():
        found = nearest(x, codebook)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected[kind])


def test_nearest_refuses_values_too_close_for_its_table():
    close = np.float32([0, 1, 1 + 2**-12, 1 + 2**-11])
    with pytest.raises(ValueError, match="two thresholds"):
        nearest(np.float32([0.5]), close)
