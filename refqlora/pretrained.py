"""A model's directory, as transformers writes it, to a config and parameters and back: what `Model.from_pretrained` and
`Model.save_pretrained` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import architectures, bnb, checkpoint, shards
from .codebooks import CODEBOOKS
from .config import Config
from .files import write_json
from .hub import model_directory
from .lora import Weight
from .quantize import QuantizedTensor
from .quantize import quantize as to_4_bits  # `quantize` is an option's name here


def load(model: str | Path, quantize: str | None, dtype: Any) -> tuple[Config, dict[str, Weight]]:
    """The config and parameters of `model`, a directory or a hub's id, as `Model.from_pretrained` describes them.

    What is missing, unexpected or misshapen is found in the files' headers, before the first tensor is read (in
    bitsandbytes' files, whose weights come in parts, at the end).
    """
    if quantize not in (None, *CODEBOOKS):
        raise ValueError(f"quantize must be None or one of {', '.join(CODEBOOKS)}, not {quantize!r}")
    path = model_directory(model)
    d, where = checkpoint.read_config(path), str(path / "config.json")
    config = Config.from_dict(d, where)
    if eos := checkpoint.read_generation_config(path).get("eos_token_id"):
        config = replace(config, eos_token_id=eos if len(eos) > 1 else eos[0])
    stored = bnb.quantization_config(d, where)
    if stored is not None and quantize not in (None, stored["bnb_4bit_quant_type"]):
        raise ValueError(f"{where}: is quantised already, not to {quantize}: give quantize=None or --no-quantize")

    shapes, linears = config.shapes(), {name + ".weight" for name in config.linears()}
    expected = shapes | ({"lm_head.weight": shapes[config.head]} if config.tied else {})  # some writers keep a copy
    if stored is None:
        outline = dict(architectures.from_file(config, *item) for item in checkpoint.outline(path))
        _check(outline, expected, config.tied, path)
    params: dict[str, Weight] = {}
    for name, tensor in bnb.read_model(path, stored):
        name, tensor = architectures.from_file(config, name, tensor)
        if isinstance(tensor, QuantizedTensor):
            if name not in linears | {"lm_head.weight"}:
                raise ValueError(
                    f"{checkpoint.weights_file(path)}: {name} is quantised, which only a linear's weight may be"
                )
            params[name] = tensor
        elif quantize and stored is None and name in linears:
            params[name] = to_4_bits(tensor, CODEBOOKS[quantize], name=f"{path}: {name}")
        elif (quantize or stored) and tensor.ndim > 1 and tensor.dtype.itemsize == 2:
            params[name] = tensor
        else:
            params[name] = np.ascontiguousarray(tensor, dtype)
        del tensor  # before the next is read
    _check(params, expected, config.tied, path)
    copy = params.pop("lm_head.weight") if config.tied and "lm_head.weight" in params else None
    same = not isinstance(copy, QuantizedTensor) and (
        copy is None or all(map(np.array_equal, copy, params[config.head]))
    )
    if not same:
        raise ValueError(f"{path}: lm_head.weight differs from the embedding, to which the config ties it")
    return config, {name: params[name] for name in shapes}


def save(path: str | Path, config: Config, params: Mapping[str, Weight], dtype: Any, max_shard_size: int | str) -> None:
    """Write config.json and the weights, as `Model.save_pretrained` describes it."""
    path = Path(path)
    shard_bytes = shards.parse_size(max_shard_size)
    d = config.to_dict(dtype) | bnb.config_of(params, config.linears(), dtype)
    path.mkdir(parents=True, exist_ok=True)
    tensors = bnb.disassemble(dict(architectures.to_file(config, *item) for item in params.items()), dtype)
    shards.write_model(path, tensors, shard_bytes)
    write_json(path / "config.json", d)


def _check(found: Mapping[str, Any], expected: dict[str, tuple[int, ...]], tied: bool, path: Path) -> None:
    if tied and "lm_head.weight" not in found:
        expected = {name: shape for name, shape in expected.items() if name != "lm_head.weight"}
    checkpoint.check_shapes(found, expected, str(path))
