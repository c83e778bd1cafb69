"""What survives a kill: the metrics, and a checkpoint of step, trained parameters and the optimiser's moments.

Both files are replaced atomically, and the metrics reach the disk before the checkpoint does: however a run ends, the
metrics contain at least the rows of the checkpoint's steps.
"""

from __future__ import annotations

import json
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, array_module
from .checks import finite, shown
from .config import check_shapes
from .files.reading import read_metadata, read_tensors
from .files.writing import locked, naming, write_bytes, write_tensors
from .optim import AdamW, check_like
from .quantization import QuantizedTensor

if TYPE_CHECKING:
    from .model import Model
    from .text.dataset import Dataset
    from .training import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


@dataclass
class Run:
    """A run of training: a row of metrics for each step made so far, and the files if there is a directory `out`."""

    params: dict[str, Array]
    optimizer: AdamW
    identity: dict[str, Any]
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def record(self, row: dict[str, Any], save: bool) -> None:
        """Append the row, the last of `rows`, to the metrics file, and with `save` write the checkpoint."""
        with uninterrupted():
            if self.out is not None:
                path = self.out / METRICS
                with naming(path), open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if save:
                self.save()

    def save(self) -> None:
        """Write the checkpoint. Raises FloatingPointError, and writes nothing, if a number in it is not finite."""
        if fault := self.optimizer.fault():
            raise FloatingPointError(fault)
        if self.out is not None:
            write_rows(self.out / METRICS, self.rows)  # to disk first: they must not lag behind the checkpoint
            save_checkpoint(self.out / CHECKPOINT, self.params, self.optimizer, self.identity)


@contextmanager
def recorded(run: Run, resume: bool) -> Iterator[None]:
    """Begin the run, or continue from its checkpoint. Ctrl-C writes one; the KeyboardInterrupt's message names it.

    The directory is locked meanwhile: two processes in it would overwrite each other's files. Raises what `locked`,
    `check_start`, `load_checkpoint` and `read_rows` raise.
    """
    if run.out is None:
        yield
        return
    path = run.out / CHECKPOINT
    with locked(run.out):
        check_start(run.out, resume)
        if resume:
            step = load_checkpoint(path, run.params, run.optimizer, run.identity)
            run.rows = read_rows(run.out / METRICS, step)
        else:
            path.unlink(missing_ok=True)  # a finished run's, which must not be resumed in place of this one
        write_rows(run.out / METRICS, run.rows)
        try:
            yield
        except KeyboardInterrupt:
            with uninterrupted():
                run.save()
            step, steps = run.optimizer.state["step"], run.identity["steps"]
            raise KeyboardInterrupt(f"step {step} of {steps} is saved in {path}") from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no interrupt finds the state between two steps."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never reaches it, and it may set no handler
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *received: held.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
        if held and callable(before):
            before(*held[0])


def check_start(out: Path, resume: bool) -> None:
    """Raise FileNotFoundError if `out` has no checkpoint to resume; ValueError if a new run would overwrite one that is
    not finished."""
    path = out / CHECKPOINT
    if resume:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file: there is no run to resume")
    elif path.is_file():
        step, steps = read_step(path), read_identity(path).get("steps")
        if isinstance(steps, int) and step < steps:
            where = f"at step {step} of {shown(steps)}"
            raise ValueError(f"{path}: holds an unfinished run, {where}: resume it, or remove the file")


def save_checkpoint(path: Path, params: dict[str, Array], optimizer: AdamW, identity: dict[str, Any]) -> None:
    """Write a checkpoint, which `load_checkpoint` reads."""
    tensors = {f"param.{name}": p for name, p in params.items()}
    tensors |= {f"adamw.{name}": x for name, x in optimizer.state_arrays().items()}
    write_tensors(path, tensors, {"identity": json.dumps(identity), "step": str(optimizer.state["step"])})


def load_checkpoint(path: Path, params: dict[str, Array], optimizer: AdamW, identity: dict[str, Any]) -> int:
    """Copy a checkpoint into the parameters and the moments -> the number of steps made.

    Raises ValueError, before anything is changed, if it belongs to another run or is damaged.
    """
    for name, there, here in _differences(read_identity(path), identity):
        raise ValueError(
            f"{path}: is of another run: {name} was {shown(there)} there and is {shown(here)} here; "
            "resume with the same settings and data, or start again in another directory"
        )
    tensors = dict(read_tensors(path))
    state = {name.removeprefix("adamw."): tensors.pop(name) for name in list(tensors) if name.startswith("adamw.")}
    check_shapes(tensors, {f"param.{name}": p.shape for name, p in params.items()}, str(path))
    try:
        for name, p in params.items():
            check_like(f"param.{name}", tensors[f"param.{name}"], p)
            finite(f"param.{name}", tensors[f"param.{name}"])
        optimizer.load_state(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, p in params.items():
        p[...] = array_module(p).asarray(tensors[f"param.{name}"])
    return optimizer.state["step"]


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value found, value expected) for each difference; of two objects, for each difference within them."""
    for key in expected:
        there, here = found.get(key), expected[key]
        if isinstance(there, dict) and isinstance(here, dict):
            inner = _differences(there, here | dict.fromkeys(there.keys() - here))
            yield from ((f"{key}'s {name}", x, y) for name, x, y in inner)
        elif there != here:
            yield key, there, here


def read_identity(path: Path) -> dict[str, Any]:
    """The settings and checksums of a checkpoint's run. Raises ValueError that names the file."""
    text = read_metadata(path).get("identity")
    if text is None:
        raise ValueError(f"{path}: is not a checkpoint of a training run: its metadata have no identity")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: identity in the metadata: expected a JSON object, got {shown(text)}")
    return found


def read_step(path: Path) -> int:
    """The step in a checkpoint's metadata, which can be read without its tensors."""
    text = read_metadata(path).get("step", "")
    if not (text.isascii() and text.isdecimal()) or len(text) > 20:
        raise ValueError(f"{path}: step in the metadata: expected a number, got {shown(text)}")
    return int(text)


def identity(model: Model, dataset: Dataset, config: TrainingConfig) -> dict[str, Any]:
    """What must be the same when a run is resumed, for the result to have the bits of an uninterrupted run.

    JSON values: the settings that affect the numbers, the model's and the adapter's configs, and checksums of the
    frozen weights and of the data.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("recompute", "eval_every", "checkpoint_every")}
    active = None if model.active is None else model.adapters[model.active]
    frozen = 0
    if active is not None:
        for _, param in sorted((model.params | active.residual).items()):
            for x in (param.packed, param.constants()) if isinstance(param, QuantizedTensor) else (param,):
                frozen = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, frozen)
    found = {
        **settings,
        "model": asdict(model.config),
        "adapter": None if active is None else asdict(active.config),
        "the weights' checksum": frozen,
        "the data's checksum": dataset.checksum,
    }
    return json.loads(json.dumps(found))


_NEEDED = ("loss", "lr", "grad_norm", "tokens", "seconds")  # the numbers in every row


def read_rows(path: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of the first `steps` steps. Later ones are ignored: a kill may have cut the last one short.

    Raises ValueError that names the file and the line if a row is missing or not valid.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    while len(rows) < steps:
        number = len(rows) + 1
        try:
            row = json.loads(lines[len(rows)])
        except (IndexError, ValueError, RecursionError):
            row = None
        if not (isinstance(row, dict) and row.get("step") == number and all(_is_number(row, key) for key in _NEEDED)):
            raise ValueError(f"{path}:{number}: expected the row of step {number}: {CHECKPOINT} is at step {steps}")
        rows.append(row)
    return rows


def _is_number(row: dict[str, Any], key: str) -> bool:
    return type(row.get(key)) in (int, float)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the metrics file by these rows."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
