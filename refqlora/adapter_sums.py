"""Adapters rewritten as plain LoRA, and several combined into one whose change is their weighted sum."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real

from .adapters import A, Adapter, B
from .backend import Array, array_module
from .checks import shown
from .lora import LoRA
from .lora_config import LoraConfig
from .quantization import QuantizedTensor


def as_lora(adapter: Adapter) -> Adapter:
    """A PiSSA or OLoRA adapter as plain LoRA (or DoRA) on the model's own weights, at twice the rank.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], where A0 and B0 are A and B before training. PEFT writes the same with
    `path_initial_model_for_weight_conversion`. On a quantised model the result differs a little, and a warning says so:
    the adapter was trained on Q(W - s B0 A0), and now sits on Q(W). An adapter without a residual is returned as it is.
    """
    config, params, start = adapter.config, adapter.params, adapter.start
    if not start:
        return adapter
    if any(isinstance(weight, QuantizedTensor) for weight in adapter.residual.values()):
        warnings.warn(
            f"as plain LoRA this {config.init} adapter is not quite what was trained: it learnt on a quantised "
            "residual, which differs from the quantised weight minus the adapter's start",
            stacklevel=3,
        )
    xp = array_module(next(iter(params.values())))
    joined = {}
    for name, x in params.items():
        if name.endswith(A):
            x = xp.concatenate([x, start[name]])  # (2r, in)
        elif name.endswith(B):
            x = xp.concatenate([x, -start[name]], axis=1)  # (out, 2r)
        joined[name] = x
    factor = 2**0.5 if config.rslora else 2  # alpha/sqrt(2r) or alpha/2r must stay s
    doubled = replace(
        config,
        init="default",
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return Adapter(doubled, joined)


METHODS = ("cat", "svd", "linear")


def combine_adapters(
    adapters: Mapping[str, Adapter], factors: Mapping[str, float], method: str = "cat", rank: int | None = None
) -> Adapter:
    """A LoRA whose change is the sum of each adapter's s B A times its factor; scales and ranks may differ.

    cat      exact: A = [f1 s1 A1; f2 s2 A2; ...], B = [B1, B2, ...]; the ranks add up
    svd      the best approximation of rank `rank` (default: the largest of theirs), by each linear's SVD; exact if
             `rank` is at least the sum of the ranks
    linear   A = sum of sqrt(f s) A_i, B = sum of sqrt(f s) B_i, for equal ranks: B A then has cross terms
             sqrt(f1 s1 f2 s2) (B1 A2 + B2 A1), which are as large as the sum itself unless the adapters are alike

    As PEFT's add_weighted_adapter, except for rsLoRA adapters, where PEFT scales the result by sqrt(r) too much. The
    result's alpha is its rank, so that its scale is 1; a linear that needs less rank is padded with zeros; dropout is
    the first adapter's. PiSSA and OLoRA adapters enter as plain LoRA (`as_lora`).

    Raises ValueError for an unknown method, a factor that is not finite, a DoRA (no sum of changes is a DoRA), unequal
    ranks with "linear", and an adapter that sits on a quantised residual.
    """
    _check(adapters, factors, method, rank)
    parts = [(as_lora(adapters[name]), factor) for name, factor in factors.items()]
    ranks = [max(part.config.rank_of(linear) for linear in part.linears) for part, _ in parts]
    if method == "linear" and len({part.config.rank_of(one) for part, _ in parts for one in part.linears}) > 1:
        raise ValueError('method: expected equal ranks for "linear", which adds A to A and B to B')
    rank = {"cat": sum(ranks), "svd": max(ranks) if rank is None else rank, "linear": ranks[0]}[method]
    linears = list(dict.fromkeys(linear for part, _ in parts for linear in part.linears))
    config = LoraConfig(rank, rank, parts[0][0].config.dropout, tuple(linears))
    params: dict[str, Array] = {}
    for linear in linears:
        loras = [(lora, factor) for part, factor in parts if (lora := part.lora(linear)) is not None]
        a, b = _added(loras) if method == "linear" else _joined(loras)
        if method == "svd":
            a, b = _truncated(a, b, rank)
        xp, spare = array_module(a), rank - a.shape[0]
        params[linear + A] = xp.pad(a, ((0, spare), (0, 0)))
        params[linear + B] = xp.pad(b, ((0, 0), (0, spare)))
    return Adapter(config, params)


def _joined(loras: list[tuple[LoRA, float]]) -> tuple[Array, Array]:
    """A (R, in) and B (out, R), R the sum of the ranks, with B A the sum of f s B_i A_i."""
    xp = array_module(loras[0][0].A)
    a = xp.concatenate([factor * lora.scale * lora.A for lora, factor in loras])
    return a, xp.concatenate([lora.B for lora, _ in loras], axis=1)


def _added(loras: list[tuple[LoRA, float]]) -> tuple[Array, Array]:
    """A (r, in) and B (out, r): the sums of sqrt(f s) A_i and of sqrt(f s) B_i, where a negative f changes A's sign."""
    a, b = 0, 0
    for lora, factor in loras:
        root = abs(factor * lora.scale) ** 0.5
        a, b = a + (-root if factor < 0 else root) * lora.A, b + root * lora.B
    return a, b


def _truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The factors A (at most `rank`, in) and B = U S of the truncated SVD of b @ a, which is never formed."""
    xp = array_module(a)
    qb, rb = xp.linalg.qr(b)  # (out, k), (k, R)
    qa, ra = xp.linalg.qr(a.T)  # (in, l), (l, R)
    u, s, vt = xp.linalg.svd(rb @ ra.T, full_matrices=False)
    return vt[:rank] @ qa.T, qb @ u[:, :rank] * s[:rank]


def _check(adapters: Mapping[str, Adapter], factors: Mapping[str, float], method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {shown(method)}")
    if rank is not None and method != "svd":
        raise ValueError(f'rank: expected only with method "svd", got {shown(rank)} with "{method}"')
    numbers = all(isinstance(factor, Real) and abs(factor) < float("inf") for factor in factors.values())
    if not factors or not numbers:
        raise ValueError(f"factors: expected a finite number for each adapter, got {shown(dict(factors))}")
    for name in factors:
        if adapters[name].config.dora:
            raise ValueError(f"adapter {name!r} is a DoRA: it rescales rows, so its change cannot be added to others")
        if any(isinstance(w, QuantizedTensor) for w in adapters[name].residual.values()):
            raise ValueError(f"adapter {name!r} sits on a quantised residual of its own: combine it on a dense model")
