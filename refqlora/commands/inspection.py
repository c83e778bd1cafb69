"""What is in a safetensors file or a directory, for `refqlora inspect`. Tensors are read only if their numbers matter.

inspect(path) -> {"path": ..., and for what exists "model", "adapter", "training", "tokenizer", "tensors", "files"}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import TEXT, check, finite
from ..files import adapter_files, bnb, model_files, pretrained
from ..files.config_json import config_from_dict
from ..files.hub import BUNDLED, model_directory
from ..files.reading import FLOATS, STORED_DTYPES, Mapped, map_tensors, read_json
from ..lora import dense
from ..lora_config import LoraConfig
from ..quantization import QuantizedTensor, quantize
from ..quantization_error import quantization_error
from ..resume import CHECKPOINT, read_identity, read_step
from ..text.tokenizer import load_tokenizer

Progress = Any  # a function (iterable, title) -> iterable that may show a progress bar
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

_SIZES = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
_LORA = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "lora_dropout", "use_rslora",
    "use_dora", "bias",
)  # fmt: skip
_MATRIX = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


def inspect(path: Path, *, error: bool = True, progress: Progress = lambda items, title: items) -> dict[str, Any]:
    """What is in `path` (a .safetensors file, a directory or a model's id on the hub), as a dict for JSON.

    error: quantise each dense linear to NF4 to measure its error, and read an adapter's matrices. Raises
    FileNotFoundError if nothing is recognised, and ValueError that names the file and tensor at fault.
    """
    path = Path(path)
    if path.is_file():
        return {"path": str(path), **_file(path, error, progress)}
    path = model_directory(path)
    facts: dict[str, Any] = {"path": str(path)}
    if (path / "config.json").is_file():
        facts["model"] = _model(path, error, progress)
    if (path / "adapter_config.json").is_file():
        facts["adapter"] = _adapter(path, error, progress)
    if (path / CHECKPOINT).is_file():
        facts["training"] = _file(path / CHECKPOINT, error, progress).get("training")
    if (path / "tokenizer.json").is_file():
        facts["tokenizer"] = _tokenizer(path / "tokenizer.json")
    if len(facts) == 1:
        for file in sorted(path.glob("*.safetensors")):
            facts.setdefault("files", []).append({"path": str(file), **_file(file, error, progress)})
    if len(facts) == 1:
        raise FileNotFoundError(f"{path}: contains no config.json, adapter_config.json or .safetensors file")
    return facts


def _file(path: Path, error: bool, progress: Progress) -> dict[str, Any]:
    """One safetensors file: a training checkpoint, an adapter, or tensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file or a directory")
    tensors, metadata = map_tensors(path)
    if "identity" in metadata:
        return {"training": _training(path, tensors)}
    if tensors and all(_MATRIX.fullmatch(name) for name in tensors):
        return {"adapter": {"matrices": _matrices(tensors, None, {}, str(path), error, progress), **_sums(tensors)}}
    weights: dict[str, Any] = tensors
    if any(".quant_state." in name for name in tensors) and not SHARD.fullmatch(path.name):
        weights = _assembled(tensors, {"bnb_4bit_quant_storage": "uint8"}, str(path))
    linears = {name for name, t in weights.items() if _is_matrix(t)} if weights is tensors else set()
    return {"tensors": {"metadata": metadata, **_weights(tensors, weights, linears, error, progress)}}


# ---- a model ---------------------------------------------------------------------------------------------------


def _model(directory: Path, error: bool, progress: Progress) -> dict[str, Any]:
    path = directory / "config.json"
    d = read_json(path)
    facts: dict[str, Any] = {"config": {key: d[key] for key in _SIZES if d.get(key) is not None}}
    facts["config"] |= {"dtype": dtype} if (dtype := d.get("dtype") or d.get("torch_dtype")) else {}
    tensors = _model_tensors(directory)
    weights: dict[str, Any] = tensors
    try:
        quantization = bnb.quantization_config(d, str(path))
        config = config_from_dict(d, str(path))
    except ValueError as fault:
        facts["not_supported"] = str(fault)
        linears = {name for name, t in weights.items() if _is_matrix(t)}
    else:
        if quantization is not None:
            facts["quantization_config"] = quantization
            weights = _assembled(tensors, quantization, str(model_files.weights_file(directory)))
        ours = {name: pretrained.from_file(config, name, _outline(w)) for name, w in weights.items()}
        pretrained.check_found(dict(ours.values()), directory, config)
        wanted = {name + ".weight" for name in config.linears()}
        linears = {name for name, (mine, _) in ours.items() if mine in wanted}
    return {**facts, **_weights(tensors, weights, linears, error, progress)}


def _model_tensors(directory: Path) -> dict[str, Mapped]:
    located = model_files.locate(directory, tuple(STORED_DTYPES.values()))
    return {name: Mapped(path, entry) for name, (path, entry) in located.items()}


def _outline(weight: Mapped | QuantizedTensor) -> Any:
    """An array of the weight's shape, for pretrained.from_file."""
    return weight if isinstance(weight, QuantizedTensor) else np.broadcast_to(np.zeros(()), weight.shape)


def _assembled(tensors: dict[str, Mapped], config: dict[str, Any], where: str) -> dict[str, Any]:
    """{name: QuantizedTensor} of bitsandbytes' parts; other tensors as they are."""
    whole = bnb.assemble(((name, t.array) for name, t in tensors.items()), config, where)
    return {name: w if isinstance(w, QuantizedTensor) else tensors[name] for name, w in whole}


def _is_matrix(weight: Mapped | QuantizedTensor) -> bool:
    return (
        isinstance(weight, Mapped) and weight.entry.dtype in FLOATS and len(weight.shape) == 2 and min(weight.shape) > 1
    )


def _weights(
    tensors: dict[str, Mapped], weights: dict[str, Any], linears: set[str], error: bool, progress: Progress
) -> dict[str, Any]:
    """The tensors as stored, the weights as the model has them, those that are quantised, and NF4's error on the dense
    linears."""
    rows = []
    for name, w in weights.items():
        row: dict[str, Any] = {"name": name, "shape": list(w.shape)}
        if isinstance(w, QuantizedTensor):
            row |= {"dtype": bnb.type_of(name, w), "parameters": w.size, "bytes": w.nbytes}
        else:
            row |= {"dtype": w.dtype, "parameters": int(np.prod(w.shape, dtype=np.int64)), "bytes": w.nbytes}
        rows.append(row)
    facts = _sums(tensors) | {"weights": rows, "parameters": sum(row["parameters"] for row in rows)}
    quantized = {name: w for name, w in weights.items() if isinstance(w, QuantizedTensor)}
    if quantized:
        tables = facts["stored"]["bytes"] - sum(row["bytes"] for row in rows)  # codebooks and the JSON objects
        facts["quantized"] = {**_quantized(quantized), "tables_bytes": tables}
    candidates = [name for name in weights if name in linears and name not in quantized]
    if error and candidates:
        found = (_nf4_error(name, weights[name]) for name in progress(candidates, "quantising"))
        facts["nf4_error"] = sorted(found, key=lambda row: -row["relative_error"])
    return facts


def _quantized(weights: dict[str, QuantizedTensor]) -> dict[str, Any]:
    size = sum(q.size for q in weights.values())
    return {
        "tensors": len(weights),
        "parameters": size,
        "types": sorted({bnb.type_of(name, q) for name, q in weights.items()}),
        "block_sizes": sorted({q.block_size for q in weights.values()}),
        "nested": sorted({q.nested_absmax is not None for q in weights.values()}),
        "packed_bytes": sum(q.packed.nbytes for q in weights.values()),
        "constants_bytes": sum(q.constants_nbytes for q in weights.values()),
        "bits_per_parameter": 8 * sum(q.nbytes for q in weights.values()) / size if size else 0.0,
    }


def _nf4_error(name: str, weight: Mapped) -> dict[str, Any]:
    """The error of NF4, double-quantised in blocks of 64, and its causes: the largest block's absmax, in units of the
    weights' root mean square (rms), and how many weights in a million are above 6 rms."""
    w = weight.read()
    q = quantize(w, name=f"{weight.path}: {name}")
    e = quantization_error(w, q)
    rms = (e.weight_squares / w.size) ** 0.5 if w.size else 0.0
    outliers = sum(int((np.abs(row.astype(np.float32)) > 6 * rms).sum()) for row in w)
    return {
        "name": name,
        "relative_error": e.relative,
        "largest_error": e.largest,
        "rms": rms,
        "largest_absmax": float(q.constants().max(initial=0)) / rms if rms else 0.0,
        "outliers_per_million": 1e6 * outliers / w.size if w.size else 0.0,
    }


def _sums(tensors: dict[str, Mapped]) -> dict[str, Any]:
    """Number and bytes of the stored tensors, by file and by dtype."""
    files: dict[str, int] = {}
    dtypes: dict[str, dict[str, int]] = {}
    for t in tensors.values():
        files[t.path.name] = files.get(t.path.name, 0) + t.nbytes
        entry = dtypes.setdefault(t.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += t.nbytes
    return {
        "stored": {"tensors": len(tensors), "bytes": sum(files.values()), "files": files, "dtypes": dtypes},
    }


# ---- an adapter, a training checkpoint, a tokenizer ------------------------------------------------------------


def _adapter(directory: Path, error: bool, progress: Progress) -> dict[str, Any]:
    path = directory / adapter_files.CONFIG
    d = read_json(path)
    base = d.get("base_model_name_or_path") or ""
    check(f"{path}: base_model_name_or_path", base, TEXT)
    facts: dict[str, Any] = {"config": {key: d[key] for key in _LORA if key in d}, "base": base}
    config = None
    try:
        config = adapter_files.read_config(directory)
    except ValueError as fault:
        facts["not_supported"] = str(fault)
    else:
        facts["scale"] = config.scale
    file = directory / adapter_files.WEIGHTS
    tensors, _ = map_tensors(file)
    weights = _base_weights(BUNDLED if base == "refqlora" else Path(base)) if error and base else {}
    return {
        **facts,
        "matrices": _matrices(tensors, config, weights, str(file), error, progress),
        "others": sorted(name for name in tensors if not _MATRIX.fullmatch(name)),
        **_sums(tensors),
    }


def _base_weights(directory: Path) -> dict[str, Any]:
    """The weights of an adapter's base; none if its directory does not exist."""
    try:
        there = (directory / "config.json").is_file()
    except (OSError, ValueError):  # not a possible file name
        there = False
    if not there:
        return {}
    tensors = _model_tensors(directory)
    config = bnb.quantization_config(read_json(directory / "config.json"), str(directory / "config.json"))
    return tensors if config is None else _assembled(tensors, config, str(model_files.weights_file(directory)))


def _matrices(
    tensors: dict[str, Mapped],
    config: LoraConfig | None,
    base: dict[str, Any],
    where: str,
    error: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Each linear's A and B, the largest change first: their shapes and, with `error`, the Frobenius norms of A, B and
    the change s B A (s: the linear's scale by the config, 1 without a config), also relative to W if `base` has it."""
    pairs: dict[str, dict[str, Mapped]] = {}
    for name, tensor in tensors.items():
        if match := _MATRIX.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
    rows = []
    for linear, pair in progress(list(pairs.items()), "reading"):
        for letter in "AB":
            if letter not in pair:
                raise ValueError(f"{where}: {linear}.lora_{letter}.weight is missing")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{where}: {linear}: A {a.dtype} {a.shape} and B {b.dtype} {b.shape} do not fit")
        row: dict[str, Any] = {"linear": linear, "rank": a.shape[0], "in": a.shape[1], "out": b.shape[0]}
        scale = 1.0 if config is None else config.scale_of(linear)
        row |= {} if config is None else {"scale": scale}
        if error:
            A, B = (finite(f"{where}: {linear}.lora_{x}.weight", pair[x].array, np.float64) for x in "AB")
            # |B A|^2 is the trace of (B^T B)(A A^T): (r, r) matrices, where B A would be as large as W.
            with np.errstate(over="ignore", invalid="ignore"):
                change = scale * float(max(0.0, ((B.T @ B) * (A @ A.T)).sum()) ** 0.5)
            row |= {"norm_A": float(np.linalg.norm(A)), "norm_B": float(np.linalg.norm(B)), "norm_change": change}
            w = base.get(linear + ".weight")
            if w is not None and sorted(w.shape) == sorted((row["out"], row["in"])):  # GPT-2's files have (in, out)
                norm = float(np.linalg.norm(dense(w if isinstance(w, QuantizedTensor) else w.read(), np.dtype("f4"))))
                row["relative_change"] = change / norm if norm else 0.0
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("relative_change", row.get("norm_change", 0.0)))


def _training(path: Path, tensors: dict[str, Mapped]) -> dict[str, Any]:
    facts = {"step": read_step(path), "identity": read_identity(path), **_sums(tensors)}
    for kind in ("param", "adamw"):
        part = [t for name, t in tensors.items() if name.startswith(kind + ".")]
        facts[kind] = {"tensors": len(part), "bytes": sum(t.nbytes for t in part)}
    return facts


def _tokenizer(path: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(path)
    return {
        "type": type(tokenizer.model).__name__,
        "size": tokenizer.get_vocab_size(with_added_tokens=True),
        "added_tokens": len(tokenizer.get_added_tokens_decoder()),
        "bytes": path.stat().st_size,
    }
