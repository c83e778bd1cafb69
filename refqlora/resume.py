"""What survives a kill: the metrics, and a checkpoint of step, trained parameters and the optimiser's moments."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, array_module
from .config import check_shapes
from .files.reading import read_metadata, read_tensors
from .files.writing import write_bytes, write_tensors
from .optim import AdamW
from .quantization import QuantizedTensor

if TYPE_CHECKING:
    from .model import Model
    from .text.dataset import Dataset
    from .training import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"


METRICS = "metrics.jsonl"


def save_checkpoint(path: Path, params: dict[str, Array], optimizer: AdamW, identity: dict[str, Any]) -> None:
    tensors = {f"param.{name}": p for name, p in params.items()}
    tensors |= {f"adamw.{name}": x for name, x in optimizer.state_arrays().items()}
    write_tensors(path, tensors, {"identity": json.dumps(identity), "step": str(optimizer.state["step"])})


def refuse_unfinished(path: Path) -> None:
    """Raise ValueError if a run that is not asked to resume would write over one that has not ended."""
    if path.is_file():
        metadata = read_metadata(path)
        step, steps = int(metadata.get("step", 0)), json.loads(metadata.get("identity", "{}")).get("steps", 0)
        if step < steps:
            raise ValueError(f"{path}: holds a run stopped at step {step} of {steps}: resume it, or remove the file")


def load_checkpoint(path: Path, params: dict[str, Array], optimizer: AdamW, identity: dict[str, Any]) -> int:
    """Copy parameters and moments in; -> the number of steps that were made."""
    stored = read_metadata(path).get("identity")
    if stored is None:
        raise ValueError(f"{path}: is not a checkpoint of a training run")
    found = json.loads(stored)
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path}: is of another run: {key} was {found.get(key)} there and is {value} here; "
                "resume with the same settings and data, or start anew in another directory"
            )
    tensors = dict(read_tensors(path))
    state = {name.removeprefix("adamw."): tensors.pop(name) for name in list(tensors) if name.startswith("adamw.")}
    check_shapes(tensors, {f"param.{name}": p.shape for name, p in params.items()}, str(path))
    try:
        optimizer.load_state(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, p in params.items():
        p[...] = array_module(p).asarray(tensors[f"param.{name}"])
    return optimizer.state["step"]


def identity(model: Model, dataset: Dataset, config: TrainingConfig) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, or its bits would not be those of one run.

    JSON values: the settings that shape the numbers, the model's and the adapter's configs, and checksums of the
    frozen weights and of the data.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("recompute", "eval_every", "checkpoint_every")}
    adapter = None if model.active is None else asdict(model.adapters[model.active].config)
    frozen = 0
    if adapter is not None:
        weights = model.params | model.adapters[model.active].residual
        for name in sorted(weights):
            param = weights[name]
            for x in (param.packed, param.constants()) if isinstance(param, QuantizedTensor) else (param,):
                frozen = zlib.crc32(np.ascontiguousarray(x).view(np.uint8), frozen)
    found = {
        **settings,
        "model": asdict(model.config),
        "adapter": adapter,
        "the weights' checksum": frozen,
        "the data's checksum": dataset.checksum,
    }
    return json.loads(json.dumps(found))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to the first line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
