"""The rule for results of sums: near the reference, and no farther from float64 than it is."""

import numpy as np
import pytest

from refqlora.parity.closeness import FACTOR, FLOOR, NEAR, WORST, closeness

EXACT = np.linspace(-2, 1, 1000)


def off(distance):
    """EXACT, with its largest element off by `distance`, relatively."""
    y = EXACT.copy()
    y[0] -= 2 * distance
    return y


@pytest.mark.parametrize(
    ("found", "reference", "near", "no_farther"),
    [
        (0, 0, True, True),
        (FLOOR / 2, 0, True, True),
        (2 * FLOOR, 0, True, False),
        (4e-6, 3e-6, True, True),
        (6e-6, 3e-6, True, False),
        (0, 4e-6, True, True),  # nearer than the reference
        (0, 2 * NEAR, False, True),  # the reference is off
        (2 * NEAR, 2 * NEAR, True, True),
    ],
)
def test_both_are_asked_for(found, reference, near, no_farther):
    far = closeness(off(found), off(reference), EXACT)
    assert (far.near, far.no_farther) == (near, no_farther)
    np.testing.assert_allclose(far.found, found, atol=1e-15)
    np.testing.assert_allclose(far.reference, reference, atol=1e-15)
    assert far.no_farther == (far.found < FACTOR * far.reference + FLOOR)


def test_of_several_tensors_one_may_be_off_by_chance():
    parts = {str(i): EXACT for i in range(100)}
    one_off = closeness(parts | {"0": off(5 * NEAR)}, parts, parts)
    assert one_off.near
    np.testing.assert_allclose([one_off.worst, one_off.apart], [5 * NEAR, 0.5 * NEAR], rtol=1e-6)
    assert not closeness(parts | {"0": off(2 * WORST)}, parts, parts).near
    with pytest.raises(ValueError, match="0 is missing"):
        closeness({}, {"0": EXACT}, {"0": EXACT})
