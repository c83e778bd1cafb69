"""Adapters: made new, and put onto a model's weights.

An adapter is a config and a dict of arrays under PEFT's names:

    model.layers.0.self_attn.q_proj.lora_A.weight            (r, in)
    model.layers.0.self_attn.q_proj.lora_B.weight            (out, r)
    model.layers.0.self_attn.q_proj.lora_magnitude_vector    (out,)      with DoRA

PiSSA and OLoRA move the largest part of a weight into B A, and the adapter sits on the residual, W - s B A. PEFT
overwrites W with it; then the model with its adapters off is no longer the model, and a second adapter starts from the
first one's residual. Here W stays as it is, and such an adapter carries the residuals of its own linears.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .backend import Array, array_module
from .config import check_shapes
from .lora import LoRA, Weight, dense, row_norms
from .lora_config import LoraConfig
from .quantization import QuantizedTensor, quantize
from .reprs import facts_html

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"  # after a linear's name


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter: its config and its arrays, `params`, under PEFT's names.

    With PiSSA and OLoRA also `residual`, {name: weight} that it sits on in place of the model's weights, and `start`,
    A and B as they were before training.

        >>> model = rq.Model.from_pretrained(rq.BUNDLED)
        >>> model.add_adapter(rank=8, targets=("q_proj", "v_proj"))
        >>> adapter = model.adapters["default"]
        >>> adapter.params[adapter.linears[0] + ".lora_A.weight"].shape
        (8, 192)
    """

    config: LoraConfig
    params: dict[str, Array]
    residual: dict[str, Weight] = field(default_factory=dict)
    start: dict[str, Array] = field(default_factory=dict)

    @property
    def linears(self) -> list[str]:
        """The names of the linears that it sits on."""
        return [name.removesuffix(A) for name in self.params if name.endswith(A)]

    def lora(self, linear: str) -> LoRA | None:
        """What `linear_forward` takes for this linear; None if it has no adapter."""
        if linear + A not in self.params:
            return None
        a, b, magnitude = self.params[linear + A], self.params[linear + B], self.params.get(linear + MAGNITUDE)
        return LoRA(a, b, self.config.scale_of(linear), self.config.dropout, magnitude)

    def unchanged(self) -> list[str]:
        """The linears whose B is all zeros, so that B A changes nothing there, as before any training."""
        return [linear for linear in self.linears if not self.params[linear + B].any()]

    def facts(self) -> dict[str, Any]:
        """Its kind, ranks and alphas, where it sits and how large it is, as it shows itself in a notebook."""
        config, linears = self.config, self.linears
        start = {"pissa": "PiSSA", "olora": "OLoRA"}.get(config.init.partition("_")[0])
        ranks = {config.rank_of(linear) for linear in linears}
        alphas = {config.alpha_of(linear) for linear in linears}
        return {
            "kind": ", ".join(filter(None, ["DoRA" if config.dora else "LoRA", start, "rsLoRA" * config.rslora])),
            "rank": " to ".join(f"{rank:g}" for rank in sorted({min(ranks), max(ranks)})),
            "alpha": " to ".join(f"{alpha:g}" for alpha in sorted({min(alphas), max(alphas)})),
            "linears": len(linears),
            "targets": ", ".join(dict.fromkeys(linear.rpartition(".")[2] for linear in linears)),
            "parameters": sum(p.size for p in self.params.values()),
            "bytes": sum(p.nbytes for p in self.params.values()),
        }

    def __repr__(self) -> str:
        f = self.facts()
        return (
            f"Adapter({f['kind']}, rank {f['rank']}, alpha {f['alpha']}, on {f['linears']} linears ({f['targets']}), "
            f"{f['parameters']:,} trainable parameters, {f['bytes']:,} bytes)"
        )

    def _repr_html_(self) -> str:
        return facts_html("Adapter", self.facts())


def linear_of(params: Mapping[str, Weight], adapter: Adapter | None, linear: str) -> tuple[Weight, LoRA | None]:
    """A linear's weight (out, in) under `adapter`, the residual or else the model's; and its LoRA or None."""
    weight = params[linear + ".weight"]
    if adapter is None:
        return weight, None
    return adapter.residual.get(linear + ".weight", weight), adapter.lora(linear)


def new_adapter(
    config: LoraConfig, weights: Mapping[str, Weight], linears: Iterable[str], dtype: np.dtype, seed: int = 0
) -> Adapter:
    """A new adapter on the linears that the config selects among `linears`.

    Whatever `init` is, the model computes what it did before, up to rounding, or up to quantisation if the residual is
    quantised. DoRA's magnitudes start as the lengths of the rows. Raises ValueError if a part of the config matches no
    linear, or `init` is not possible.
    """
    linears = list(linears)
    chosen = config.matches(linears)
    if idle := config.idle(linears):
        raise ValueError(idle[0])
    return _started(config, chosen, weights, dtype, seed)


def _started(
    config: LoraConfig, linears: list[str], weights: Mapping[str, Weight], dtype: np.dtype, seed: int = 0
) -> Adapter:
    """The adapter on `linears` as it is before training."""
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    start: dict[str, Array] = {}
    residuals: dict[str, Weight] = {}
    for linear in linears:
        weight, rank, scale = weights[linear + ".weight"], config.rank_of(linear), config.scale_of(linear)
        if not dtype.type(scale):
            raise ValueError(f"{linear}: alpha: expected a number above 0, got {config.alpha_of(linear):g}")
        with _naming(linear):
            a, b = init_lora(weight, rank, rng, dtype, config.init, scale)
        params |= {linear + A: a, linear + B: b}
        if config.changes_base:
            start |= {linear + A: a.copy(), linear + B: b.copy()}
            weight = residuals[linear + ".weight"] = residual(weight, a, b, scale)
        if config.dora:
            params[linear + MAGNITUDE] = lengths = row_norms(dense(weight, dtype), LoRA(a, b, scale))
            if not lengths.all():
                row = int((lengths == 0).argmax())
                raise ValueError(f"{linear}: row {row} of its weight is zero, and DoRA divides by its length")
    return Adapter(config, params, residuals, start)


def adapter_shapes(
    config: LoraConfig, linears: Iterable[str], weights: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each array of an adapter on `linears`. weights: the shapes of the model's parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in linears:
        (out_features, in_features), rank = weights[linear + ".weight"], config.rank_of(linear)
        shapes |= {linear + A: (rank, in_features), linear + B: (out_features, rank)}
        if config.dora:
            shapes[linear + MAGNITUDE] = (out_features,)
    return shapes


def adapter_from_file(
    config: LoraConfig,
    params: Mapping[str, Array],
    weights: Mapping[str, Weight],
    linears: Iterable[str],
    dtype: np.dtype,
    where: str,
) -> Adapter:
    """The adapter read from a file, checked against the model's weights and cast to `dtype`.

    The residual of PiSSA and OLoRA is computed again from the weights, as in PEFT. Raises ValueError that begins with
    `where` if an array is missing, unexpected, misshapen or not finite. Only warns, as nothing is lost, if a part of
    the config matches no linear, alpha is 0, or two keys of alpha_pattern with different values match one linear.
    """
    linears = list(linears)
    with _naming(where):
        chosen = config.matches(linears)
    shapes = adapter_shapes(config, chosen, {name: weight.shape for name, weight in weights.items()})
    check_shapes(params, shapes, where)
    with _naming(where):
        made = _started(config, chosen, weights, dtype) if config.changes_base else Adapter(config, {})
    said = config.idle(linears)
    if without := [linear for linear in chosen if not config.alpha_of(linear)]:
        said.append(f"alpha of {without[0]} is 0, so the adapter changes nothing there")
    if rivals := [(linear, keys) for linear in chosen if (keys := config.rivals("alpha_pattern", linear))]:
        said.append(
            f"alpha_pattern: {' and '.join(rivals[0][1])} match {rivals[0][0]}, and the first counts; PEFT sorts them "
            "when it saves, so another may have been first in training"
        )
    for sentence in said:
        warnings.warn(f"{where}: {sentence}", stacklevel=3)
    xp = array_module(next(iter(made.params.values()), np))
    with np.errstate(over="ignore"):  # what is not finite is refused below
        arrays = {name: xp.asarray(params[name].astype(dtype)) for name in shapes}
    for name, x in arrays.items():
        if not xp.isfinite(x).all():
            raise ValueError(f"{where}: {name}: expected finite numbers, got {x[~xp.isfinite(x)][0]}")
    return replace(made, params=arrays)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Let ValueErrors begin with `what`, the name of what is at fault."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def warn_if_untrained(adapter: Adapter, where: str) -> None:
    """Warn if B is all zeros in an adapter that is to be used, not trained."""
    if unchanged := adapter.unchanged():
        warnings.warn(
            f"{where}: {len(unchanged)} of {len(adapter.linears)} lora_B are all zeros ({unchanged[0]}{B}), "
            "so B A changes nothing there, as before any training",
            stacklevel=2,
        )


def init_lora(
    weight: Weight,
    rank: int,
    rng: np.random.Generator,
    dtype: np.dtype,
    init: str = "default",
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) of a new adapter on `weight` (out, in), as PEFT makes them.

    default          A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt(5)), B zero
    gaussian         A normal with std 1/r, B zero (the LoRA paper's)
    pissa            W = U S V^T: B = U sqrt(S/s), A = sqrt(S/s) V^T of the r largest S (Meng et al. 2024, eq. 2-4)
    pissa_niter_N    the same from a randomised SVD with N power iterations (Halko et al. 2011, alg. 4.4)
    olora            W = Q R: B the first r columns of Q, A the first r rows of R (Buyukakyuz 2024)

    Raises ValueError if PiSSA or OLoRA is to start with a larger rank than the weight allows, and for PiSSA on a
    quantised weight: it decomposes the dense one.
    """
    out_features, in_features = weight.shape
    xp = array_module(weight.packed if isinstance(weight, QuantizedTensor) else weight)
    if init in ("default", "gaussian"):
        bound = in_features**-0.5
        shape = (rank, in_features)
        a = rng.uniform(-bound, bound, shape) if init == "default" else rng.standard_normal(shape) / rank
        return xp.asarray(a.astype(dtype)), xp.zeros((out_features, rank), dtype)

    if rank > min(weight.shape):
        raise ValueError(f"rank: expected at most {min(weight.shape)} for {init} on shape {weight.shape}, got {rank}")
    if init == "olora":
        q, r = xp.linalg.qr(dense(weight, dtype))  # (out, k), (k, in)
        return xp.ascontiguousarray(r[:rank]), xp.ascontiguousarray(q[:, :rank])
    if isinstance(weight, QuantizedTensor):
        raise ValueError(
            f"{init} decomposes the dense weight, and this one is quantised already: "
            "load the model dense, add the adapter, then quantize()"
        )
    if init == "pissa":
        u, s, vt = xp.linalg.svd(dense(weight, dtype), full_matrices=False)
    else:
        u, s, vt = _randomised_svd(dense(weight, dtype), rank, int(init.removeprefix("pissa_niter_")), rng)
    root = xp.sqrt(s[:rank] / dtype.type(scale))  # (r,)
    return xp.ascontiguousarray(root[:, None] * vt[:rank]), xp.ascontiguousarray(u[:, :rank] * root)


def residual(weight: Weight, a: Array, b: Array, scale: float) -> Weight:
    """W - s B A in W's dtype; a quantised W is dequantised for it, and the result quantised in the same way (as PEFT
    does for OLoRA)."""
    rest = dense(weight, a.dtype) - (scale * b) @ a  # (out, in)
    return requantize(rest, weight) if isinstance(weight, QuantizedTensor) else rest.astype(weight.dtype)


def requantize(w: Array, like: QuantizedTensor) -> QuantizedTensor:
    """w quantised with the codebook, block size and double quantisation of `like`."""
    return quantize(w, like.codebook, like.block_size, like.nested_absmax is not None)


def _randomised_svd(w: Array, rank: int, iterations: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """U (out, r), S (r,), V^T (r, in): the SVD of w on a random subspace of dimension r, which each power iteration
    brings nearer to that of the r largest singular values."""
    xp = array_module(w)
    if len(w) < w.shape[1]:
        u, s, vt = _randomised_svd(w.T, rank, iterations, rng)
        return vt.T, s, u.T
    q, _ = xp.linalg.qr(w @ xp.asarray(rng.standard_normal((w.shape[1], rank)).astype(w.dtype)))  # (out, r)
    for _ in range(iterations):
        q, _ = xp.linalg.qr(w.T @ q)  # (in, r)
        q, _ = xp.linalg.qr(w @ q)  # (out, r)
    u, s, vt = xp.linalg.svd(q.T @ w, full_matrices=False)  # (r, r), (r,), (r, in)
    return q @ u, s, vt
