"""What rounding does to sums, and which planted mistakes a tolerance notices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..parity.closeness import FACTOR, FLOOR, NEAR, Closeness, closeness
from . import INK, PALE, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS, SUMS = 4096, 2000  # of a dot product in a model of 7 billion parameters, and how many of them
SCALE_ERRORS = np.logspace(-8, -2, 61)


# ---- sums in several orders ----------------------------------------------------------------------------------


def _in_turn(terms: np.ndarray) -> np.ndarray:
    return np.add.accumulate(terms, axis=0)[-1]


def _pairwise(terms: np.ndarray) -> np.ndarray:
    while len(terms) > 1:  # 2^k of them
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def _in_lanes(terms: np.ndarray) -> np.ndarray:
    return _pairwise(_in_turn(terms.reshape(-1, 8, terms.shape[1])))


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # float32 (terms, sums) -> (sums,)
    "sorted first": lambda terms: _in_turn(np.sort(terms, axis=0)),
    "in turn": _in_turn,
    "from the end": lambda terms: _in_turn(terms[::-1]),
    "in 8 lanes": _in_lanes,
    "pairwise": _pairwise,
}


def products(terms: int = TERMS, sums: int = SUMS, seed: int = 0) -> np.ndarray:
    """The terms of dot products of normal vectors, float32 (terms, sums); terms is a power of two, 8 at least."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((terms, sums), np.float32) * rng.standard_normal((terms, sums), np.float32)


def sums_in_orders(terms: np.ndarray) -> dict[str, np.ndarray]:
    """{order: the sums over axis 0 in float32}. Every addition is spelt out, so that all machines get the same bits."""
    return {order: add(terms) for order, add in ORDERS.items()}


def distances(sums: Mapping[str, np.ndarray], exact: np.ndarray) -> dict[str, np.ndarray]:
    """{order: |sum - exact|, relative to the largest |exact|}, float64."""
    return {order: abs(found - exact) / abs(exact).max() for order, found in sums.items()}


def order_distances(sums: int = 500) -> dict[str, np.ndarray]:
    """`distances` of sums of TERMS products, without those from the end, which lie where those in turn do."""
    terms = products(sums=sums)
    found = {order: each for order, each in sums_in_orders(terms).items() if order != "from the end"}
    return distances(found, terms.sum(axis=0, dtype=np.float64))


@styled
def orders_figure(off: Mapping[str, np.ndarray]) -> Figure:
    """How far sums in float32 are from float64, one outline for each order of addition. off: those of `distances`."""
    figure, axes = canvas(7, 4)
    bins = np.logspace(-11, -4, 71)
    for (order, each), color in zip(off.items(), SERIES, strict=False):
        count, _ = np.histogram(np.clip(each, bins[0], bins[-1]), bins)
        axes.stairs(100 * count / each.size, bins, color=color, linewidth=2, label=order)
    axes.axvline(2.0**-24, color=INK, linestyle=":", linewidth=1.2, label="one rounding, 2⁻²⁴")
    axes.set(xscale="log", xlim=(bins[0], bins[-1]), ylim=(0, None))
    axes.set(xlabel="distance from float64, relative to the largest sum", ylabel="% of the sums")
    axes.legend(loc="upper left")
    axes.set_title("The same products, added in another order")
    return figure


# ---- a planted mistake ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """The distances of a kernel whose adapter's scale is wrong by each of `errors`."""

    inner: int
    share: float
    errors: np.ndarray
    far: list[Closeness]

    def noticed_from(self, notices: Callable[[Closeness], bool]) -> float:
        """The least error that is noticed, and from which on every larger one is; inf if there is none."""
        least = np.inf
        for error, far in zip(self.errors[::-1], self.far[::-1], strict=True):
            if not notices(far):
                break
            least = float(error)
        return least


def planted(inner: int, share: float, errors: np.ndarray = SCALE_ERRORS, seed: int = 0) -> Planted:
    """y = x W^T + (1 + error) change, where the adapter's change is `share` of x W^T, and W is (64, inner). The kernel
    adds in another order than the reference."""
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((64, inner), np.float32) for _ in range(2))
    change = rng.standard_normal((64, 64), np.float32) * np.float32(share * inner**0.5)
    reference = x @ w.T + change
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + change
    order = rng.permutation(inner)
    base = x[:, order] @ w[:, order].T
    found = [base + (1 + np.float32(error)) * change if error else base + change for error in errors]
    return Planted(inner, share, errors, [closeness(one, reference, exact) for one in found])


@styled
def planted_figure(facts: Planted) -> Figure:
    """The kernel's distance from float64 against the planted error, and what is noticed: by a fixed tolerance, and by
    the rule of parity/closeness.py."""
    figure, axes = canvas(7, 4)
    found = [far.found for far in facts.far]
    bound = FACTOR * facts.far[0].reference + FLOOR
    rule = facts.noticed_from(lambda far: not (far.near and far.no_farther))
    fixed = facts.noticed_from(lambda far: far.worst >= NEAR)
    axes.axvspan(rule, min(fixed, facts.errors[-1]), color=PALE, linewidth=0, label="noticed by the rule alone")
    axes.plot(facts.errors, found, color=SERIES[1], label="the kernel")
    axes.axhline(facts.far[0].reference, color=SERIES[0], label="the reference")
    axes.axhline(bound, color=SERIES[0], linestyle="--", label="the rule: 1.5 times that + 2⁻²⁰")
    axes.axhline(NEAR, color=SERIES[5], linestyle="--", label="a tolerance of 1e-5")
    axes.set(xscale="log", yscale="log", xlim=(facts.errors[0], facts.errors[-1]), ylim=(5e-8, 1e-2))
    axes.set(xlabel="error planted in the adapter's scale", ylabel="distance from float64")
    axes.set_title(f"The adapter is {100 * facts.share:.3g} % of y, summed over {facts.inner:,} terms")
    axes.legend(loc="upper left")
    return figure
