"""Every check of `refqlora parity`, and how one is run: live where its libraries are installed, else as recorded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_metadata, read_tensors
from . import decoders, exchange, quantization
from .differences import Outcome
from .settings import ADAPTERS, ARCHITECTURES

VECTORS = Path(__file__).parent / "vectors.safetensors"  # quantisation and LoRA: README.md says what each tensor is
RECORDED = Path(__file__).parent / "recorded.safetensors"  # models and training, by the names of the checks
SIZES = {"small": 100_000, "medium": 1_000_000, "large": 20_000_000}  # weights
INSTALL = "pip install 'refqlora[parity]'"

Observed = dict[str, np.ndarray]
BITS = 0.0  # the bound where every bit must agree


@dataclass(frozen=True)
class Check:
    """What is compared with which libraries, how far it may be off, and the two halves of the comparison.

    observe  (seed, size) -> what the libraries make of random tensors of about `size` weights
    compare  what was observed -> the differences; needs no library
    record   the file that has a recording of it, if there is one
    """

    name: str
    what: str
    libraries: tuple[str, ...]
    bound: float
    observe: Callable[[int, int], Observed]
    compare: Callable[[Observed], Outcome]
    record: Path | None = RECORDED


def _checks() -> Iterator[Check]:
    bnb, q = ("bitsandbytes",), quantization
    yield Check(
        "codebooks", "NF4, FP4 and both dynamic maps", bnb, BITS, q.observe_codebooks, q.compare_codebooks, VECTORS
    )
    yield Check(
        "packing", "packed codes and absmax of NF4 and FP4", bnb, BITS, q.observe_4bit, q.compare_packing, VECTORS
    )
    yield Check(
        "dequantisation", "weights from packed codes", bnb, BITS, q.observe_4bit, q.compare_dequantisation, VECTORS
    )
    yield Check(
        "dequantised-rows",
        "the same where rows do not fill blocks, by the definition",
        bnb,
        BITS,
        q.observe_rows,
        q.compare_rows,
    )
    yield Check(
        "constants-binned",
        'double quantisation, nested="bitsandbytes"',
        bnb,
        BITS,
        q.observe_8bit,
        q.compare_binned,
        VECTORS,
    )
    yield Check(
        "constants-nearest",
        'double quantisation, nested="nearest", by the definition',
        bnb,
        BITS,
        q.observe_8bit,
        q.compare_nearest,
        VECTORS,
    )
    yield Check(
        "torchao", "NF4 by its table, its constants", ("torchao",), BITS, q.observe_torchao, q.compare_torchao
    )
    yield Check(
        "adamw",
        f"{decoders.STEPS} updates: parameters and moments",
        ("torch",),
        2**-22,
        decoders.observe_adamw,
        decoders.compare_adamw,
    )

    peft, compare = ("transformers", "peft"), decoders.compare_decoder
    what = "logits, loss, adapter gradients"
    for name in ARCHITECTURES:
        yield Check(name, what, peft, 1e-5, partial(decoders.observe_decoder, architecture=name), compare)
    for name, adapter in ADAPTERS.items():
        yield Check(name, what, peft, 1e-5, partial(decoders.observe_decoder, adapter=adapter), compare)
    yield Check(
        "full", "logits, loss, gradients of all parameters", ("transformers",), 1e-5, decoders.observe_full, compare
    )
    what = f"losses of {decoders.STEPS} steps, the adapter after them"
    train, four = decoders.compare_training, (*peft, "bitsandbytes")
    yield Check("lora-training", what, (*peft, "torch"), 1e-5, decoders.observe_training, train)
    yield Check("qlora-training", f"{what}, from a 4-bit checkpoint", four, 1e-5, decoders.observe_qlora, train)

    x, written = exchange, exchange.compare_exchange
    yield Check("model-files", "written here, read there", ("transformers",), 1e-5, x.observe_model_files, written, None)
    yield Check("adapter-files", "written here, read there", peft, 1e-5, x.observe_adapter_files, written, None)
    four = ("transformers", "bitsandbytes")
    yield Check("4bit-files", "written here, read there", four, 1e-5, x.observe_4bit_files, written, None)


CHECKS = tuple(_checks())

OK, DIFFERS, FAILED, SKIPPED = "OK", "DIFFERS", "FAILED", "skipped"


@dataclass(frozen=True)
class Line:
    """The outcome of one check. `largest` is an element count where `bound` is 0, else relative; None if not known."""

    name: str
    what: str
    against: str
    status: str
    bound: float
    largest: float | None = None
    elements: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        shown = [f"{self.name:<17}", f"{self.what} against {self.against}" if self.against else self.what]
        if self.largest is not None and self.bound == BITS:
            shown += [f"{int(self.largest):,} of {self.elements:,} differ", "no bit may"]
        elif self.largest is not None:
            shown += [f"{self.largest:.1e}", f"bound {self.bound:.1e}"]
        shown.append(self.status if not self.note else f"{self.status}: {self.note}")
        return " · ".join(shown)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(check: Check, seed: int = 0, size: int = SIZES["medium"], recorded: bool = False) -> Line:
    """Run one check: never raises for what a library or the engine does, but says so in the line."""
    missing = [name for name in check.libraries if not _version(name)]
    live = not recorded and not missing
    if not live and check.record is None:
        why = "there is no recording of it" if recorded else f"{missing[0]} is not installed ({INSTALL})"
        return Line(check.name, check.what, "", SKIPPED, check.bound, note=why)
    line = partial(Line, check.name, check.what, "")
    try:
        if live:
            line = partial(Line, check.name, check.what, " + ".join(f"{n} {_version(n)}" for n in check.libraries) + " live")
            with _quiet():
                observed = check.observe(seed, size)
        else:
            versions = read_metadata(check.record)
            names = " + ".join(f"{name} {versions[name]}" for name in check.libraries)
            line = partial(Line, check.name, check.what, f"what was recorded from {names}")
            observed = read_recorded(check)
    except Exception as error:
        return line(FAILED, check.bound, note=f"{'the libraries' if live else 'the recording'}: {_words(error)}")
    try:
        outcome = check.compare(observed)
    except Exception as error:
        return line(FAILED, check.bound, note=f"refqlora: {_words(error)}")
    largest = sum(outcome.parts.values()) if check.bound == BITS else max(outcome.parts.values())
    ok = largest <= check.bound
    note = outcome.note if ok and check.bound == BITS else ""
    if not ok:
        worst = max(outcome.parts, key=outcome.parts.__getitem__)
        note = f"mostly {worst}" if check.bound == BITS else f"worst in {worst}"
        note += f"; {outcome.note}" if outcome.note else ""
    return line(OK if ok else DIFFERS, check.bound, float(largest), outcome.elements, outcome.parts, note)


def read_recorded(check: Check) -> Observed:
    """What was observed when the recording was made."""
    tensors = dict(read_tensors(check.record))
    if check.record == VECTORS:
        return tensors
    same = dict(pair.split(" = ") for pair in read_metadata(check.record)["same"].split("\n"))
    tensors |= {name: tensors[stored] for name, stored in same.items()}
    return decoders.group(tensors, check.name)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _words(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libraries print, log and warn of out of the report, and gives them one thread: the models are small."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            import torch

            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)
    finally:
        logging.disable(logging.NOTSET)
