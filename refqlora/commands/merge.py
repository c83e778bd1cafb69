"""Adapters merged into their base: a model that needs no adapter, and its distance from the one that was trained.

An adapter trained by QLoRA has learnt on the quantised base; the trained weights are Q(W) + s B A. It can be merged

    into the original weights    W + s B A          without the quantisation error that it learnt with
    into the dequantised base    Q(W) + s B A       the trained weights, rounded to the file's dtype
    back into 4 bits             Q(Q(W) + s B A)    changes smaller than a step of the codes are lost

and each has an error. It is given as a multiple of the adapter's own change, ||s B A||: at 1 the merged weights are as
far from the trained ones as the base is without the adapter.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..adapters import Adapter, warn_if_untrained
from ..backend import Array
from ..checks import finite
from ..files import pretrained
from ..files.bnb import DENSE_DTYPES
from ..files.hub import model_directory
from ..files.model_files import outline
from ..files.reading import read_json
from ..files.writing import new_directory
from ..lora import LoRA, Weight, dense, merge
from ..model import Model
from ..quantization import QuantizedTensor, dequantize, quantize
from .options import console, json_option, model_option, number_table, report, show

if TYPE_CHECKING:
    from rich.table import Table

INTO = {"original": "the original weights", "dequantised": "the dequantised base", "nf4": "4 bits again"}
KEPT = 0.5  # the part of its change that an adapter must keep in 4 bits; with less it is called erased


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
    with the tokenizer and the model's other files; -> the errors of each kind of linear, and of all.

    trained_on_nf4: whether the adapters learnt on the base in NF4 (QLoRA) or on the weights as they are (LoRA).
    into: one of INTO; by default "dequantised" after QLoRA, otherwise "original". With "dequantised" and "nf4" every
    linear is quantised, even without an adapter. dtype: of what is not in 4 bits, a key of DENSE_DTYPES; by default
    the base's. The changes of several adapters add up, each computed from the base.

    Raises ValueError or FileNotFoundError for bad files or options; `out` is then as it was.
    """
    into = into or ("dequantised" if trained_on_nf4 else "original")
    if into not in INTO:
        raise ValueError(f"into: expected one of {', '.join(INTO)}, got {into!r}")
    if dtype is not None and dtype not in DENSE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DENSE_DTYPES)}, got {dtype!r}")
    base = model_directory(base)
    with new_directory(out) as new:
        named = {str(path) + f" ({i + 1})" * (path in adapters[:i]): path for i, path in enumerate(adapters)}
        model = Model.from_pretrained(base, adapters=named)
        for name, adapter in model.adapters.items():
            warn_if_untrained(adapter, name)
        linears = model.config.linears()
        if into == "original" and isinstance(model.params[linears[0] + ".weight"], QuantizedTensor):
            raise ValueError(f"{base}: expected original weights to merge into, got a quantised model")
        stored, errors = DENSE_DTYPES[dtype or _file_dtype(base)], Errors()
        with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite are refused by name
            for linear in linears:
                merged = merged_weights(model, linear, trained_on_nf4)
                errors.add(linear, merged, stored)
                model.params[linear + ".weight"] = merged.into(into)
        if not errors.sums["all"]["change"]:
            raise ValueError("nothing to merge: the adapters change no weight")
        pretrained.save(new, model.config, model.params, stored, base=base)
    facts = errors.facts() | {"into": into, "dtype": stored.name, "trained_on_nf4": trained_on_nf4}
    use = f"refqlora generate --model {shlex.quote(str(out))}{'' if into == 'nf4' else ' --no-quantize'} --prompt TEXT"
    return facts | {"erased": facts["all"]["kept"] < KEPT, "use": use}


def merge_in_memory(model: Model, adapters: Mapping[str, Adapter], into: str, dtype: str = "float32") -> float:
    """Merge adapters that learnt on NF4 into the linears of `model`, dense, in place, in one of the ways of INTO; dense
    results are rounded to `dtype`. -> the error of that way (see above)."""
    merging = Model(model.config, model.params, model.dtype)
    merging.adapters = dict(adapters)
    errors = Errors()
    for linear in model.config.linears():
        merged = merged_weights(merging, linear)
        errors.add(linear, merged, DENSE_DTYPES[dtype])
        weight = merged.into(into)
        rounded = weight if isinstance(weight, QuantizedTensor) else weight.astype(DENSE_DTYPES[dtype])
        model.params[linear + ".weight"] = rounded
    return errors.facts()["all"][{"nf4": "requantised"}.get(into, into)]


def kept_in_4_bits(model: Model, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """What is left of adapters that learnt on NF4 when `model`, dense, is quantised again with them merged, over all
    its linears. With D = s B A, the change that was learnt, and R the change of the dequantised weights:

        change      ||D|| / ||Q(W)||
        codes       the fraction of the weights whose 4-bit code changes
        kept        <R, D> / ||D||^2: R in the direction of D, in units of D; the rest of R is noise
        error       ||R - D|| / ||D||, as elsewhere here; noise makes it large even if all of D is kept
    """
    merging = Model(model.config, model.params, model.dtype)
    merging.adapters = dict(adapters)
    errors, weight = Errors(), 0.0
    changed = codes = 0
    for linear in model.config.linears():
        merged, before = merged_weights(merging, linear), _nf4(model.params[linear + ".weight"], linear)
        errors.add(linear, merged, model.dtype)
        w = dequantize(before, model.dtype)  # (out, in)
        weight += float(np.einsum("oi,oi->", w, w, dtype=np.float64))
        different = before.packed ^ merged.requantised.packed  # two codes a byte
        changed += int((different >> 4 != 0).sum() + (different & 15 != 0).sum())
        codes += w.size
    row = errors.facts()["all"]
    return {
        "change": (errors.sums["all"]["change"] / weight) ** 0.5,
        "codes": changed / codes,
        "kept": row["kept"],
        "error": row["requantised"],
    }


class Merged(NamedTuple):
    """One linear's weight (out, in) with all of a model's adapters, merged in each way."""

    base: Array  # the weight that they learnt on, without them
    trained: Array  # the same with them
    original: Array | None  # merged into the weights as they are; None if the model is quantised
    dequantised: Array
    requantised: QuantizedTensor

    def into(self, way: str) -> Weight:
        """The weight merged in one of the ways in INTO."""
        if way == "original":
            assert self.original is not None
            return self.original
        return self.requantised if way == "nf4" else self.dequantised


def merged_weights(model: Model, linear: str, trained_on_nf4: bool = True) -> Merged:
    """The weights of a linear of `model`, dense or quantised as it was loaded; dense results have the model's dtype.
    Raises ValueError that names an adapter whose change is not finite."""
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
    """The base's weight plus each adapter's change. A part: an adapter's name, the weight that it sits on, and its A
    and B there."""
    merged = [
        finite(f"{adapter}: {linear}: W + s B A", merge(dense(weight, dtype), lora)) for adapter, weight, lora in parts
    ]
    w = dense(base, dtype)
    return merged[0] if len(merged) == 1 else w + sum(changed - w for changed in merged)


def _nf4(weight: Weight, name: str) -> QuantizedTensor:
    return weight if isinstance(weight, QuantizedTensor) else quantize(weight, name=name)


def _file_dtype(base: Path) -> str:
    """The dtype of the base's files: by config.json, otherwise by the first tensor."""
    config = read_json(base / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None and config.get("quantization_config") is None:
        name = next(iter(outline(base)))[1].dtype.name
    return name if name in tuple(DENSE_DTYPES) else "float32"


class Errors:
    """Squared norms, summed by kind of linear."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(self, linear: str, merged: Merged, stored: np.dtype) -> None:
        """Count one linear, its dense weights rounded to the file's dtype `stored`."""
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
            along = np.einsum("oi,oi->", found["requantised"], found["change"], dtype=np.float64)
            sums["along"] = sums.get("along", 0.0) + float(along)

    def facts(self) -> dict[str, Any]:
        """For each kind, and for "all": the number of linears, the change relative to the weight, the error of each way
        relative to the change (None if nothing changed, or there is no original), and what of the change 4 bits keep,
        in its own direction."""

        def relative(sums: dict[str, float], what: str, to: str) -> float | None:
            return (sums[what] / sums[to]) ** 0.5 if what in sums and sums[to] else None

        rows: dict[str, Any] = {}
        for kind, sums in self.sums.items():
            rows[kind] = {"linears": sums["linears"], "change": relative(sums, "change", "weight")}
            rows[kind] |= {way: relative(sums, way, "change") for way in ("original", "dequantised", "requantised")}
            rows[kind]["kept"] = 1 + sums["along"] / sums["change"] if sums["change"] else None
        return {"kinds": {kind: row for kind, row in rows.items() if kind != "all"}, "all": rows["all"]}


# ---- the table -------------------------------------------------------------------------------------------------


def _table(facts: dict[str, Any]) -> Table:
    columns = {
        "change": "change / weight",
        "original": "into original weights",
        "dequantised": "into dequantised base",
        "requantised": "into 4 bits again",
    }
    table = number_table("error of merging", "linear", *columns.values())
    for kind, row in [*facts["kinds"].items(), ("all", facts["all"])]:
        if kind == "all":
            table.add_section()
        table.add_row(kind, *("-" if row[column] is None else f"{row[column]:.3g}" for column in columns))
    return table


# ---- the command -----------------------------------------------------------------------------------------------


MORE = (
    "By default the adapter is assumed to have learnt on the base in NF4, as finetune trains it, and is merged into "
    "that base, dequantised. The errors of all ways of merging are printed."
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--adapter", type=Path, required=True, action="append", help="a PEFT adapter; may be repeated")
    options.add_argument("--out", type=Path, required=True, help="new directory to write the model to")
    model_option(options)
    options.add_argument(
        "--dtype", choices=DENSE_DTYPES, default=None, help="dtype of weights not in 4 bits (default: the base's)"
    )
    way = options.add_mutually_exclusive_group()
    way.add_argument("--original", action="store_true", help="merge into the original weights, not the dequantised")
    way.add_argument("--nf4", action="store_true", help="merge and quantise to 4 bits again")
    options.add_argument("--no-quantize", action="store_true", help="the adapter was trained on the dense base")
    json_option(options)


def run(a: argparse.Namespace) -> None:
    into = "nf4" if a.nf4 else "original" if a.original else None
    facts = merge_model(a.model, a.adapter, a.out, into=into, trained_on_nf4=not a.no_quantize, dtype=a.dtype)
    out, trained = console(a), "the NF4 base" if facts["trained_on_nf4"] else "the dense base"
    show(out, _table(facts))
    show(
        out,
        f"The error is the distance of the merged weights from the trained ones ({trained} with the adapter), relative "
        "to the adapter's change: at 0.01 a hundredth of the change is lost, at 1 all of it.",
    )
    if facts["erased"]:
        kept = max(0.0, facts["all"]["kept"])
        keep = "Keep it separate, or merge into 16 bits." if into == "nf4" else "Use the result with --no-quantize."
        show(
            out,
            f"Warning: quantising again keeps {100 * kept:.0f} % of the adapter: its change is small compared with the "
            f"steps between the codes. {keep}",
        )
    show(out, f"wrote {a.out}/: merged into {INTO[facts['into']]}, {facts['dtype']}")
    show(out, f"try it: {facts['use']}")
    report(a, facts)
