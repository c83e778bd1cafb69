"""AdamW with decoupled weight decay, clipping by the global norm, and the learning rate of each step.

AdamW is Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, in the order of
operations of `torch.optim.AdamW`. With the gradient g, the moments m and v, and t = 1, 2, ... the update's
number:

    p <- p (1 - lr decay)
    m <- m + (1 - beta1) (g - m)                          the mean of the gradient
    v <- beta2 v + (1 - beta2) g^2                        the mean of its square
    p <- p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Both means start at zero and are therefore too small at first: the two factors 1 - beta^t make up for it.
Every operation is rounded once, to the dtype of the parameter. Torch on a CPU fuses the last multiplication
and addition of m and of v, and takes square roots that are not always rounded to nearest: its last bits may differ.
minimal.py has AdamW in its plainest form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from .backend import Array, array_module, on_gpu, pieces
from .checks import NAMES, Rule, check, check_array, check_mapping, finite, number, one_of, shown

# Elements per block: the two scratch arrays stay small, and on a CPU all six stay in a cache.
CPU_BLOCK = 1 << 16
GPU_BLOCK = 1 << 22

SCHEDULES = ("constant", "linear", "cosine")
NOT_NEGATIVE = number(0, 1e300)
_MAX_NORM = Rule("a number above 0", number(math.nextafter(0, 1), math.inf).fits)
_BETA = number(0, math.nextafter(1, 0))
_BETAS = Rule(
    "two numbers from 0 to below 1",
    lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_BETA.fits, value)),
)


def adamw_update(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    block: int | None = None,
) -> None:
    """One AdamW update in place of p, m and v: flat arrays of one length and one dtype; g is only read.

    `step` counts from 1. The arrays are walked in blocks of `block` elements, so that memory is crossed
    once, not once per operation. No element depends on another, so the bits are the same for every block size.
    """
    xp = array_module(p)
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    root_correction2 = math.sqrt(1 - beta2**step)
    block = block or _block(xp)
    scratch = xp.empty((2, min(block, p.size)), dtype=p.dtype)

    for start, stop in pieces(p.size, block, xp):
        pb, gb, mb, vb = (x[start:stop] for x in (p, g, m, v))
        a, b = scratch[:, : pb.size]
        if weight_decay:
            pb *= 1 - lr * weight_decay
        xp.subtract(gb, mb, out=a)
        a *= 1 - beta1
        mb += a  # m + (1 - beta1) (g - m)
        xp.multiply(gb, 1 - beta2, out=a)
        a *= gb
        vb *= beta2
        vb += a  # beta2 v + (1 - beta2) g^2
        xp.sqrt(vb, out=a)
        a /= root_correction2
        a += eps  # after the root: inside it, eps would dominate every small gradient
        xp.multiply(mb, -step_size, out=b)
        b /= a
        pb += b


class AdamW:
    """AdamW over named parameters, equal to `torch.optim.AdamW` with the same arguments.

    params        {name: array}, float32 or float64, C-contiguous; `step` changes them in place
    lr            learning rate, which `step` may override
    betas, eps    as in the module's docstring
    weight_decay  decoupled: per update, p shrinks by the factor 1 - lr weight_decay
    decay         which parameters decay: a predicate on the name, or the names; all if None

    `state` is {"step": updates made so far, "m": {name: array}, "v": {name: array}}, the moments shaped and
    typed like their parameters. Raises ValueError for a parameter or a setting that cannot be used.

        >>> params = {"w": np.ones(2, np.float32)}
        >>> rq.AdamW(params, lr=0.1).step({"w": np.array([3, -3], np.float32)})
        >>> params["w"]
        array([0.9, 1.1], dtype=float32)
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay: Callable[[str], bool] | Collection[str] | None = None,
    ) -> None:
        check_mapping("params", params)
        if not params:
            raise ValueError("AdamW: no parameters to optimise")
        for name, p in params.items():
            check_array(f"parameter {name}", p, "f")
            if p.dtype not in (np.float32, np.float64):
                raise ValueError(f"parameter {name}: expected float32 or float64, got {p.dtype}")
            if not p.flags.c_contiguous:
                raise ValueError(f"parameter {name}: shape {p.shape} is not C-contiguous, so not updatable in place")
        check_options(lr, betas, eps, weight_decay)
        if decay is None:
            decay = params.keys()
        elif callable(decay):
            decay = [name for name in params if decay(name)]
        check("decay", decay, NAMES)
        if unknown := set(decay) - params.keys():
            raise ValueError(f"decay: {shown(min(unknown))} is not a parameter")

        self.params = dict(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.decay = frozenset(decay)
        self.state: dict[str, Any] = {
            "step": 0,
            "m": {name: array_module(p).zeros_like(p) for name, p in params.items()},
            "v": {name: array_module(p).zeros_like(p) for name, p in params.items()},
        }

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """One update of every parameter, in place. `grads` is {name: array}, shaped and typed like `params`.

        Raises ValueError, before anything is changed, for a gradient that is missing, has no parameter, or
        has another shape or dtype than its parameter. NaN and infinity pass: `clip_by_global_norm`
        refuses them, and `fault` finds the parameters and moments that they have reached.
        """
        lr = self.lr if lr is None else lr
        check("lr", lr, NOT_NEGATIVE)
        check_mapping("grads", grads)
        for name, p in self.params.items():
            if name not in grads:
                raise ValueError(f"parameter {name}: no gradient")
            check_like(f"gradient of {name}", grads[name], p)
        for name in grads:
            if name not in self.params:
                raise ValueError(f"gradient of {name}: the optimiser has no such parameter")

        self.state["step"] += 1
        with np.errstate(over="ignore", invalid="ignore"):  # `fault` reports it better
            for name, p in self.params.items():
                adamw_update(
                    p.reshape(-1),
                    grads[name].reshape(-1),
                    self.state["m"][name].reshape(-1),
                    self.state["v"][name].reshape(-1),
                    step=self.state["step"],
                    lr=lr,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay if name in self.decay else 0.0,
                )

    def fault(self) -> str | None:
        """The first parameter or moment that is not finite, in words; None if all are.

        A gradient above 1.8e19 overflows v in float32: its parameter would then never move again.
        """
        arrays = {f"parameter {name}": p for name, p in self.params.items()}
        arrays |= {f"AdamW's {name}": x for name, x in self.state_arrays().items()}
        return next((fault for name, x in arrays.items() if (fault := not_finite(name, x))), None)

    @property
    def nbytes(self) -> int:
        """Bytes of the moments: two arrays as large as the parameters."""
        return sum(x.nbytes for moment in ("m", "v") for x in self.state[moment].values())

    def state_arrays(self) -> dict[str, Array]:
        """The state, not copied, as a flat dict: "step" (int64, shape ()), "m.<name>", "v.<name>"."""
        arrays: dict[str, Array] = {"step": np.array(self.state["step"], dtype=np.int64)}
        for moment in ("m", "v"):
            arrays |= {f"{moment}.{name}": x for name, x in self.state[moment].items()}
        return arrays

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Continue from the arrays of a `state_arrays`: they are copied to the device of the parameters.

        Raises ValueError, before anything is changed, for an entry that is missing, unknown, not finite, or of another
        shape or dtype than expected, and for a step below 0.
        """
        expected = self.state_arrays()
        for name, mine in expected.items():
            if name not in arrays:
                raise ValueError(f"optimiser state {name}: missing")
            check_like(f"optimiser state {name}", arrays[name], mine)
            finite(f"optimiser state {name}", arrays[name])
        for name in arrays:
            if name not in expected:
                raise ValueError(f"optimiser state {name}: the optimiser has no such entry")
        step = int(arrays["step"])
        if step < 0:
            raise ValueError(f"optimiser state step: expected 0 or more, got {step}")

        self.state["step"] = step
        for name, mine in expected.items():
            if name != "step":
                mine[...] = array_module(mine).asarray(arrays[name])


def clip_by_global_norm(grads: Mapping[str, Array], max_norm: float) -> float:
    """Scale all gradients, in place, by min(1, max_norm / (norm + 1e-6)); return their norm before that.

    The rule is that of `torch.nn.utils.clip_grad_norm_`: the norm is that of all gradients as one vector,
    here summed in float64. If max_norm is infinite, nothing is scaled. Raises FloatingPointError, before
    anything is changed, if the norm is not finite, naming the first gradient that makes it so; ValueError
    if max_norm is not above 0.

        >>> rq.clip_by_global_norm({"a": np.array([3.0]), "b": np.array([4.0])}, max_norm=1.0)
        5.0
    """
    check("max_norm", max_norm, _MAX_NORM)
    check_mapping("grads", grads)
    total = 0.0
    for name, g in grads.items():
        check_array(f"gradient of {name}", g, "f")
        total += _sum_of_squares(g)
        if not math.isfinite(total):
            fault = not_finite(f"gradient of {name}", g) or f"gradient of {name}: its square overflows"
            raise FloatingPointError(fault)
    norm = math.sqrt(total)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for g in grads.values():
            g *= scale
    return norm


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int,
    floor: float = 0.0,
) -> float:
    """The learning rate of update `step`, counted from 0.

    It rises in a straight line from 0 at step 0 to `peak` at step `warmup_steps`. Then "constant" stays,
    while "linear" falls in a straight line and "cosine" along half a wave to `floor` (a rate, not a
    fraction), reached at step `total_steps` and kept. With floor 0 these are transformers'
    `get_constant_schedule_with_warmup` and its linear and cosine counterparts, up to total_steps (past it,
    their cosine rises again). Raises ValueError for settings that do not fit together.
    """
    check("schedule", schedule, one_of(SCHEDULES))
    check("peak", peak, NOT_NEGATIVE)
    check("floor", floor, number(0, peak))
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps: expected 0 to total_steps ({total_steps}), got {warmup_steps}")
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}")

    if step < warmup_steps:
        return peak * (step / warmup_steps)
    if schedule == "constant":
        return peak
    span = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        left = max(0, total_steps - step) / span
    else:
        left = 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup_steps) / span)))
    return floor + (peak - floor) * left


def _block(xp: ModuleType) -> int:
    return GPU_BLOCK if on_gpu(xp) else CPU_BLOCK


def _sum_of_squares(g: Array) -> float:
    """Sum of g^2 in float64, a block at a time so that no float64 copy of g is made."""
    xp = array_module(g)
    flat = g.reshape(-1)
    parts = (flat[start:stop].astype(np.float64) for start, stop in pieces(flat.size, _block(xp), xp))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller tests the sum, once
        return float(sum(xp.dot(part, part) for part in parts))


def not_finite(what: str, x: Array) -> str | None:
    """A message such as "WHAT: 1 of 160 values are NaN or infinite"; None if all are finite."""
    bad = x.size - int(array_module(x).isfinite(x).sum())
    return f"{what}: {bad} of {x.size} values are NaN or infinite" if bad else None


def check_options(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError, naming the option, for a setting that AdamW cannot use."""
    check("betas", betas, _BETAS)
    for option, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check(option, value, NOT_NEGATIVE)


def check_like(what: str, found: Array, expected: Array) -> None:
    """Raise ValueError, beginning with `what`, unless `found` has the shape and dtype of `expected`."""
    check_array(what, found, "fiu")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"{what}: expected {expected.dtype} {expected.shape}, got {found.dtype} {found.shape}")
