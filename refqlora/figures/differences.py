"""The error of a numeric gradient against its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import INK, SERIES, canvas, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def differences_figure(errors: Mapping[str, Mapping[float, float]], order: int, formula: str) -> Figure:
    """Error against step on logarithmic axes: a falling branch of rounding and a rising one of truncation.

    errors: {precision: {step: error}}; the steps are the same for each. order: the power of h in what the formula
    leaves out, drawn as a dotted line beside the first precision's errors at large steps, with 1/h at small ones.
    """
    figure, axes = canvas(7, 4.2)
    for color, (precision, curve) in zip(SERIES, errors.items(), strict=False):
        steps, values = _curve(curve)
        h, error = float(steps[values.argmin()]), float(values.min())
        label = f"{precision}: best at h = {h:.0e}, error {error:.0e}"
        axes.loglog(steps, values, ".-", color=color, markersize=6, label=label)
        axes.plot([h], [error], "o", color=color, markersize=10, fillstyle="none", markeredgewidth=2)
    steps, values = _curve(next(iter(errors.values())))
    best = int(values.argmin())
    power = "h" if order == 1 else f"h^{order}"
    slopes = f"rounding ∝ 1/h, truncation ∝ ${power}$"
    for part, end, slope in ((slice(0, best + 1), 0, -1), (slice(best, None), -1, order)):
        line = values[end] * (steps[part] / steps[end]) ** slope / 4
        axes.plot(steps[part], line, ":", color=INK, label=slopes if slope > 0 else None)
    axes.set(xlabel="step h", ylabel="relative error", title=f"How wrong a numeric gradient is: {formula}")
    axes.set_ylim(1e-17, 10)
    axes.grid()
    axes.legend(loc="lower left")
    return figure


def _curve(errors: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and errors, in the order of the steps."""
    steps = np.array(sorted(errors))
    return steps, np.array([errors[h] for h in steps.tolist()])
