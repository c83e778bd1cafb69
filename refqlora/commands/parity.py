"""`refqlora parity`: this package, or somebody's kernel, compared with the real libraries."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..parity.checks import CHECKS, DIFFERS, FAILED, OK, SIZES
from ..parity.checks import run as run_check
from ..parity.kit import examine as kit
from .options import count, json_option, natural, report

PROTOCOL = """\
MODULE is a dotted name or a .py file with any of these functions on NumPy
arrays. Each is called with the vectors; differences are printed with their
likely cause. For all details: python -c "help('refqlora.parity')".

  quantize(w, block_size) -> packed, absmax
      NF4: uint8 (ceil(n/2),), float32 (ceil(n/block_size),)
  dequantize(packed, absmax, block_size, shape) -> weights, float32
  quantize_constants(absmax) -> codes, nested_absmax, offset
      double quantisation, in blocks of 256
  dequantize_constants(codes, nested_absmax, offset) -> absmax
  lora_forward(x, W, A, B, scale) -> y
      x (N, in), W (out, in), A (r, in), B (out, r), y (N, out)
  lora_backward(dy, x, W, A, B, scale) -> dx, dA, dB
  lora_dropout_forward(x, W, A, B, scale, keep, rate) -> y
      keep bool (N, in)
  lora_dropout_backward(dy, x, W, A, B, scale, keep, rate) -> dx, dA, dB
"""


MORE = (
    "Prints a line for each check, then a verdict. It runs torch, transformers, PEFT, bitsandbytes and torchao if they "
    "are installed, and otherwise uses their recorded results. The exit code is 1 if anything differs."
)


def add(options: argparse.ArgumentParser) -> None:
    options.add_argument("--against", metavar="MODULE", help="examine this kernel instead (see below)")
    options.add_argument(
        "--only", action="append", metavar="NAME", help="only this check, or function of the kernel; may be repeated"
    )
    options.add_argument("--seed", type=natural, help="seed of the random tensors and models (default: 0)")
    options.add_argument(
        "--size",
        type=size,
        help=f"weights in each: {', '.join(SIZES)} or a number (default: medium; for a kernel small)",
    )
    options.add_argument("--recorded", action="store_true", help="use the recordings, even if libraries are installed")
    json_option(options)
    names = ", ".join(check.name for check in CHECKS)
    checks = textwrap.fill(names, 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    options.epilog = f"{PROTOCOL}\nthe checks:\n{checks}"


def size(text: str) -> int:
    """The number of weights; ArgumentTypeError if the text is neither a size's name nor a number."""
    try:
        return SIZES[text] if text in SIZES else count(text)
    except argparse.ArgumentTypeError:
        names = ", ".join(f"{name} ({weights:,})" for name, weights in SIZES.items())
        raise argparse.ArgumentTypeError(f"expected {names} or a number of weights, got {text!r:.80}") from None


def run(a: argparse.Namespace) -> int:
    if a.recorded and (a.against or a.seed is not None or a.size is not None):
        raise ValueError("--recorded excludes --against, --seed and --size: the recording has its own")
    return _kernel(a) if a.against else _libraries(a)


def _libraries(a: argparse.Namespace) -> int:
    names = _chosen(a.only, [check.name for check in CHECKS])
    lines = []
    for check in CHECKS:
        if check.name in names:
            lines.append(run_check(check, a.seed or 0, a.size or SIZES["medium"], a.recorded))
            _say(a, lines[-1])
    wrong = [line.name for line in lines if line.status in (DIFFERS, FAILED)]
    right = sum(line.status == OK for line in lines)
    others = len(lines) - len(wrong) - right
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else "OK" if right else "nothing was compared"
    verdict += f"; {right} of {len(lines)} checks agree" + (f", {others} skipped" if others else "")
    return _end(a, verdict, bool(wrong) or not right, [line.to_dict() for line in lines])


def _kernel(a: argparse.Namespace) -> int:
    module = kit.load_kernel(a.against)
    functions = kit.offered(module)
    reports = []
    for function in _chosen(a.only, functions):
        reports.append(kit.examine(module, function, a.seed or 0, a.size or SIZES["small"]))
        for line in reports[-1].lines():
            _say(a, line)
    absent = [name for name in kit.FUNCTIONS if name not in functions]
    if absent:
        _say(a, f"not offered: {', '.join(absent)}")
    wrong = [report.function for report in reports if report.findings]
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else "OK"
    return _end(a, verdict, bool(wrong), [report.to_dict() for report in reports])


def _chosen(only: list[str] | None, names: list[str]) -> list[str]:
    for name in only or ():
        if name not in names:
            raise ValueError(f"--only: expected one of {', '.join(names)}, got {name!r:.80}")
    return [name for name in names if not only or name in only]


def _say(a: argparse.Namespace, line: Any) -> None:
    if not a.json:
        print(line, flush=True)


def _end(a: argparse.Namespace, verdict: str, wrong: bool, details: list[dict[str, Any]]) -> int:
    _say(a, f"\n{verdict}")
    report(a, {"verdict": verdict, "ok": not wrong, "lines": details})
    return int(wrong)
