"""Adapters combined: as plain LoRA, and several into one whose change is their weighted sum."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .adapters import A, Adapter, B
from .backend import Array, array_module
from .lora_config import LoraConfig
from .quantization import QuantizedTensor


def as_lora(adapter: Adapter) -> Adapter:
    """The same function as plain LoRA (or DoRA) on the model's own weights, at twice the rank.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], with A0 and B0 from the start of PiSSA or OLoRA: what PEFT's
    `path_initial_model_for_weight_conversion` writes. On a quantised model it is not quite the same, and a warning says
    so: there the adapter learnt on Q(W - s B0 A0), and will sit on Q(W). An adapter that has no residual is returned as
    it is.
    """
    config, params, start = adapter.config, adapter.params, adapter.start
    if not start:
        return adapter
    if any(isinstance(weight, QuantizedTensor) for weight in adapter.residual.values()):
        warnings.warn(
            f"as plain LoRA this {config.init} adapter is not quite what was trained: it learnt on a residual that is "
            "quantised, which differs from the quantised weight less its start",
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
    """A LoRA whose change is the sum of `factors[name]` times each adapter's s B A; scales and ranks may differ.

    cat      exact: A = [f1 s1 A1; f2 s2 A2; ...], B = [B1, B2, ...]; the ranks add up
    svd      the best approximation of rank `rank` (default: the largest of theirs), by each linear's SVD; exact where
             `rank` is the sum of the ranks or more
    linear   A = sum of sqrt(f s) A_i, B = sum of sqrt(f s) B_i, of equal ranks: B A then has cross terms
             sqrt(f1 s1 f2 s2) (B1 A2 + B2 A1), which are as large as the sum itself unless the adapters are alike

    The same as PEFT's add_weighted_adapter, which for rsLoRA adapters scales the result by sqrt(r) too much. alpha is
    the rank, so that the scale is 1; where fewer rows are needed the rest are zeros; the first adapter's dropout is
    taken. PiSSA and OLoRA count as the LoRA that they are equal to (`as_lora`).

    Raises ValueError for an unknown method, a DoRA (no sum of changes is a DoRA), ranks that are not equal where they
    must be, and an adapter that sits on a quantised residual.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if rank is not None and method != "svd":
        raise ValueError(f'rank goes with method "svd"; "{method}" has its own')
    if not factors or not np.isfinite(list(factors.values())).all():
        raise ValueError(f"adapters are added with a finite factor each, not {dict(factors)}")
    for name in factors:
        if adapters[name].config.dora:
            raise ValueError(
                f"adapter {name!r} is a DoRA: it rescales the weight's rows, and such changes do not add up"
            )
        if any(isinstance(w, QuantizedTensor) for w in adapters[name].residual.values()):
            raise ValueError(f"adapter {name!r} sits on a quantised residual of its own: add it on a dense model")
    parts = [(as_lora(adapters[name]), factor) for name, factor in factors.items()]
    ranks = [max([part.config.rank_of(linear) for linear in part.linears]) for part, _ in parts]
    if method == "linear" and len({part.config.rank_of(one) for part, _ in parts for one in part.linears}) > 1:
        raise ValueError('method "linear" adds A to A and B to B: the ranks must be equal')
    rank = {"cat": sum(ranks), "svd": max(ranks) if rank is None else rank, "linear": ranks[0]}[method]
    linears = list(dict.fromkeys(linear for part, _ in parts for linear in part.linears))
    config = LoraConfig(rank, rank, parts[0][0].config.dropout, tuple(linears))
    params = {}
    for linear in linears:
        loras = [(part.lora(linear), factor) for part, factor in parts if linear + A in part.params]
        xp = array_module(loras[0][0].A)
        if method == "linear":
            roots = [abs(factor * lora.scale) ** 0.5 for lora, factor in loras]
            signs = [-1 if factor < 0 else 1 for _, factor in loras]  # on one side only
            a = sum(root * sign * lora.A for root, sign, (lora, _) in zip(roots, signs, loras, strict=True))
            b = sum(root * lora.B for root, (lora, _) in zip(roots, loras, strict=True))
        else:
            a = xp.concatenate([factor * lora.scale * lora.A for lora, factor in loras])  # (sum of r, in)
            b = xp.concatenate([lora.B for lora, _ in loras], axis=1)  # (out, sum of r)
        if method == "svd":
            a, b = _truncated(a, b, rank)
        spare = rank - len(a)
        params[linear + A] = xp.pad(a, ((0, spare), (0, 0)))
        params[linear + B] = xp.pad(b, ((0, 0), (0, spare)))
    return Adapter(config, params)


def _truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The factors A (at most `rank`, in) and B = U S of the truncated SVD of b @ a, which is never formed."""
    xp = array_module(a)
    qb, rb = xp.linalg.qr(b)  # (out, k), (k, R)
    qa, ra = xp.linalg.qr(a.T)  # (in, l), (l, R)
    u, s, vt = xp.linalg.svd(rb @ ra.T, full_matrices=False)
    return vt[:rank] @ qa.T, qb @ u[:, :rank] * s[:rank]
