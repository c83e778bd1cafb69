"""Somebody else's kernel compared with the vectors, by the protocol in parity/__init__.py."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...blockwise import BLOCK_SIZES, quantize_constants
from ..cases import unpacked
from ..differences import in_one_line, relative_difference, ulps
from .diagnosis import LORA_BOUND, Trial, explain, positions
from .formulas import explain_lora, orientation
from .trials import FLOATS, trials

# Each function of the protocol, and what it returns.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "quantize": ("packed", "absmax"),
    "dequantize": ("weights",),
    "quantize_constants": ("codes", "nested_absmax", "offset"),
    "dequantize_constants": ("absmax",),
    "lora_forward": ("y",),
    "lora_backward": ("dx", "dA", "dB"),
    "lora_dropout_forward": ("y",),
    "lora_dropout_backward": ("dx", "dA", "dB"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the function and case, what differs and where, and the likely cause, if known."""

    function: str
    case: str
    what: str
    cause: str = ""
    fault: bool = False  # it raised, or what it returned could not be compared

    def __str__(self) -> str:
        cause = f" · likely cause: {self.cause}" if self.cause else "" if self.fault else " · no known cause fits"
        return f"{self.function} · {self.case} · {self.what}{cause}"


@dataclass(frozen=True)
class Report:
    """One function's number of calls, and the findings; none if it is right."""

    function: str
    calls: int
    findings: tuple[Finding, ...]

    def lines(self, shown: int = 3) -> Iterator[str]:
        """A line for each finding, but only the first few with the same cause; or one line if all is right."""
        if not self.findings:
            exact = f"relative {LORA_BOUND:.0e}" if self.function.startswith("lora") else "no bit may differ"
            yield f"{self.function} · {self.calls} calls · {exact} · OK"
        seen: dict[str, int] = {}
        for finding in self.findings:
            seen[finding.cause] = seen.get(finding.cause, 0) + 1
            if seen[finding.cause] <= shown:
                yield str(finding)
        for cause, count in seen.items():
            if count > shown:
                yield f"{self.function} · {count - shown} more like it{f' · {cause}' if cause else ''}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_kernel(name: str) -> ModuleType:
    """The module of this dotted name, or of this path to a .py file. Raises ValueError if it cannot be imported or
    offers no function of the protocol."""
    path = Path(name)
    here = str(path.resolve().parent) if path.suffix == ".py" else ""
    if here not in sys.path:
        sys.path.insert(0, here)  # so that it can import its neighbours
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None  # as its name ends in .py
            module = importlib.util.module_from_spec(spec)
            with contextlib.redirect_stdout(sys.stderr):
                spec.loader.exec_module(module)
        else:
            with contextlib.redirect_stdout(sys.stderr):
                module = importlib.import_module(name)
    except FileNotFoundError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name.strip() or repr(name)}: cannot be imported: {in_one_line(error, ())}{_place(error)}"
        ) from None
    if not offered(module):
        raise ValueError(f"{name}: expected any of the functions {', '.join(FUNCTIONS)}, got none")
    return module


def offered(module: ModuleType) -> list[str]:
    """The functions of the protocol that the module has."""
    return [name for name in FUNCTIONS if callable(getattr(module, name, None))]


def examine(module: ModuleType, function: str, seed: int = 0, size: int = 100_000) -> Report:
    """Make every call of one function of the module and report what differs. An exception is a finding."""
    block_sizes = _taken(module, "BLOCK_SIZES", BLOCK_SIZES, int)
    dtypes = _taken(module, "DTYPES", FLOATS, lambda dtype: np.dtype(dtype).name)
    calls = trials(function, seed, size, block_sizes, dtypes)
    for trial in calls:
        _call(getattr(module, function), trial)
    return Report(function, len(calls), tuple(_findings(calls)))


def _taken(module: ModuleType, name: str, known: tuple, kind: Callable[[Any], Any]) -> tuple:
    """The values among `known` that the module lists under `name`; all of them if it has no list."""
    given = getattr(module, name, known)
    try:
        taken = [kind(one) for one in (() if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        taken = []
    if not set(taken) & set(known):
        raise ValueError(f"{name}: expected a tuple of some of {', '.join(map(str, known))}, got {given!r:.80}")
    return tuple(one for one in known if one in taken)


def _call(function: Any, trial: Trial) -> None:
    """Call the function and put its results, or its fault, into the trial."""
    arguments = trial.arguments
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    try:
        with np.errstate(all="ignore"), contextlib.redirect_stdout(sys.stderr):
            found = function(*arguments)
    except (Exception, SystemExit) as error:
        trial.fault = f"raised {in_one_line(error, ())}{_place(error)}"
        trial.cause = orientation(function, trial)
        return
    for i, (given, was) in enumerate(zip(arguments, before, strict=True)):
        if isinstance(given, np.ndarray) and not np.array_equal(given, was):
            trial.fault, trial.cause = f"its argument {i + 1} is changed", "it works in place; it must not"
            given[...] = was
            return
    names = tuple(trial.expected)
    outputs = found if isinstance(found, tuple | list) and len(names) > 1 else (found,)
    if len(outputs) != len(names):
        trial.fault = f"returned {len(outputs)} values, expected ({', '.join(names)})"
        return
    for name, output in zip(names, outputs, strict=True):
        _accept(trial, name, output, outputs)
        if trial.fault:
            trial.found = {}
            return
    if trial.function == "quantize_constants" and "offset" not in trial.wrong():
        # A mean may differ in its last bits, and the other results depend on it: compare them for the kernel's offset.
        codes, nested_absmax, _ = quantize_constants(trial.arguments[0], offset=np.float32(trial.found["offset"]))
        trial.expected |= {"codes": codes, "nested_absmax": nested_absmax}


def _place(error: BaseException) -> str:
    """The line in the kernel's own file that raised the error, directly or in a call; "" if there is none."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if frame.filename != __file__ and "importlib" not in frame.filename]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _accept(trial: Trial, name: str, output: Any, outputs: Sequence[Any]) -> None:
    """Take one output if its dtype and shape are right."""
    expected = trial.expected[name]
    try:
        x = np.asarray(output)
    except Exception as error:
        x = np.array(None)
        trial.fault = f"{name} is not an array: {in_one_line(error)}"
        return
    if x.dtype == object:
        trial.fault = f"{name} is {type(output).__name__}, expected an array"
    elif x.shape != expected.shape:
        trial.fault = f"{name} has shape {x.shape}, expected {expected.shape}"
        trial.cause = _shape_cause(trial, name, x, outputs)
    elif trial.function.startswith("lora") or name == "offset":
        if x.dtype.kind != "f":
            trial.fault = f"{name} is {x.dtype}, expected float32"
    elif x.dtype != expected.dtype:
        trial.fault = f"{name} is {x.dtype}, expected {expected.dtype}"
    trial.found[name] = x


def _shape_cause(trial: Trial, name: str, x: np.ndarray, outputs: Sequence[Any]) -> str:
    expected = trial.expected[name]
    for (other, wanted), given in zip(trial.expected.items(), outputs, strict=True):
        if other != name and x.shape == wanted.shape and np.shape(given) == expected.shape:
            return f"{name} and {other} are swapped"
    if x.size == expected.size:
        if x.T.shape == expected.shape:
            return f"{name} is transposed"
        return f"it must be reshaped: {expected.size} elements are right"
    if trial.function == "quantize":
        w, block_size = trial.arguments
        rows = w.size // w.shape[-1] * -(-w.shape[-1] // block_size)
        if name == "absmax":
            if x.shape == (w.size // block_size,):
                return "the last, partial block is left out"
            if x.size == rows:
                return "blocks begin anew in every row; they run over the flat tensor"
            for size in BLOCK_SIZES:
                if x.shape == (-(-w.size // size),):
                    return f"blocks of {size}; they must be of block_size"
        elif np.shape(outputs[1]) == (w.size // block_size,) != trial.expected["absmax"].shape:
            return "the last, partial block is left out"
        elif x.shape == (w.size,):
            return "two codes go into a byte"
        elif x.shape == (w.size // 2,):
            return "an odd size's last code is left out"
    if name == "nested_absmax":
        if x.size == 1:
            return "one block for all; they must be of 256"
        for size in BLOCK_SIZES:
            if x.shape == (-(-trial.arguments[0].size // size),):
                return f"blocks of {size}; they must be of 256"
    return ""


def _findings(calls: Sequence[Trial]) -> Iterator[Finding]:
    causes: dict[tuple[int, str], str] = {}  # {(number of a call, output): cause}
    only = ""
    if calls and calls[0].function.startswith("lora"):
        wrong = {name: [i for i, trial in enumerate(calls) if name in trial.wrong()] for name in calls[0].expected}
        of_output = {name: explain_lora(calls, name) for name, numbers in wrong.items() if numbers}
        causes = {(i, name): cause for name, cause in of_output.items() for i in wrong[name]}
        # The cause of wrong results also explains why other calls failed: a transposed matrix fits only if in = out.
        only = next(iter(of_output.values())) if len(set(of_output.values())) == 1 else ""
    elif calls:
        causes = {(i, name): cause for i, cause in explain(calls).items() for name in calls[i].expected}
    for i, trial in enumerate(calls):
        if trial.fault:
            yield Finding(trial.function, trial.case, trial.fault, trial.cause or only, fault=True)
        for name in trial.wrong():
            yield Finding(trial.function, trial.case, _difference(trial, name), causes[i, name])


def _difference(trial: Trial, name: str) -> str:
    """What differs in one output, and where it differs first or most."""
    found, expected = trial.found[name], trial.expected[name]
    if trial.function.startswith("lora"):
        off = np.abs(found - expected.astype(np.float64))
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(off), np.inf, off))), off.shape)
        where = f"{name} is off by {relative_difference(found, expected):.1e} (bound {LORA_BOUND:.0e}), most at"
        return f"{where} {tuple(map(int, at))}: got {found[at]:.6g}, expected {expected[at]:.6g}"
    if name == "offset":
        return f"the offset: got {np.float32(found)}, expected {expected}"
    if name == "packed":
        name = "codes"
        found, expected = unpacked(found), unpacked(expected)
    found, expected = found.reshape(-1), expected.reshape(-1)
    off = positions(name, found, expected)
    first = int(off[0])
    n = trial.arguments[0].size if trial.function == "quantize" else expected.size
    place = "in the filling" if name == "codes" and trial.function == "quantize" and first >= n else f"at {first}"
    said = f"{len(off):,} of {expected.size:,} {name} differ"
    if found.dtype == np.float32 and (far := int(ulps(found[off], expected[off]).max())) < 10:
        said += f", by {far if far == 1 else f'at most {far}'} in the last place"
    return f"{said}, first {place}: got {found[first]!s}, expected {expected[first]!s}"
