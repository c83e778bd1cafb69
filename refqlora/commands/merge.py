"""Adapters merged into their base: a model that needs no adapter, and how far it is from the one that was trained.

An adapter trained by QLoRA has learnt on the quantised base: what was trained is Q(W) + s B A. It can be merged

    into the original weights    W + s B A          the base's quantisation error, which it learnt with, is gone
    into the dequantised base    Q(W) + s B A       what was trained, up to the rounding of the file's dtype
    back into 4 bits             Q(Q(W) + s B A)    what is smaller than a step of the codes is lost

and each is some way off. The error is given as a multiple of the adapter's own change, ||s B A||: at 1 the merged
weights are as far from the trained ones as the base without the adapter is.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from ..adapters import warn_if_untrained
from ..backend import Array
from ..files import pretrained
from ..files.hub import model_directory
from ..files.model_files import outline
from ..files.reading import read_json
from ..files.writing import new_directory
from ..lora import LoRA, Weight, dense, merge
from ..model import Model
from ..quantization import QuantizedTensor, dequantize, quantize
from .options import console, model, report, show

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INTO = {"original": "the original weights", "dequantised": "the dequantised base", "nf4": "4 bits again"}
ERASED = 0.5  # from this error on, requantising is said to erase the adapter


def merge_model(
    base: str | Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    into: str | None = None,
    trained_on_nf4: bool = True,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Merge adapters into `base`, a model's directory or hub's id, and write the result to the new directory `out`,
    with the tokenizer and the other files that go along with a model; -> the errors by kind of linear, and in all.

    trained_on_nf4: whether the adapters learnt on the base in NF4 (QLoRA) or on the weights as they are (LoRA).
    into: one of INTO; by default "dequantised" after QLoRA, otherwise "original". With "dequantised" and "nf4" every
    linear is quantised, those without an adapter too. dtype: of what is not in 4 bits, a key of DTYPES; by default the
    base's. The changes of several adapters add up, each counted from the base.

    Raises ValueError or FileNotFoundError for what is wrong with files or options; `out` is then as it was.
    """
    into = into or ("dequantised" if trained_on_nf4 else "original")
    if into not in INTO:
        raise ValueError(f"into: expected one of {', '.join(INTO)}, got {into!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    base = model_directory(base)
    with new_directory(out) as new:
        named = {str(path) + f" ({i + 1})" * (path in adapters[:i]): path for i, path in enumerate(adapters)}
        model = Model.from_pretrained(base, adapters=named)
        for name, adapter in model.adapters.items():
            warn_if_untrained(adapter, name)
        linears = model.config.linears()
        if into == "original" and isinstance(model.params[linears[0] + ".weight"], QuantizedTensor):
            raise ValueError(f"{base}: expected original weights to merge into, got a quantised model")
        stored, errors = np.dtype(DTYPES[dtype or _file_dtype(base)]), Errors()
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
            for linear in linears:
                merged = merged_weights(model, linear, trained_on_nf4)
                errors.add(linear, merged, stored)
                model.params[linear + ".weight"] = merged.into(into)
            _check_range(model.params, stored)
        if not errors.sums["all"]["change"]:
            raise ValueError("nothing to merge: the adapters change no weight")
        pretrained.save(new, model.config, model.params, stored, base=base)
    facts = errors.facts() | {"into": into, "dtype": stored.name, "trained_on_nf4": trained_on_nf4}
    use = f"refqlora generate --model {shlex.quote(str(out))}{'' if into == 'nf4' else ' --no-quantize'} --prompt TEXT"
    return facts | {"erased": facts["all"]["requantised"] >= ERASED, "use": use}


class Merged(NamedTuple):
    """One linear's weight (out, in) under all of a model's adapters."""

    base: Array  # what they learnt on, without them
    trained: Array  # and with them
    original: Array | None  # merged into the weights as they are; None where the model is quantised
    dequantised: Array
    requantised: QuantizedTensor

    def into(self, way: str) -> Weight:
        """The weight merged in a way of INTO."""
        if way == "original":
            assert self.original is not None
            return self.original
        return self.requantised if way == "nf4" else self.dequantised


def merged_weights(model: Model, linear: str, trained_on_nf4: bool = True) -> Merged:
    """`model` as it was loaded, dense or quantised, with its adapters; dense arrays are of its dtype. Raises ValueError
    that names the adapter whose change is not finite."""
    name, dtype = linear + ".weight", model.dtype
    weight = model.params[name]
    parts = [
        (adapter, a.residual.get(name, weight), lora)
        for adapter, a in model.adapters.items()
        if (lora := a.lora(linear)) is not None
    ]
    quantized = _nf4(weight, name)
    on_nf4 = [(adapter, quantized if w is weight else _nf4(w, name), lora) for adapter, w, lora in parts]
    dequantised = _summed(quantized, on_nf4, dtype, linear)
    original = None if isinstance(weight, QuantizedTensor) else _summed(weight, parts, dtype, linear)
    trained = dequantised if trained_on_nf4 or original is None else original
    base = dense(quantized if original is None else weight, dtype)
    return Merged(base, trained, original, dequantised, quantize(trained, name=name))


def _summed(base: Weight, parts: list[tuple[str, Weight, LoRA]], dtype: np.dtype, linear: str) -> Array:
    """The base's weight plus what each adapter changes in it; a part is an adapter's name, the weight that it sits on,
    and what it has there."""
    merged = []
    for adapter, weight, lora in parts:
        merged.append(merge(dense(weight, dtype), lora))
        if not np.isfinite(merged[-1]).all():
            raise ValueError(f"{adapter}: {linear}: W + s B A is not finite")
    w = dense(base, dtype)
    return merged[0] if len(merged) == 1 else w + sum(changed - w for changed in merged)


def _nf4(weight: Weight, name: str) -> QuantizedTensor:
    return weight if isinstance(weight, QuantizedTensor) else quantize(weight, name=name)


def _file_dtype(base: Path) -> str:
    """The dtype of the base's files: what config.json says, otherwise that of the first tensor."""
    config = read_json(base / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None and config.get("quantization_config") is None:
        name = next(iter(outline(base)))[1].dtype.name
    return name if name in tuple(DTYPES) else "float32"


def _check_range(params: Mapping[str, Weight], dtype: np.dtype) -> None:
    for name, param in params.items():
        if not isinstance(param, QuantizedTensor) and not np.isfinite(param.astype(dtype)).all():
            raise ValueError(f"{name}: expected numbers that {dtype} holds, got {abs(param).max():g} among them")


class Errors:
    """Squared norms, summed by kind of linear."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(self, linear: str, merged: Merged, stored: np.dtype) -> None:
        """Count one linear, its dense weights as a file of dtype `stored` holds them."""
        trained, original = merged.trained, merged.original
        found = {"weight": merged.base, "change": (trained if original is None else original) - merged.base}
        if original is not None:
            found["original"] = original.astype(stored).astype(trained.dtype) - trained
        found["dequantised"] = merged.dequantised.astype(stored).astype(trained.dtype) - trained
        found["requantised"] = dequantize(merged.requantised, trained.dtype) - trained
        for kind in (linear.rsplit(".", 1)[-1], "all"):
            sums = self.sums.setdefault(kind, dict.fromkeys(found, 0.0) | {"linears": 0})
            sums["linears"] += 1
            for what, x in found.items():
                sums[what] += float(np.einsum("oi,oi->", x, x, dtype=np.float64))

    def facts(self) -> dict[str, Any]:
        """By kind, and for "all": how many linears; the change relative to the weight; the error of each way relative
        to the change (None where nothing changed, or there is no original)."""

        def relative(sums: dict[str, float], what: str, to: str) -> float | None:
            return (sums[what] / sums[to]) ** 0.5 if what in sums and sums[to] else None

        rows: dict[str, Any] = {}
        for kind, sums in self.sums.items():
            rows[kind] = {"linears": sums["linears"], "change": relative(sums, "change", "weight")}
            rows[kind] |= {way: relative(sums, way, "change") for way in ("original", "dequantised", "requantised")}
        return {"kinds": {kind: row for kind, row in rows.items() if kind != "all"}, "all": rows["all"]}


# ---- the table -------------------------------------------------------------------------------------------------


def _table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="error of merging", title_justify="left")
    columns = {
        "change": "change / weight",
        "original": "into original weights",
        "dequantised": "into dequantised base",
        "requantised": "into 4 bits again",
    }
    table.add_column("linear")
    for title in columns.values():
        table.add_column(title, justify="right")
    for kind, row in [*facts["kinds"].items(), ("all", facts["all"])]:
        if kind == "all":
            table.add_section()
        table.add_row(kind, *("-" if row[column] is None else f"{row[column]:.3g}" for column in columns))
    return table


# ---- the command -----------------------------------------------------------------------------------------------


MORE = (
    "By default the adapter is taken to have learnt on the base in NF4, as finetune trains it, and is merged into "
    "that base, dequantised. The errors of the other ways are printed in any case."
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--adapter", type=Path, required=True, action="append", help="a PEFT adapter; may be repeated")
    options.add_argument("--out", type=Path, required=True, help="new directory to write the model to")
    model(options)
    options.add_argument("--dtype", choices=DTYPES, default=None, help="of what is not in 4 bits (default: the base's)")
    way = options.add_mutually_exclusive_group()
    way.add_argument("--original", action="store_true", help="merge into the weights as they are, not dequantised")
    way.add_argument("--nf4", action="store_true", help="merge and quantise to 4 bits again")
    options.add_argument("--no-quantize", action="store_true", help="the adapter was trained on the dense base")
    options.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def run(a: argparse.Namespace) -> None:
    into = "nf4" if a.nf4 else "original" if a.original else None
    facts = merge_model(a.model, a.adapter, a.out, into=into, trained_on_nf4=not a.no_quantize, dtype=a.dtype)
    out, trained = console(a), "the NF4 base" if facts["trained_on_nf4"] else "the dense base"
    show(out, _table(facts))
    out.print(
        f"An error is how far the merged weights are from those trained ({trained} with the adapter), as a multiple of "
        "the adapter's own change: at 0.01 a hundredth of it is lost, at 1 they are as far off as the base without it.",
        highlight=False,
    )
    if facts["erased"]:
        error = facts["all"]["requantised"]
        keep = "Keep it apart, or merge into 16 bits." if into == "nf4" else "Use the merged model with --no-quantize."
        out.print(
            f"Warning: 4 bits again lose {'the' if error > 0.9 else 'much of the'} adapter (error {error:.2g}): its "
            f"change is small beside the steps between the codes. {keep}",
            highlight=False,
        )
    out.print(f"wrote {a.out}/: merged into {INTO[facts['into']]}, {facts['dtype']}", highlight=False, markup=False)
    out.print(f"try it: {facts['use']}", highlight=False, markup=False)
    report(a, facts)
