"""RoPE: the rotation, and the frequencies of each kind of scaling."""

import math

import numpy as np
import pytest
from gradcheck import draw

from refqlora.rope import SCALINGS, check_scaling, rope_backward, rope_forward, rope_frequencies, rope_tables


def test_rope_multiplies_by_unit_complex_numbers():
    x, frequencies, positions = draw(3, 7, 8, 6), np.array([1, 0.3, 0.1]), np.arange(4, 11)
    y = rope_forward(x, *rope_tables(positions, frequencies, np.float64))
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * np.outer(positions, frequencies))[:, None]
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-14)


def test_rope_makes_scores_depend_on_distance_only():
    q, k = draw(1, 1, 1, 6), draw(1, 1, 1, 6, seed=1)

    def score(at_q, at_k):
        frequencies = np.array([1, 0.3, 0.1])
        turned = [
            rope_forward(x, *rope_tables(np.array([at]), frequencies, np.float64)) for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 5) == pytest.approx(score(1004, 1000), rel=1e-11)
    assert score(9, 5) != pytest.approx(score(9, 6), rel=1e-3)


def test_rope_angles_are_float32_products_unless_the_model_is_float64():
    positions, frequencies = np.array([0, 1, 100_003]), 10000.0 ** -(np.arange(0, 8, 2) / 8)
    cos, sin = rope_tables(positions, frequencies, np.float32)
    assert cos.dtype == sin.dtype == np.float32
    angles = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    assert angles.dtype == np.float32
    assert np.array_equal(cos, np.cos(angles))
    assert np.array_equal(sin, np.sin(angles))

    cos, sin = rope_tables(positions, frequencies, np.float64)
    np.testing.assert_allclose(cos, np.cos(np.outer(positions, frequencies)), atol=1e-15)
    assert abs(sin[2] - np.sin(angles[2])).max() > 1e-4  # the rounding shows


def test_a_part_of_each_head_turns_and_the_rest_stays():
    x = draw(3, 7, 8, 10)
    tables = rope_tables(np.arange(7), np.array([1, 0.3, 0.1]), np.float64)
    y = rope_forward(x, *tables)
    assert np.array_equal(y[..., :6], rope_forward(x[..., :6].copy(), *tables))
    assert np.array_equal(y[..., 6:], x[..., 6:])
    assert np.array_equal(rope_backward(x, *tables)[..., 6:], x[..., 6:])


def test_a_factor_makes_the_turned_part_longer():
    x = draw(3, 7, 8, 6)
    plain, longer = (
        rope_forward(x, *rope_tables(np.arange(7), np.array([1, 0.3, 0.1]), np.float64, factor)) for factor in (1, 1.5)
    )
    np.testing.assert_allclose(longer, 1.5 * plain, rtol=1e-12)


# ---- frequencies -------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.5, 20.0, 60.0],
}


def frequencies(kind=None, dim=128, theta=500000.0, length=1, max_positions=1000, dtype=np.float64, **parameters):
    scaling = None if kind is None else {"rope_type": kind, **parameters}
    return rope_frequencies(theta, dim, dtype, scaling, length, max_positions)


def test_frequencies_without_scaling():
    found, factor = frequencies(dim=6, theta=1000.0)
    assert (found.dtype, factor) == (np.float64, 1)
    np.testing.assert_allclose(found, [1, 0.1, 0.01], rtol=1e-14)
    assert frequencies(dtype=np.float32)[0].dtype == np.float32
    assert len(frequencies(dim=5)[0]) == 3  # an odd part of a head is rounded up


def test_linear():
    np.testing.assert_allclose(frequencies("linear", factor=4.0)[0], frequencies()[0] / 4, rtol=1e-14)


def test_dynamic_is_plain_within_the_context_and_a_larger_theta_beyond():
    plain, _ = frequencies()
    for length in (1, 1000):
        assert np.array_equal(frequencies("dynamic", length=length, factor=3.0)[0], plain)
    theta = 500000.0 * (3 * 2000 / 1000 - 2) ** (128 / 126)
    np.testing.assert_allclose(frequencies("dynamic", length=2000, factor=3.0)[0], frequencies(theta=theta)[0])


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    found, factor = frequencies("llama3", **LLAMA3)
    plain, _ = frequencies()
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert factor == 1
    assert short.sum() > 20
    assert long.sum() > 20
    assert np.array_equal(found[short], plain[short])
    assert np.array_equal(found[long], plain[long] / 8)
    between = ~short & ~long
    assert between.sum() > 3
    assert ((plain / 8 < found) & (found < plain))[between].all()
    assert (np.diff(found) < 0).all()


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_rarely():
    found, factor = frequencies("yarn", **YARN)
    plain, _ = frequencies()
    turns = 32768 * plain / (2 * math.pi)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert np.array_equal(found[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(found[turns < 0.9], plain[turns < 0.9] / 4, rtol=1e-14)
    assert (np.diff(found) < 0).all()
    assert frequencies("yarn", **YARN, attention_factor=1.7)[1] == 1.7
    scaled = frequencies("yarn", **YARN, mscale=2.0, mscale_all_dim=0.5)[1]
    assert scaled == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert frequencies("yarn", **YARN | {"factor": 1.0})[1] == 1


def test_longrope_has_factors_for_short_texts_and_others_for_long_ones():
    plain, _ = frequencies(dim=6)
    for length, factors in ((1, [1.0, 1.5, 2.0]), (4096, [1.0, 1.5, 2.0]), (4097, [1.5, 20.0, 60.0])):
        found, factor = frequencies("longrope", dim=6, length=length, **LONGROPE)
        np.testing.assert_allclose(found, plain / factors, rtol=1e-14)
        assert factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert frequencies("longrope", dim=6, **LONGROPE, attention_factor=1.2)[1] == 1.2


RIGHT = {"linear": {"factor": 2}, "dynamic": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN, "longrope": LONGROPE}


@pytest.mark.parametrize("kind", SCALINGS)
def test_what_is_right_passes_and_every_required_parameter_is_missed(kind):
    check_scaling({"rope_type": kind, **RIGHT[kind]}, pairs=3)
    for key in SCALINGS[kind][0]:
        rest = {name: value for name, value in RIGHT[kind].items() if name != key}
        with pytest.raises(ValueError, match=f'{key}: expected a value for RoPE of type "{kind}", got none'):
            check_scaling({"rope_type": kind, **rest}, pairs=3)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "mrope",
            {},
            'rope_type: expected one of "default", "linear", "dynamic", "llama3", .*, got .mrope.',
        ),
        ("linear", {"factor": 0}, r"^factor: expected a number from 1e-09 to 1e\+09, got 0"),
        ("linear", {"factor": "2"}, "^factor: expected a number from .*, got '2'"),
        ("yarn", {"beta_fast": [1]}, r"^beta_fast: expected a number from .*, got \[1\]"),
        ("yarn", {"attention_factor": math.inf}, "^attention_factor: expected a number from .*, got inf"),
        ("llama3", {"low_freq_factor": 4.0}, "^high_freq_factor: expected a number above low_freq_factor"),
        ("longrope", {"long_factor": [1.0, 2.0]}, r"^long_factor: expected a list of 3, each .*, got \[1.0, 2.0\]"),
        ("longrope", {"short_factor": 2.0}, "^short_factor: expected a list of 3, each a number from .*, got 2.0"),
        ("longrope", {"short_factor": [1.0, 2.0, -1.0]}, "^short_factor: expected a list of 3, each"),
    ],
)
def test_what_is_wrong_is_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        check_scaling({"rope_type": kind, **RIGHT.get(kind, {}), **change}, pairs=3)


def test_dynamic_needs_two_pairs():
    with pytest.raises(ValueError, match='two pairs of elements for "dynamic", got 1'):
        check_scaling({"rope_type": "dynamic", "factor": 2.0}, pairs=1)
