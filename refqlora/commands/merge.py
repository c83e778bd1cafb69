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
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.table import Table

from ..backend import Array
from ..files.hub import model_directory
from ..files.model_files import read_model
from ..files.reading import read_json
from ..files.writing import check_new, new_directory
from ..lora import LoRA, Weight, dense, merge
from ..model import Model
from ..quantization import QuantizedTensor, dequantize, quantize
from .options import console, model, report, show

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INTO = ("dequantised", "original", "nf4")
ERASED = 0.5  # from this error on, requantising is said to erase the adapter
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def merge_model(
    base: str | Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    into: str | None = None,
    trained_on_nf4: bool = True,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Merge adapters into `base`, a model's directory or hub's id, and write the result, with the tokenizer and
    whatever else lies there, to the new directory `out`; -> the errors by kind of linear, and in all.

    trained_on_nf4: whether the adapters learnt on the base in NF4 (QLoRA) or on the weights as they are (LoRA).
    into: one of INTO; by default "dequantised" after QLoRA, otherwise "original". With "dequantised" and "nf4" every
    linear is quantised, those without an adapter too. dtype: of the files, a key of DTYPES; by default the base's.
    The changes of several adapters add up, each counted from the base.

    Raises ValueError or FileNotFoundError for what is wrong with files or options. `out` is there whole or not at all.
    """
    into = into or ("dequantised" if trained_on_nf4 else "original")
    if into not in INTO:
        raise ValueError(f"into must be one of {', '.join(INTO)}, not {into!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype is not None and into == "nf4":
        raise ValueError("dtype is that of 16 or 32 bit files: it does not go with nf4")
    check_new(out)
    base = model_directory(base)
    model = Model.from_pretrained(base)
    stored = np.dtype(DTYPES[dtype or _file_dtype(base)])
    for i, adapter in enumerate(adapters):
        model.load_adapter(adapter, str(i))
    linears = model.config.linears()
    if into == "original" and isinstance(model.params[linears[0] + ".weight"], QuantizedTensor):
        raise ValueError(f"{base}: is quantised already: there are no original weights to merge into")

    errors = Errors()
    for linear in linears:
        weights = merged_weights(model, linear, trained_on_nf4)
        wanted = weights["requantised" if into == "nf4" else into]
        errors.add(linear, weights, stored)
        if not isinstance(wanted, QuantizedTensor) and not np.isfinite(wanted.astype(stored)).all():
            raise ValueError(f"{linear}.weight: merged, it is beyond what {stored} holds")
        model.params[linear + ".weight"] = wanted
    facts = errors.facts()
    if not facts["all"]["change"]:
        raise ValueError("nothing to merge: the adapters change no weight")
    model.set_adapter(None)
    with new_directory(out) as directory:
        model.save_pretrained(directory, **({} if into == "nf4" else {"dtype": stored}))
        for file in sorted(base.iterdir()):
            ours = file.name.startswith(".") or file.name.endswith(_WEIGHTS) or (directory / file.name).exists()
            if file.is_file() and not ours:
                shutil.copyfile(file, directory / file.name)
    facts |= {"into": into, "dtype": "nf4" if into == "nf4" else stored.name, "trained_on_nf4": trained_on_nf4}
    return facts | {"erased": facts["all"]["requantised"] >= ERASED}


def merged_weights(model: Model, linear: str, trained_on_nf4: bool = True) -> dict[str, Weight | None]:
    """One linear's weight (out, in) under all of the model's adapters: as "base" and as "trained" (what the adapters
    learnt on, without and with them), and merged: "original" (None where the model is quantised), "dequantised",
    "requantised".

    `model` as it was loaded, dense or quantised; dense arrays are of its dtype, "requantised" is a QuantizedTensor.
    """
    name, dtype = linear + ".weight", model.dtype
    weight = model.params[name]
    parts = [(a.residual.get(name, weight), a.lora(linear)) for a in model.adapters.values()]
    quantized = _nf4(weight, name)
    on_nf4 = _summed(quantized, [(quantized if w is weight else _nf4(w, name), lora) for w, lora in parts], dtype)
    original = None if isinstance(weight, QuantizedTensor) else _summed(weight, parts, dtype)
    trained = on_nf4 if trained_on_nf4 or original is None else original
    return {
        "base": dense(quantized if original is None else weight, dtype),
        "trained": trained,
        "original": original,
        "dequantised": on_nf4,
        "requantised": quantize(trained, name=name),
    }


class Errors:
    """Squared norms, summed by kind of linear."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(self, linear: str, weights: dict[str, Weight | None], stored: np.dtype) -> None:
        """Count one linear's `merged_weights`, the dense ones as a file of dtype `stored` holds them."""
        trained, original = weights["trained"], weights["original"]
        change = (trained if original is None else original) - weights["base"]
        found = {"weight": weights["base"], "change": change}
        for way in ("original", "dequantised"):
            if weights[way] is not None:
                found[way] = weights[way].astype(stored).astype(trained.dtype) - trained
        found["requantised"] = dequantize(weights["requantised"], trained.dtype) - trained
        for kind in (linear.rsplit(".", 1)[-1], "all"):
            sums = self.sums.setdefault(kind, dict.fromkeys(found, 0.0) | {"linears": 0})
            sums["linears"] += 1
            for what, x in found.items():
                sums[what] += float(np.linalg.norm(x)) ** 2

    def facts(self) -> dict[str, Any]:
        """By kind, and for "all": how many linears; the change relative to the weight; the error of each way relative
        to the change (None where nothing changed, or there is no original)."""
        rows = {}
        for kind, sums in self.sums.items():
            rows[kind] = {"linears": sums["linears"], "change": (sums["change"] / sums["weight"]) ** 0.5}
            for way in ("original", "dequantised", "requantised"):
                known = way in sums and sums["change"]
                rows[kind][way] = (sums[way] / sums["change"]) ** 0.5 if known else None
        return {"kinds": {kind: row for kind, row in rows.items() if kind != "all"}, "all": rows["all"]}


def _summed(base: Weight, parts: list[tuple[Weight, LoRA | None]], dtype: np.dtype) -> Array:
    """The base's weight plus what each adapter changes in it; a part is the weight that an adapter sits on, and it."""
    parts = [(weight, lora) for weight, lora in parts if lora is not None]
    if len(parts) == 1:
        return merge(dense(parts[0][0], dtype), parts[0][1])
    w = dense(base, dtype)
    return w + sum(merge(dense(weight, dtype), lora) - w for weight, lora in parts)


def _nf4(weight: Weight, name: str) -> QuantizedTensor:
    return weight if isinstance(weight, QuantizedTensor) else quantize(weight, name=name)


def _file_dtype(base: Path) -> str:
    """The dtype of the base's files: what config.json says, otherwise that of the first tensor."""
    config = read_json(base / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or next(read_model(base))[1].dtype.name
    return name if name in DTYPES else "float32"


# ---- the command ----


MORE = (
    "By default the adapter is taken to have learnt on the base in NF4, as finetune trains it, and is merged into "
    "that base, dequantised. The errors of the other ways are printed in any case."
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--adapter", type=Path, required=True, action="append", help="a PEFT adapter; may be repeated")
    options.add_argument("--out", type=Path, required=True, help="new directory to write the model to")
    model(options)
    options.add_argument("--dtype", choices=DTYPES, default=None, help="of the files (default: the base's)")
    way = options.add_mutually_exclusive_group()
    way.add_argument("--original", action="store_true", help="merge into the weights as they are, not dequantised")
    way.add_argument("--nf4", action="store_true", help="merge and quantise to 4 bits again")
    options.add_argument("--no-quantize", action="store_true", help="the adapter was trained on the dense base")
    options.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")


def run(a: argparse.Namespace) -> None:
    into = "nf4" if a.nf4 else "original" if a.original else None
    facts = merge_model(a.model, a.adapter, a.out, into=into, trained_on_nf4=not a.no_quantize, dtype=a.dtype)
    table = Table(title="error of merging", title_justify="left")
    ways = {"original": "original weights", "dequantised": "dequantised base", "requantised": "4 bits again"}
    for column in ("linear", "change / weight", *(f"into {way}" for way in ways.values())):
        table.add_column(column, justify="left" if column == "linear" else "right")
    rows = [*facts["kinds"].items(), ("all", facts["all"])]
    for kind, row in rows:
        table.add_section() if kind == "all" else None
        errors = ("-" if row[way] is None else f"{row[way]:.3g}" for way in ways)
        table.add_row(kind, f"{row['change']:.3g}", *errors)
    out, trained = console(a), "the NF4 base" if facts["trained_on_nf4"] else "the dense base"
    show(out, table)
    out.print(
        f"An error is how far the merged weights are from those trained ({trained} with the adapter), as a multiple of "
        "the adapter's own change: at 0.01 a hundredth of it is lost, at 1 they are as far off as the base without it.",
        highlight=False,
    )
    if facts["erased"]:
        error = facts["all"]["requantised"]
        out.print(
            f"Warning: 4 bits again lose {'the' if error > 0.9 else 'much of the'} adapter (error {error:.2g}): its "
            "change is small beside the steps between the codes. Keep it apart, or merge into 16 bits.",
            highlight=False,
        )
    where = {"original": "the original weights", "dequantised": "the dequantised base", "nf4": "4 bits again"}
    out.print(f"wrote {a.out}/: merged into {where[facts['into']]}, {facts['dtype']}", highlight=False, markup=False)
    report(a, facts)
