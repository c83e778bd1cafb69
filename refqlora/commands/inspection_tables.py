"""What `refqlora inspect` found, as tables that fit 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from ..checks import cut

LONGEST = 20  # rows shown on a terminal of a table with the worst first

_IDENTITY = ("steps", "batch_size", "lr", "schedule", "weight_decay", "seed")


def tables(facts: dict[str, Any], longest: int | None = LONGEST) -> Iterator[Table | Text]:
    """The facts of `inspection.inspect`, the most important first.

    longest: rows shown of a table with the worst first; None for all.
    """
    if "model" in facts:
        yield from _model(facts["model"], longest)
    if "tensors" in facts:
        yield from _tensors(facts["tensors"], longest)
    if "adapter" in facts:
        yield from _adapter(facts["adapter"], longest)
    if "training" in facts:
        yield from _training(facts["training"])
    if "tokenizer" in facts:
        t = facts["tokenizer"]
        yield _pairs("tokenizer", {"type": t["type"], "tokens": t["size"], "added tokens": t["added_tokens"]})
    for file in facts.get("files", ()):
        yield Text(cut(file["path"], 300), style="bold")
        yield from tables(file, longest)


def _model(model: dict[str, Any], longest: int | None) -> Iterator[Table | Text]:
    shown = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in model["config"].items()}
    yield _pairs("model", {**shown, "parameters": model["parameters"], "bytes": model["stored"]["bytes"]})
    if "not_supported" in model:
        yield Text(f"refqlora does not support this model: {model['not_supported']}\n")
    yield from _weights(model, longest)


def _tensors(found: dict[str, Any], longest: int | None) -> Iterator[Table | Text]:
    metadata = {f"metadata: {key}": value for key, value in found["metadata"].items()}
    yield _pairs("safetensors", {"parameters": found["parameters"], "bytes": found["stored"]["bytes"], **metadata})
    yield from _weights(found, longest)


def _weights(found: dict[str, Any], longest: int | None) -> Iterator[Table | Text]:
    groups: dict[tuple, dict[str, int]] = {}
    for row in found["weights"]:
        key = (re.sub(r"\.\d+\.", ".*.", row["name"]), row["dtype"], tuple(row["shape"]))
        group = groups.setdefault(key, {"tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += row["parameters"]
        group["bytes"] += row["bytes"]
    table = _table("tensors, by kind", "name", "n", "dtype", "shape", "parameters", "bytes")
    for (name, dtype, shape), group in sorted(groups.items()):
        shape_text = " x ".join(map(str, shape)) or "scalar"
        table.add_row(
            short(name),
            str(group["tensors"]),
            dtype,
            shape_text,
            f"{group['parameters']:,}",
            f"{group['bytes']:,}",
        )
    table.add_section()
    total = [sum(group[what] for group in groups.values()) for what in ("tensors", "parameters", "bytes")]
    table.add_row("all", str(total[0]), "", "", f"{total[1]:,}", f"{total[2]:,}")
    yield table
    table = _table("as stored", "dtype", "tensors", "bytes", "share")
    stored = found["stored"]
    for dtype, row in sorted(stored["dtypes"].items(), key=lambda item: -item[1]["bytes"]):
        share = row["bytes"] / stored["bytes"] if stored["bytes"] else 0.0
        table.add_row(dtype, str(row["tensors"]), f"{row['bytes']:,}", f"{share:.1%}")
    if len(stored["files"]) > 1:
        table.add_section()
        for file, nbytes in stored["files"].items():
            table.add_row(Text(cut(file, 200)), "", f"{nbytes:,}", f"{nbytes / stored['bytes']:.1%}")
    yield table
    if "quantized" in found:
        yield _quantized(found["quantized"])
    if "nf4_error" in found:
        yield from _nf4_error(found["nf4_error"], longest)


def _quantized(q: dict[str, Any]) -> Table:
    nested = {True: "yes", False: "no"}
    return _pairs(
        "quantised weights",
        {
            "tensors": q["tensors"],
            "parameters": q["parameters"],
            "type": ", ".join(q["types"]),
            "block size": ", ".join(map(str, q["block_sizes"])),
            "double-quantised": ", ".join(nested[n] for n in q["nested"]),
            "bits a parameter": f"{q['bits_per_parameter']:.6g}",
            "bytes of codes": q["packed_bytes"],
            "bytes of constants": q["constants_bytes"],
            "bytes of tables": q["tables_bytes"],
        },
    )


def _nf4_error(rows: Sequence[dict[str, Any]], longest: int | None) -> Iterator[Table | Text]:
    table = _table(
        "what NF4 would cost (double-quantised, blocks of 64), worst first",
        "name",
        "error",
        "absmax",
        "above 6 rms",
        "rms",
    )
    for row in rows[:longest]:
        table.add_row(
            short(row["name"]),
            f"{row['relative_error']:.5f}",
            f"{row['largest_absmax']:.1f}",
            f"{row['outliers_per_million']:.1f}",
            f"{row['rms']:.2e}",
        )
    yield table
    yield Text(
        "error: its root mean square, relative to that of the weights, rms\n"
        "absmax: of the largest block, relative to rms\n"
        "above 6 rms: weights in a million\n" + _more(rows, longest)
    )


def _adapter(adapter: dict[str, Any], longest: int | None) -> Iterator[Table | Text]:
    config = adapter.get("config", {})
    shown = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in config.items()}
    if "base" in adapter:
        shown["base model"] = adapter["base"] or "not recorded"
    scales = sorted({row["scale"] for row in adapter["matrices"] if "scale" in row})
    if scales:
        shown["scale"] = " to ".join(f"{scale:g}" for scale in (scales[0], scales[-1])[: len(scales)])
    if adapter.get("others"):
        shown["other tensors"] = ", ".join(adapter["others"])
    parameters = sum(row["rank"] * (row["in"] + row["out"]) for row in adapter["matrices"])
    yield _pairs("adapter", {**shown, "parameters": parameters, "bytes": adapter["stored"]["bytes"]})
    if "not_supported" in adapter:
        yield Text(f"refqlora does not support this adapter: {adapter['not_supported']}\n")
    rows = adapter["matrices"]
    relative = any("relative_change" in row for row in rows)
    normed = any("norm_change" in row for row in rows)
    if not normed:
        yield _by_kind(rows)
        return
    columns = ["|A|", "|B|", "|s B A|" if scales else "|B A|"] + ["/ |W|"] * relative
    table = _table("matrices, the largest change first", "linear", "rank", "out x in", *columns)
    for row in rows[:longest]:
        cells = [f"{row[key]:.3g}" for key in ("norm_A", "norm_B", "norm_change")]
        if relative:
            cells.append(f"{row['relative_change']:.4f}" if "relative_change" in row else "")
        table.add_row(short(row["linear"]), str(row["rank"]), f"{row['out']} x {row['in']}", *cells)
    yield table
    yield Text("|.|: the Frobenius norm\n" + _more(rows, longest))


def _by_kind(rows: Sequence[dict[str, Any]]) -> Table:
    groups: dict[tuple, int] = {}
    for row in rows:
        key = (re.sub(r"\.\d+\.", ".*.", row["linear"]), row["rank"], row["out"], row["in"])
        groups[key] = groups.get(key, 0) + 1
    table = _table("matrices, by kind", "linear", "n", "rank", "out x in")
    for (name, rank, out, into), n in sorted(groups.items()):
        table.add_row(short(name), str(n), str(rank), f"{out} x {into}")
    return table


def _training(training: dict[str, Any]) -> Iterator[Table | Text]:
    identity = training["identity"]
    adapter = identity.get("adapter")
    rows = {"step": f"{training['step']} of {identity.get('steps', '?')}"}
    rows |= {key: identity[key] for key in _IDENTITY[1:] if key in identity}
    rank = f"an adapter of rank {adapter.get('rank', '?')}" if isinstance(adapter, dict) else "every parameter"
    rows["trains"] = rank
    rows |= {key: f"{value:08x}" for key, value in identity.items() if "checksum" in key and isinstance(value, int)}
    rows |= {"bytes of parameters": training["param"]["bytes"], "bytes of AdamW's moments": training["adamw"]["bytes"]}
    yield _pairs("training checkpoint", rows)


def short(name: str) -> Text:
    """A tensor's name without "model." at its beginning and ".weight" at its end, which all have."""
    return Text(cut(name.removeprefix("model.").removesuffix(".weight").replace("layers.*.", "*."), 200))


def _more(rows: Sequence[Any], longest: int | None) -> str:
    more = len(rows[longest:]) if longest is not None else 0
    return f"{more:,} more in a pipe, or with --json\n" if more else ""


def _pairs(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(Text(cut(key, 40)), f"{value:,}" if type(value) is int else Text(cut(str(value), 300)))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("dtype", "shape") else "right", no_wrap=True)
    return table
