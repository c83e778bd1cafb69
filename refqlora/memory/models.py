"""Models by name: their numbers, without their weights."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import adapter_shapes
from ..checks import cut, shown
from ..config import Config
from ..files.config_json import config_from_dict, read_config
from ..files.hub import BUNDLED, model_directory
from ..files.reading import read_json
from ..lora_config import LoraConfig
from ..quantization import quantized_nbytes

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class KnownModel:
    """A model that is built in.

    source: its id on the Hugging Face hub, or the paper and table with its numbers. parameters: how many it has as
    published, a number where the exact count is, otherwise the digits that are: "175B". config: its config.json.
    """

    name: str
    source: str
    parameters: int | str
    config: Mapping[str, Any]


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """{name: model}, the families from the oldest to the newest, each from the smallest to the largest."""
    file = json.loads((BUNDLED / "models.json").read_text(encoding="utf-8"))
    return {name: KnownModel(name, **fields) for name, fields in file.items()}


def model_config(model: str | Path) -> Config:
    """The numbers of a model: a name in `known_models()`, a config.json, a directory that contains one, or a model's id
    on the Hugging Face hub, of which only config.json is downloaded.

        >>> model_config("llama-2-7b").layers
        32

    Raises ValueError, FileNotFoundError or OSError with one line that says what is wrong; for a name that is not known
    it gives the nearest ones that are.
    """
    known, path = known_models(), Path(model)
    name = str(model).lower()
    if name in known:
        return _config(known[name].config, name)
    if path.is_file():
        return _config(read_json(path), str(path))
    if path.is_dir() or "/" in str(model):
        directory = model_directory(model, weights=False)
        config = directory / "config.json"
        return _config(read_json(config), str(model)) if config.is_file() else read_config(directory)[0]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or list(known)
    raise FileNotFoundError(
        f"{cut(str(model), 60)}: no such model, file or directory; known models: {', '.join(near)}; any other is given "
        "by its config.json, its directory or its id on the Hugging Face hub, org/name"
    )


def parameter_count(config: Config) -> int:
    """P, all parameters of a model; a head that is the embedding counts once."""
    return sum(math.prod(shape) for shape in config.shapes().values())


def adapter_size(config: Config, lora: LoraConfig) -> int:
    """Parameters of an adapter: on each linear that `lora` matches, r (in + out) of A and B, and DoRA's magnitudes."""
    shapes = adapter_shapes(lora, lora.matches(config.linears()), config.shapes())
    return sum(map(math.prod, shapes.values()))


def linear_sizes(config: Config) -> list[int]:
    """Elements of each linear's weight: what QLoRA quantises."""
    shapes = config.shapes()
    return [math.prod(shapes[name + ".weight"]) for name in config.linears()]


def base_bytes(config: Config, double_quant: bool = True, itemsize: int = 2) -> int:
    """The base as QLoRA holds it: linears in 4 bits with their constants, all else at `itemsize` bytes."""
    sizes = linear_sizes(config)
    rest = parameter_count(config) - sum(sizes)
    return sum(quantized_nbytes(n, double_quant=double_quant) for n in sizes) + itemsize * rest


def _config(d: Mapping[str, Any], where: str) -> Config:
    """config_from_dict, after a mixture of experts is refused as what it is."""
    experts = {key: d[key] for key in _EXPERTS if isinstance(d.get(key), int) and d[key] > 1}
    if experts:
        key, number = next(iter(experts.items()))
        raise ValueError(
            f"{where}: model_type {shown(d.get('model_type'))} is a mixture of experts ({key}: {number}), which is not "
            "supported"
        )
    return config_from_dict(d, where)
