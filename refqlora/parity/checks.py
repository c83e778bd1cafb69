"""Every check of `refqlora parity`, and how to run one: live if its libraries are installed, else with a recording."""

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

from ..files.reading import read_metadata, read_tensors
from . import decoders, exchange, quantization
from .differences import Observed, Outcome, in_one_line
from .settings import ADAPTERS, ARCHITECTURES

VECTORS = Path(__file__).parent / "vectors.safetensors"  # quantisation and LoRA: README.md explains each tensor
RECORDED = Path(__file__).parent / "recorded.safetensors"  # models and training, under the names of the checks
SIZES = {"small": 100_000, "medium": 1_000_000, "large": 20_000_000}  # weights
INSTALL = "pip install 'refqlora[parity]'"

BITS = 0.0  # the bound if every bit must agree
BOUND = 1e-5  # for float32 results, relative to a tensor's largest element


@dataclass(frozen=True)
class Check:
    """What is compared with which libraries, the bound on the difference, and the two halves of the comparison.

    observe  (seed, size) -> the libraries' results for random tensors of about `size` weights
    compare  those results -> the differences from ours; needs no library
    record   the file with a recording of the results, or None
    """

    name: str
    what: str
    libraries: tuple[str, ...]
    bound: float
    observe: Callable[[int, int], Observed]
    compare: Callable[[Observed], Outcome]
    record: Path | None = RECORDED


def _quantisation() -> Iterator[Check]:
    def check(
        name: str, what: str, observe: Any, compare: Any, record: Path = VECTORS, by: str = "bitsandbytes"
    ) -> Check:
        return Check(name, what, (by,), BITS, observe, compare, record)

    q, nested = quantization, "double quantisation, nested="
    rows = "the same where rows do not fill blocks, by the definition;"
    yield check("codebooks", "NF4, FP4, both dynamic maps", q.observe_codebooks, q.compare_codebooks)
    yield check("packing", "codes and absmax, NF4 and FP4", q.observe_4bit, q.compare_packing)
    yield check("dequantisation", "weights of their codes", q.observe_4bit, q.compare_dequantisation)
    yield check("dequantised-rows", rows, q.observe_rows, q.compare_rows, RECORDED)
    yield check("constants-binned", f'{nested}"bitsandbytes"', q.observe_8bit, q.compare_binned)
    yield check("constants-nearest", f'{nested}"nearest", by the definition;', q.observe_8bit, q.compare_nearest)
    what = "NF4 by its own table, its 8-bit constants"
    yield check("torchao", what, q.observe_torchao, q.compare_torchao, RECORDED, "torchao")


def _decoders() -> Iterator[Check]:
    d, steps = decoders, f"losses of {decoders.STEPS} steps, the adapter after them"
    hf, lora, qlora = ("transformers",), ("transformers", "peft"), ("transformers", "peft", "bitsandbytes")
    adam = f"parameters and moments after {decoders.STEPS} updates"
    yield Check("adamw", adam, ("torch",), 2**-22, d.observe_adamw, d.compare_adamw)
    what = "logits, loss, adapter gradients"
    for name in ARCHITECTURES:
        yield Check(name, what, lora, BOUND, partial(d.observe_decoder, architecture=name), d.compare_decoder)
    for name, adapter in ADAPTERS.items():
        yield Check(name, what, lora, BOUND, partial(d.observe_decoder, adapter=adapter), d.compare_decoder)
    what = "logits, loss, all parameters' gradients"
    yield Check("full-finetuning", what, hf, BOUND, d.observe_full, d.compare_decoder)
    yield Check("lora-training", steps, lora, BOUND, d.observe_training, d.compare_training)
    what = f"its 4-bit checkpoint, {steps}, in train mode (in eval mode it computes in bfloat16);"
    yield Check("qlora-training", what, qlora, BOUND, d.observe_qlora, d.compare_training)


def _exchange() -> Iterator[Check]:
    x, what, hf = exchange, "saved here, loaded there: tensors and logits", ("transformers",)
    for name, libraries, observe in (
        ("model-files", hf, x.observe_model_files),
        ("adapter-files", (*hf, "peft"), x.observe_adapter_files),
        ("4bit-files", (*hf, "bitsandbytes"), x.observe_4bit_files),
    ):
        yield Check(name, what, libraries, BOUND, observe, x.compare_exchange, None)


CHECKS = (*_quantisation(), *_decoders(), *_exchange())

OK, DIFFERS, FAILED, SKIPPED = "OK", "DIFFERS", "FAILED", "skipped"


@dataclass(frozen=True)
class Line:
    """The outcome of one check. largest: the largest relative difference, or the number of elements that differ if
    `bound` is 0; None if not known."""

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
            shown += [f"{self.largest:,.0f} of {self.elements:,} differ", "no bit may"]
        elif self.largest is not None:
            shown += [f"{self.largest:.1e}", f"bound {self.bound:.1e}"]
        return " · ".join([*shown, f"{self.status}: {self.note}" if self.note else self.status])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(check: Check, seed: int = 0, size: int = SIZES["medium"], recorded: bool = False) -> Line:
    """Run one check. Errors of a library or the engine are not raised, but reported in the line."""
    missing = [name for name in check.libraries if not installed(name)]
    live = not recorded and not missing
    if not live and check.record is None:
        why = "it has no recording" if recorded else f"{missing[0]} is not installed ({INSTALL})"
        return Line(check.name, check.what, "", SKIPPED, check.bound, note=why)
    line = partial(Line, check.name, check.what, _against(check, live), bound=check.bound)
    try:
        if live:
            with quiet():
                observed = check.observe(seed, size)
        else:
            observed = read_recorded(check)
    except Exception as error:
        who = "" if check.record is None else "the libraries: " if live else "the recording: "
        return line(FAILED, note=who + in_one_line(error))
    try:
        with np.errstate(all="ignore"):
            outcome = check.compare(observed)
    except Exception as error:
        return line(FAILED, note=f"refqlora: {in_one_line(error)}")

    exact = check.bound == BITS
    parts = {name: np.inf if np.isnan(x) else float(x) for name, x in outcome.parts.items()}
    worst = max(parts, key=parts.__getitem__)
    largest = sum(parts.values()) if exact else parts[worst]
    ok = largest <= check.bound
    notes = ([] if ok else [f"most in {worst}"]) + ([outcome.note] if outcome.note and (exact or not ok) else [])
    note = "; ".join(notes)
    return line(OK if ok else DIFFERS, largest=largest, elements=outcome.elements, parts=parts, note=note)


def _against(check: Check, live: bool) -> str:
    versions = {name: installed(name) for name in check.libraries} if live else read_metadata(_recording(check))
    names = " + ".join(f"{name} {versions[name]}" for name in check.libraries)
    return f"{names} live" if live else f"recorded {names}"


def _recording(check: Check) -> Path:
    if check.record is None:
        raise ValueError(f"{check.name}: there is no recording of it")
    return check.record


def read_recorded(check: Check) -> Observed:
    """The libraries' results for a check, from its recording."""
    path = _recording(check)
    tensors = dict(read_tensors(path))
    if path == VECTORS:
        return tensors
    same = [pair.split(" = ") for pair in read_metadata(path)["same"].split("\n")]
    tensors |= {name: tensors[stored] for name, stored in same}
    return decoders.group(tensors, check.name)


def installed(library: str) -> str:
    """The version of a library; "" if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what libraries print, log and warn about; torch uses one thread, as the models are small."""
    said = io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
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
