"""The arguments of a kernel's functions and the expected results, from the file of vectors and at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...blockwise import BLOCK_SIZES, NESTED_BLOCK, dequantize_blockwise, quantize_constants
from ...codebooks import DYNAMIC
from ...files.reading import read_tensors
from ...quantization import QuantizedTensor, dequantize, quantize
from ..cases import WEIGHT_DTYPES, awkward_cases, large_cases, random_cases, reciprocal_matters
from ..checks import VECTORS
from ..differences import Observed
from ..quantization import cases, constants_cases
from .diagnosis import Trial
from .mistakes import NF4

FLOATS = tuple(dtype.name for dtype in WEIGHT_DTYPES)


def trials(
    function: str,
    seed: int = 0,
    size: int = 100_000,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
    dtypes: tuple[str, ...] = FLOATS,
) -> list[Trial]:
    """Every call of this function with these block sizes and dtypes; random tensors have `size` weights in total."""
    vectors = dict(read_tensors(VECTORS))
    if function in ("quantize", "dequantize"):
        tensors = _quantized(vectors, seed, size)
        make = _quantize if function == "quantize" else _dequantize
        return [t for w, q, name in tensors if q.block_size in block_sizes for t in make(w, q, name, dtypes)]
    if function in ("quantize_constants", "dequantize_constants"):
        return list(_constants(function, vectors, seed))
    return list(_lora(function, vectors))


def _quantized(vectors: Observed, seed: int, size: int) -> Iterator[tuple[np.ndarray | None, QuantizedTensor, str]]:
    """(w, its quantised tensor, the case's name)."""
    order = [case.key for case in (*awkward_cases(), *large_cases())]
    for case, parts in sorted(cases(vectors), key=lambda found: order.index(found[0].key)):
        if case.kind == "nf4":
            w = vectors[f"w/{case.tensor}"]
            q = QuantizedTensor(parts["packed"], parts["absmax"], NF4, w.shape, case.block_size, w.dtype)
            yield w, q, case.tensor if case.block_size == 64 else f"{case.tensor}, blocks of {case.block_size}"
    w = vectors["w/ordinary"]
    yield np.asfortranarray(w), quantize(w, double_quant=False), "ordinary, columns in memory first"
    spread = np.repeat(w, 2, axis=1)[:, ::2]
    yield spread, quantize(w, double_quant=False), "ordinary, every other column of a wider matrix"
    rng = np.random.default_rng(seed)
    scales = 10.0 ** np.arange(-37, 38)[:, None]  # from the smallest normal numbers to the largest
    w = (rng.standard_normal((scales.size, 64)) * scales).astype(np.float32)
    yield w, quantize(w, double_quant=False), "every scale"
    every = np.arange(256).astype(np.uint8)
    absmax = rng.uniform(0.5, 2, 8).astype(np.float32)
    yield None, QuantizedTensor(every, absmax, NF4, (512,), 64, np.dtype(np.float32)), "every byte"
    for case, w in random_cases(rng, size):
        yield w, quantize(w, NF4, case.block_size, False), f"{case.tensor}, blocks of {case.block_size}, {w.dtype}"


def _quantize(w: np.ndarray | None, q: QuantizedTensor, name: str, dtypes: tuple[str, ...]) -> Iterator[Trial]:
    if w is not None and w.dtype.name in dtypes:
        yield Trial("quantize", name, (w, q.block_size), {"packed": q.packed, "absmax": q.absmax})


def _dequantize(w: np.ndarray | None, q: QuantizedTensor, name: str, dtypes: tuple[str, ...]) -> Iterator[Trial]:
    if w is None or w.flags.c_contiguous:  # the others have the same codes
        expected = {"weights": dequantize(q)}
        yield Trial("dequantize", name, (q.packed, q.absmax, q.block_size, q.shape), expected)


def _constants(function: str, vectors: Observed, seed: int) -> Iterator[Trial]:
    given = [(name, parts["absmax"], np.float32(parts["offset"])) for name, parts in constants_cases(vectors)]
    x = reciprocal_matters(np.random.default_rng(seed), 128, DYNAMIC)
    x = np.stack([x, -x])[:, ::-1].T.reshape(-1)  # (256,): their mean is 0
    for name, absmax, offset in [*given, ("rounding", np.append(x, x[:-2]), np.float32(0))]:
        codes, nested_absmax, _ = quantize_constants(absmax, offset=offset)
        codes = vectors.get(f"8bit/{name}/nearest", codes)
        if function == "quantize_constants":
            expected = {"codes": codes, "nested_absmax": nested_absmax, "offset": np.asarray(offset)}
            yield Trial(function, name, (absmax,), expected)
        else:
            back = dequantize_blockwise(codes, nested_absmax, DYNAMIC, NESTED_BLOCK) + offset
            yield Trial(function, name, (codes, nested_absmax, offset), {"absmax": back})


def _lora(function: str, vectors: Observed) -> Iterator[Trial]:
    for case in sorted({key.split("/")[1] for key in vectors if key.startswith("lora/")}):
        part = {key.rsplit("/", 1)[1]: x for key, x in vectors.items() if key.startswith(f"lora/{case}/")}
        arguments: tuple = (part["x"], part["W"], part["A"], part["B"], float(part["scale"]))
        (n, i), (r, o), prefix = part["x"].shape, part["B"].T.shape, ""
        case = f"{case} (N = {n}, in = {i}, out = {o}, r = {r})"  # by which a shape in an error can be named
        if "dropout" in function:
            arguments, prefix = (*arguments, part["keep"], float(part["dropout"])), "dropped_"
        if function.endswith("backward"):
            expected = {name: part[prefix + name] for name in ("dx", "dA", "dB")}
            yield Trial(function, case, (part["dy"], *arguments), expected)
        else:
            yield Trial(function, case, arguments, {"y": part[prefix + "y"]})
