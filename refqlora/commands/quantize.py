"""`refqlora quantize`: a model's files quantised, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from ..backend import Array
from ..blockwise import BLOCK_SIZES
from ..checks import finite, shown
from ..codebooks import CODEBOOKS
from ..config import Config
from ..files import bnb, model_files, pretrained
from ..files.bnb import TYPES
from ..files.config_json import read_config
from ..files.hub import model_directory
from ..files.writing import new_directory, write_json
from ..quantization import quantize
from ..quantization_error import Error, quantization_error
from .options import console, json_option, model_option, number_table, report, show

if TYPE_CHECKING:
    from rich.table import Table


def quantize_files(
    model: str | Path,
    out: Path,
    console: Console,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    shard_bytes: int = model_files.SHARD,
) -> dict[str, Any]:
    """Quantise the linears of `model`, a directory or a hub's id, and write the new model to the directory `out`; ->
    its sizes and errors.

    The linears are in bitsandbytes' 4 bits; other weights, the tokenizer and the model's other files stay as they are.
    transformers and bitsandbytes load `out` like their own files. One tensor is in memory at a time. `out` must be new
    or empty, and after an error it is as it was. Raises ValueError or FileNotFoundError that names the fault.
    """
    model = model_directory(model)
    config, d = read_config(model)
    if d.get("quantization_config") is not None:
        raise ValueError(f"{model / 'config.json'}: the model is quantised already")
    if kind not in TYPES:
        raise ValueError(f"type: expected one of {', '.join(TYPES)}, got {shown(kind)}")
    pretrained.check_tensors(model, config)
    rows: list[Row] = []
    with new_directory(out) as directory:
        model_files.copy_companions(model, directory)
        tensors = _quantized(model, config, rows, console, kind, block_size, double_quant)
        nbytes = model_files.write_model(directory, tensors, shard_bytes)
        dtype = d.get("dtype") or d.get("torch_dtype")
        dtype = bnb.DENSE_DTYPES[dtype] if dtype in tuple(bnb.DENSE_DTYPES) else rows[0].dtype
        write_json(directory / "config.json", {**d, "quantization_config": bnb.config_for(kind, double_quant, dtype)})
    facts = _figures(rows, nbytes, kind, block_size, double_quant)
    show(console, _table(facts))
    show(console, f"wrote {out}/")
    return facts


class Row(NamedTuple):
    """One tensor: its bytes before, its bytes after (codes and constants), and its error (None if not quantised)."""

    name: str
    size: int
    dtype: np.dtype
    before: int
    after: int
    error: Error | None


def _quantized(
    model: Path, config: Config, rows: list[Row], console: Console, kind: str, block_size: int, double_quant: bool
) -> Iterator[tuple[str, Array]]:
    """The tensors of the new model; a row for each tensor of the old one is added to `rows`."""
    linears = {name + ".weight" for name in config.linears()}
    tensors: Iterable = model_files.read_model(model)
    if console.is_terminal and not console.quiet:
        tensors = track(tensors, "quantising", len(config.shapes()), console=console, transient=True)
    for name, tensor in tensors:
        name, tensor = pretrained.from_file(config, name, tensor)
        if name in linears:
            q = quantize(tensor, CODEBOOKS[kind], block_size, double_quant, name=f"{model}: {name}")
            rows.append(Row(name, tensor.size, tensor.dtype, tensor.nbytes, q.nbytes, quantization_error(tensor, q)))
            yield from bnb.parts_of(name, q)
        else:
            rows.append(Row(name, tensor.size, tensor.dtype, tensor.nbytes, tensor.nbytes, None))
            yield pretrained.to_file(config, name, finite(f"{model}: {name}", tensor))
        del tensor  # before the next is read


def _figures(rows: list[Row], nbytes: int, kind: str, block_size: int, double_quant: bool) -> dict[str, Any]:
    """Sizes and errors of each kind of linear and of all. nbytes: of the new model's tensors, with codebooks."""
    layers: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is not None:
            layers.setdefault(row.name.split(".")[-2], []).append(row)
    quantized = [row for part in layers.values() for row in part]

    def figures(part: list[Row]) -> dict[str, Any]:
        error = sum((row.error for row in part if row.error is not None), Error())
        size = sum(row.size for row in part)
        return {
            "tensors": len(part),
            "parameters": size,
            "bits_per_parameter": 8 * sum(row.after for row in part) / size,
            "relative_error": error.relative,
            "largest_error": error.largest,
        }

    size, before = sum(row.size for row in rows), sum(row.before for row in rows)
    return {
        "type": kind,
        "block_size": block_size,
        "double_quant": double_quant,
        "linears": figures(quantized),
        "kinds": {name: figures(part) for name, part in layers.items()},
        "parameters": size,
        "bytes": {"before": before, "after": nbytes},
        "bits_per_parameter": {"before": 8 * before / size, "after": 8 * nbytes / size},
    }


def _table(facts: dict[str, Any]) -> Table:
    nested = ", constants in 8 bits" if facts["double_quant"] else ""
    title = f"{facts['type'].upper()} in blocks of {facts['block_size']}{nested}: the root mean square error, relative"
    columns = ("tensors", "parameters", "bits", "relative error", "largest error")
    table = number_table(title + " to the weights', and the largest", "layer", *columns)
    for name, row in {**facts["kinds"], "all linears": facts["linears"]}.items():
        if name == "all linears":
            table.add_section()
        table.add_row(
            name,
            str(row["tensors"]),
            f"{row['parameters']:,}",
            f"{row['bits_per_parameter']:.3f}",
            f"{row['relative_error']:.5f}",
            f"{row['largest_error']:.2e}",
        )
    nbytes, bits = facts["bytes"], facts["bits_per_parameter"]
    table.caption = (
        f"the whole model: {nbytes['before']:,} bytes before, {nbytes['after']:,} after; "
        f"{bits['before']:.2f} bits a parameter before, {bits['after']:.2f} after"
    )
    return table


# ---- the command ----


MORE = "Embeddings, norms and the output head stay as they are; the tokenizer is copied."


def add(options: argparse.ArgumentParser) -> None:
    model_option(options)
    options.add_argument("--out", type=Path, required=True, help="directory to write to, new or empty")
    options.add_argument("--type", choices=TYPES, default="nf4", help="codebook: NormalFloat or 4-bit float")
    options.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=64, help="weights that share a constant"
    )
    options.add_argument("--no-double-quant", action="store_true", help="leave the constants in float32")
    json_option(options)


def run(a: argparse.Namespace) -> None:
    facts = quantize_files(
        a.model,
        a.out,
        console(a),
        kind=a.type,
        block_size=a.block_size,
        double_quant=not a.no_double_quant,
    )
    report(a, facts)
