"""The distribution is what its definition says, token by token, and draws follow it."""

import math
from itertools import pairwise, product

import numpy as np
import pytest

from refqlora.text.sampling import Sampling

V = 20
LOGITS = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
TIED = np.round(LOGITS)  # a dozen values for twenty tokens


def by_definition(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """The distribution by plain loops over Python's numbers."""
    scores = [float(x) for x in logits]
    for i in set(seen):
        scores[i] = scores[i] / repetition_penalty if scores[i] > 0 else scores[i] * repetition_penalty
    weights = {i: math.exp(score / temperature) for i, score in enumerate(scores)}
    if top_k:
        least = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        weights = {i: w for i, w in weights.items() if scores[i] >= least}
    total, mass, kept = sum(weights.values()), 0.0, {}
    for i in sorted(weights, key=lambda i: (scores[i], i), reverse=True):  # the more probable, of tied ones the later
        if top_p < 1 and mass / total >= top_p:
            break
        kept[i] = weights[i]
        mass += weights[i]
    kept = {i: w for i, w in kept.items() if w >= min_p * max(kept.values())}
    return np.array([kept.get(i, 0) / sum(kept.values()) for i in range(len(logits))])


@pytest.mark.parametrize("logits", [LOGITS, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_definition(logits, temperature):
    before = logits.copy()
    grid = product([0, 1, 5, V, 1000], [1.0, 0.999, 0.713, 0.01], [0.0, 0.1, 1.0], [1.0, 1.3, 0.7])
    for top_k, top_p, min_p, penalty in grid:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        options["repetition_penalty"] = penalty
        for seen in ((), (0, 3, 3, 5, 19)):
            found = Sampling(**options).probabilities(logits, seen)
            np.testing.assert_allclose(found, by_definition(logits, seen, **options), rtol=1e-12, atol=0)
            assert found.dtype == np.float64
    np.testing.assert_array_equal(logits, before)  # the model's own are left alone


def test_the_order_of_things_matters():
    """Each option acts on the result of those before it."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    kept = {
        "all": Sampling(temperature=1.0, top_p=0.85),
        "top_k first": Sampling(temperature=1.0, top_p=0.85, top_k=3),  # of 0.95, 0.80 are less than 0.85
        "temperature first": Sampling(temperature=0.5, top_p=0.85),
    }
    assert {name: int((how.probabilities(logits) > 0).sum()) for name, how in kept.items()} == {
        "all": 3,
        "top_k first": 3,
        "temperature first": 2,
    }
    penalised = Sampling(temperature=1.0, top_k=1, repetition_penalty=3.0)  # of logarithms, which are negative
    assert penalised.probabilities(logits, [0]).argmax() == 1


def test_the_fewest_that_reach_top_p():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    for top_p, expected in [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 2}), (1.0, {0, 1, 2, 3})]:
        p = Sampling(temperature=1.0, top_p=top_p).probabilities(logits)
        assert set(np.flatnonzero(p)) == expected


def test_one_token_always_stays():
    for top_p in (1e-9, 1e-300):  # 1 less the second is 1
        p = Sampling(temperature=1.0, top_p=top_p, min_p=1.0).probabilities(LOGITS)
        assert p[LOGITS.argmax()] == 1


def chi_square(counts, p):
    """In standard deviations from its mean; infinite if something impossible was drawn."""
    if counts[p == 0].any():
        return math.inf
    expected, counts = counts.sum() * p[p > 0], counts[p > 0]
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


SAMPLINGS = [
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.6, "repetition_penalty": 1.7},
    {"temperature": 1.0, "min_p": 0.2},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_draws_follow_the_distribution(options):
    """10,000 draws at a fixed seed; and the same draws do not follow the distributions of other options."""
    rng, seen = np.random.default_rng(0), (2, 3, 4)
    draws = [Sampling(**options).draw(LOGITS, rng, seen) for _ in range(10_000)]
    assert all(type(token) is int for token in draws[:9])
    counts = np.bincount(draws, minlength=V)
    far = {str(o): chi_square(counts, Sampling(**o).probabilities(LOGITS, seen)) for o in SAMPLINGS}
    assert abs(far.pop(str(options))) < 4
    assert min(far.values()) > 50


def test_one_draw_does_not_foretell_the_next():
    rng, how = np.random.default_rng(0), Sampling(temperature=1.0)
    p = how.probabilities(LOGITS[:4])
    draws = [how.draw(LOGITS[:4], rng) for _ in range(10_000)]
    pairs = np.bincount([4 * a + b for a, b in pairwise(draws)], minlength=16)
    assert abs(chi_square(pairs, np.outer(p, p).ravel())) < 4


def test_greedy_takes_the_first_of_the_greatest_and_nothing_from_the_seed():
    rng = np.random.default_rng(0)
    assert Sampling().draw(np.array([1.0, 3.0, 3.0, 2.0]), rng) == 1
    assert Sampling(top_k=1, top_p=0.1, min_p=1.0).draw(LOGITS, rng) == LOGITS.argmax()
    assert Sampling(repetition_penalty=1.5).draw(np.array([1.0, 3.0, 2.1]), rng, [1]) == 2
    assert Sampling(repetition_penalty=1.5).draw(np.array([-2.0, -1.0, -1.4]), rng, [1]) == 2
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1.0, 1e308])
def test_huge_logits_overflow_nothing(temperature):
    logits = np.array([-3e38, 3e38, 0.0], np.float32)
    p = Sampling(temperature=temperature).probabilities(logits)
    assert p.sum() == pytest.approx(1)
    assert p.argmax() == 1 or temperature == 1e308
    p = Sampling(temperature=temperature).probabilities(np.array([-np.inf, 1.0, -np.inf]))
    np.testing.assert_array_equal(p, [0, 1, 0])


@pytest.mark.parametrize("logits", [[1.0, np.nan], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_refused(logits):
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="the model's logits are not finite: the greatest is"):
            Sampling(temperature=temperature).probabilities(np.array(logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number of 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature: expected a number of 0 or more, got inf"),
        ({"temperature": None}, "temperature: expected a number of 0 or more, got None"),
        ({"temperature": 10**5000}, "temperature: expected a number of 0 or more, got int too large to show"),
        ({"top_k": -1}, "top_k: expected a whole number of 0 or more, got -1"),
        ({"top_k": 1.5}, "top_k: expected a whole number of 0 or more, got 1.5"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p: expected a number above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1, got -0.1"),
        ({"min_p": 1.1}, "min_p: expected a number from 0 to 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0, got 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: expected a number above 0, got inf"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
