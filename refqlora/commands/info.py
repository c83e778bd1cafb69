"""What matters for speed and results on this machine: for bug reports, and to go beside measurements."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..backend import cores
from .options import json_option, report

LIBRARIES = (
    "numpy",
    "scipy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "rich",
)
OPTIONAL = ("cupy", "torch", "transformers", "peft", "bitsandbytes", "torchao")  # a GPU's arrays; parity's oracles
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def info() -> dict[str, Any]:
    """The facts that `refqlora info` shows; None for what does not exist or is not known."""
    build: dict[str, Any] = np.show_config(mode="dicts")  # type: ignore[assignment]  # a dict in this mode
    blas = build["Build Dependencies"]["blas"]
    return {
        "refqlora": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "simd": build["SIMD Extensions"].get("found", []),
        "cores": cores(),
        "memory_bytes": memory(),
        "blas": f"{blas['name']} {blas['version']}",
        "blas_threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "gpu": gpu(),
        "libraries": {name: installed(name) for name in (*LIBRARIES, *OPTIONAL)},
    }


def machine() -> dict[str, Any]:
    """What goes beside a measurement: the processor, its cores, Python's and NumPy's versions."""
    return {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def processor() -> str | None:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine() or None


def memory() -> int | None:
    """Bytes of physical memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def gpu() -> dict[str, Any] | None:
    """Name and memory, in bytes, of the GPU that CuPy uses."""
    try:
        import cupy

        found = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    except Exception:  # no CuPy, no driver or no device: a different error each
        return None
    return {"name": found["name"].decode(), "memory_bytes": found["totalGlobalMem"]}


def installed(library: str) -> str | None:
    """The library's version; None if it is not installed."""
    for name in (library, f"{library}-cuda13x", f"{library}-cuda12x"):  # CuPy's packages are named after CUDA's version
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts, one a line."""

    def gib(nbytes: int | None) -> str:
        return "unknown" if nbytes is None else f"{nbytes / 2**30:.1f} GiB"

    device = facts["gpu"]
    limits = [f"{name}={value}" for name, value in facts["blas_threads"].items()]
    shown = {
        "refqlora": facts["refqlora"],
        "Python": facts["python"],
        "system": facts["system"],
        "processor": f"{facts['processor'] or 'unknown'} (NumPy uses {', '.join(facts['simd'][-3:])})",
        "cores": f"{facts['cores']} for this process",
        "memory": gib(facts["memory_bytes"]),
        "BLAS": f"{facts['blas']}, {', '.join(limits) or 'number of threads not limited'}",
        "GPU": f"{device['name']}, {gib(device['memory_bytes'])}" if device else "none that CuPy finds",
    }
    shown |= {name: found or "not installed" for name, found in facts["libraries"].items()}
    return [f"{name:16} {value}" for name, value in shown.items()]


# ---- the command ----

MORE = "Look at it before you measure, and paste it into bug reports."


def add(options: argparse.ArgumentParser) -> None:
    json_option(options)


def run(a: argparse.Namespace) -> None:
    facts = info()
    if not a.json:
        print("\n".join(lines(facts)))
    report(a, facts)
