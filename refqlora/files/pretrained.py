"""A model's directory to a config and parameters, and back, for `Model.from_pretrained` and `Model.save_pretrained`.
Names and layouts of tensors are translated here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import as_dtype, check, finite, one_of
from ..codebooks import CODEBOOKS
from ..config import Config, check_shapes
from ..lora import Weight
from ..quantization import QuantizedTensor
from ..quantization import quantize as to_4_bits  # `quantize` is an option's name here
from . import bnb, model_files
from .config_json import config_to_dict, read_config, read_generation_config
from .hub import model_directory
from .reading import FLOATS
from .writing import target, together, write_json


def load(model: str | Path, quantize: str | None, dtype: Any) -> tuple[Config, dict[str, Weight]]:
    """The config and parameters of `model`, a directory or a hub's id, as `Model.from_pretrained` describes them.

    A tensor that is missing, unexpected or misshapen is found in the files' headers before any tensor is read, but in
    bitsandbytes' files, whose weights come in parts, only at the end.
    """
    if quantize is not None:
        check("quantize", quantize, one_of(list(CODEBOOKS)))
    dtype = as_dtype("dtype", dtype, FLOATS)
    path = model_directory(model)
    (config, d), where = read_config(path), str(path / "config.json")
    if eos := read_generation_config(path).get("eos_token_id"):
        config = replace(config, eos_token_id=eos if len(eos) > 1 else eos[0])
    stored = bnb.quantization_config(d, where)
    if stored is not None and quantize not in (None, stored["bnb_4bit_quant_type"]):
        raise ValueError(
            f"{where}: the model is quantised to {stored['bnb_4bit_quant_type']} already: give quantize=None or "
            "--no-quantize"
        )

    if stored is None:
        check_tensors(path, config)
    linears = {name + ".weight" for name in config.linears()}
    params: dict[str, Weight] = {}
    for name, tensor in bnb.read_model(path, stored):
        name, tensor = from_file(config, name, tensor)
        if isinstance(tensor, QuantizedTensor):
            if name not in linears | {"lm_head.weight"}:
                raise ValueError(
                    f"{model_files.weights_file(path)}: {name} is quantised, but only linears may be quantised"
                )
            params[name] = tensor
        elif quantize and stored is None and name in linears:
            params[name] = to_4_bits(tensor, CODEBOOKS[quantize], name=f"{path}: {name}")
        elif (quantize or stored) and tensor.ndim > 1 and tensor.dtype.itemsize == 2:
            params[name] = finite(f"{path}: {name}", tensor)
        else:
            params[name] = np.ascontiguousarray(finite(f"{path}: {name}", tensor, dtype))
        del tensor  # before the next is read
    check_found(params, path, config)
    if config.tied and "lm_head.weight" in params:
        copy, embedding = params.pop("lm_head.weight"), np.asarray(params[config.head])
        if isinstance(copy, QuantizedTensor) or not all(map(np.array_equal, copy, embedding)):
            raise ValueError(f"{path}: lm_head.weight differs from the embedding, although the config ties them")
    return config, {name: params[name] for name in config.shapes()}


def save(
    path: str | Path,
    config: Config,
    params: Mapping[str, Weight],
    dtype: Any,
    max_shard_size: int | str = model_files.SHARD,
    base: Path | None = None,
) -> None:
    """Write config.json and the weights, as `Model.save_pretrained` describes it.

    base: the directory of the model that this one was made from, with the same shapes. Its tokenizer and other
    companions (`model_files.COMPANIONS`) are copied, and only the dtype and the quantization_config of its config.json
    are changed. Raises ValueError that names a tensor with numbers too large for `dtype`.
    """
    path = Path(path)
    dtype = as_dtype("dtype", dtype, FLOATS)
    shard_bytes = model_files.parse_size(max_shard_size)
    quantization = bnb.config_of(params, config.linears(), dtype)
    if base is None:
        d = config_to_dict(config, dtype)
    else:
        d = read_config(base)[1]
        d.pop("quantization_config", None)
        d |= dict.fromkeys(d.keys() & {"dtype", "torch_dtype"} or {"dtype"}, np.dtype(dtype).name)
    tensors = bnb.disassemble(dict(to_file(config, *item) for item in params.items()), dtype, str(target(path)))
    with together(path, last="config.json", instead_of=model_files.WEIGHT_FILES) as new:
        if base is not None:
            model_files.copy_companions(base, new)
        model_files.write_model(new, tensors, shard_bytes)
        write_json(new / "config.json", d | quantization)


def check_tensors(path: Path, config: Config) -> None:
    """`check_found` for a dense model's files; only their headers are read."""
    check_found(dict(from_file(config, *item) for item in model_files.outline(path)), path, config)


def check_found(found: Mapping[str, Any], path: Path, config: Config) -> None:
    """Raise ValueError that names the first tensor which is missing, unexpected or misshapen."""
    expected = config.shapes()
    if config.tied and "lm_head.weight" in found:  # some writers keep a copy of the embedding
        expected["lm_head.weight"] = expected[config.head]
    check_shapes(found, expected, str(path))


# ---- names and layout ------------------------------------------------------------------------------------------


def from_file(config: Config, name: str, tensor: Weight) -> tuple[str, Weight]:
    """One tensor of a model file -> its name and layout here.

    Names here are those of the model with its output head; files saved without the head lack a prefix. Linear weights
    here are (out, in); GPT-2's files hold the transpose, except of quantised ones.
    """
    architecture = config.architecture
    parts = (architecture.embedding, architecture.positions, architecture.layers, architecture.final_norm)
    if name.startswith(tuple(part.removeprefix(architecture.prefix) for part in parts if part)):
        name = architecture.prefix + name
    return name, _turned(config, name, tensor)


def to_file(config: Config, name: str, tensor: Weight) -> tuple[str, Weight]:
    """A parameter -> its name and layout in a file: the inverse of `from_file`."""
    return name, _turned(config, name, tensor)


def _turned(config: Config, name: str, tensor: Weight) -> Weight:
    linear = name.removesuffix(".weight")
    if not config.architecture.conv1d or linear == name or linear not in config.linears():
        return tensor
    return tensor.T if isinstance(tensor, np.ndarray) else tensor
