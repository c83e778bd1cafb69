"""How close two results of the same sums must be: near each other, and one no farther from float64 than the other.

Float32 rounds every sum, and each order of summation rounds differently. How far two results are apart therefore
depends on the CPU: on its BLAS, the width of its vectors, its fused multiply-add. How far each is from the result in
float64 says whose rounding it is. A bound that holds on every machine asks for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .differences import relative_differences

NEAR, WORST = 1e-5, 1e-4  # apart at most: all tensors together, and a single one, off by chance where terms cancel
FACTOR = 1.5
FLOOR = 2.0**-20  # eight roundings of float32: below it, chance says who is nearer


class Closeness(NamedTuple):
    """Distances, relative to a tensor's largest element: between the two (of the worst tensor, and the root mean square
    over the tensors), and of each from float64 (the root mean square)."""

    worst: float
    apart: float
    found: float
    reference: float

    @property
    def near(self) -> bool:
        return self.worst < WORST and self.apart < NEAR

    @property
    def no_farther(self) -> bool:
        """Whether the result found is no farther from float64 than the reference, give or take a few roundings."""
        return self.found < FACTOR * self.reference + FLOOR


def closeness(found: Any, reference: Any, exact: Any) -> Closeness:
    """Compare a result with a reference; `exact` is the result in float64. Each is an array, or a dict of arrays by
    name. Raises ValueError if names or shapes differ.

        >>> x = np.float32([0.1, 0.2, 0.3])
        >>> closeness(x * np.float32(1.001), x, x.astype(float)).near
        False
    """
    found, reference, exact = (x if isinstance(x, Mapping) else {"": x} for x in (found, reference, exact))
    between = relative_differences(found, reference)
    ours, theirs = (root_mean_square(relative_differences(x, exact)) for x in (found, reference))
    return Closeness(max(between.values()), root_mean_square(between), ours, theirs)


def root_mean_square(differences: Mapping[str, float]) -> float:
    return float((sum(x * x for x in differences.values()) / len(differences)) ** 0.5)
