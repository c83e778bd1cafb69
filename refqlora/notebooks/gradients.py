"""A gradient from the forward alone, one number moved at a time: slow, obvious, and what a backward is held against.

The engine does not use it. tests/gradcheck.py examines every gradient of the engine in the same way, more strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array

STEP = 1e-5  # for float64: near the cube root of its precision, where truncation and rounding are about equal

# df/dx is about the sum of weight * f(x + k h) over {k: weight}, divided by h.
FORMULAS: dict[str, dict[int, float]] = {
    "one-sided": {1: 1, 0: -1},  # what is left out is of order h
    "central": {1: 1 / 2, -1: -1 / 2},  # of order h^2
    "four points": {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12},  # of order h^4
}


def numeric_gradient(f: Callable[[Array], Any], x: Array, h: float = STEP, formula: str = "central") -> Array:
    """df/dx, element by element: (f(x + h) - f(x - h)) / 2h, or another of FORMULAS. -> float64, of the shape of x.

    f takes x, of any shape, and returns a number. One element of x at a time is moved, in place, and put back: so f may
    also reach x through a model that holds it. The precision is that in which f computes.

        >>> numeric_gradient(lambda x: (x**3).sum(), np.array([1.0, 2.0])).round(6)
        array([ 3., 12.])
    """
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        value, total = x[i], 0.0
        for steps, weight in FORMULAS[formula].items():
            x[i] = value + steps * h
            total += weight * float(f(x))
        x[i] = value
        gradient[i] = total / h
    return gradient


def gradient_error(expected: Array, gradient: Array) -> float:
    """The largest difference over all elements, each relative to its own size or, where that is smaller, to the root
    mean square of `expected`: an element near zero is not asked for more digits than there are.

    Raises ValueError if the shapes differ, and if `expected` is zero everywhere, as then nothing is checked.
    """
    if gradient.shape != expected.shape:
        raise ValueError(f"gradient: expected shape {expected.shape}, got {gradient.shape}")
    if not expected.any():
        raise ValueError("gradient: it is zero everywhere here, so nothing is checked: give other inputs")
    size = np.maximum(np.maximum(abs(expected), abs(gradient)), np.sqrt(np.mean(expected**2)))
    return float((abs(expected - gradient) / size).max())


def check_gradients(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[[Any, Any], Any], **inputs: Array
) -> dict[str, float]:
    """{input: error} of the gradients that a pair of functions gives, as `gradient_error` measures it.

    forward(*inputs) -> (y, cache); backward(dy, cache) -> the gradients of the inputs, in their order: a tuple, or an
    array for a single input. The loss is the sum of dy * y with a random dy, whose gradient with respect to y is dy. In
    float64 a right gradient is within 1e-7 or so, a wrong one off by far more; inputs should be of order one and all
    their dimensions distinct, or mistakes may not show.

        >>> x = np.random.default_rng(0).standard_normal((2, 3))
        >>> check_gradients(lambda x: (x * x, x), lambda dy, x: 2 * x * dy, x=x)["x"] < 1e-7
        True
    """
    y, cache = forward(*inputs.values())
    dy = np.random.default_rng(1).standard_normal(np.shape(y))
    gradients = backward(dy, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)

    def loss(_: Array) -> float:
        return (forward(*inputs.values())[0] * dy).sum()

    pairs = zip(inputs.items(), gradients, strict=True)
    return {name: gradient_error(numeric_gradient(loss, x), gradient) for (name, x), gradient in pairs}
