"""Quantisation compared with bitsandbytes and torchao.

`observe_*` runs a library, which must be installed; `compare_*` reads what was observed, now or in the recording. The
arrays have the names of the file of vectors (README.md here).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from ..blockwise import NESTED_BLOCK, dequantize_blockwise, quantize_constants
from ..codebooks import DYNAMIC, FP4, NF4, _linspace, dynamic_map
from ..minimal import to_codes
from ..quantization import QuantizedTensor, dequantize, quantize
from .cases import CODEBOOKS, Case, awkward_cases, awkward_tensors, constants, random_cases, unpacked
from .differences import Observed, Outcome, differing, relative_difference

# ---- asking bitsandbytes and torchao -----------------------------------------------------------------------


def to_torch(x: np.ndarray) -> Any:
    """A torch tensor of the same bits and shape; x is float32, float16 or bfloat16."""
    import torch

    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    bits = np.ascontiguousarray(x).reshape(x.shape).view({2: np.int16, 4: np.int32}[x.dtype.itemsize])
    return torch.from_numpy(bits.copy()).view(types[x.dtype.name])


def to_numpy(t: Any) -> np.ndarray:
    """An array of the same bits and shape."""
    import torch

    t = t.detach().contiguous().cpu()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def fuses() -> bool:
    """Whether torch's `linspace` uses a fused multiply-add, which rounds once, as on CPUs since about 2013. If it
    rounds twice, the dynamic maps that bitsandbytes computes with it differ in the last bits."""
    import torch

    return np.array_equal(torch.linspace(0.1, 1, 129).numpy(), _linspace(0.1, 1, 129))


def observe_codebooks(seed: int, size: int) -> Observed:
    """The codebooks; the dynamic maps only if they are the same as on most machines (see `fuses`)."""
    import bitsandbytes.functional as bnb

    books = {name: bnb.get_4bit_type(name, device="cpu") for name in ("nf4", "fp4")}
    if fuses():
        books |= {"dynamic": bnb.create_dynamic_map(signed=True)}
        books |= {"dynamic_unsigned": bnb.create_dynamic_map(signed=False)}
    return {f"codebook/{name}": to_numpy(book) for name, book in books.items()}


def observe_4bit(seed: int, size: int) -> Observed:
    """Awkward tensors, and random ones with `size` weights in total."""
    rng = np.random.default_rng(seed)
    awkward = awkward_tensors(rng)
    named = [(case, awkward[case.tensor]) for case in awkward_cases()]
    return quantise_4bit([*named, *random_cases(rng, size)])


def quantise_4bit(cases: Iterable[tuple[Case, np.ndarray]]) -> Observed:
    """w, packed, absmax and dequantised of each case, by bitsandbytes on a CPU."""
    import bitsandbytes.functional as bnb
    import torch

    observed = {}
    with torch.compiler.set_stance("force_eager"):  # its fallback for odd sizes is compiled for each shape
        for case, w in cases:
            # Flat: if rows do not fill blocks, its AVX512 dequantisation uses the wrong constants.
            packed, state = bnb.quantize_4bit(to_torch(w).reshape(-1), quant_type=case.kind, blocksize=case.block_size)
            observed[f"w/{case.tensor}"] = w
            observed[f"{case.key}/packed"] = to_numpy(packed).reshape(-1)
            observed[f"{case.key}/absmax"] = to_numpy(state.absmax)
            observed[f"{case.key}/dequantised"] = to_numpy(bnb.dequantize_4bit(packed, state)).reshape(w.shape)
    return observed


def observe_rows(seed: int, size: int) -> Observed:
    """A matrix whose rows do not fill its blocks, dequantised as it is and flat."""
    import bitsandbytes.functional as bnb

    w = np.random.default_rng(seed).standard_normal((max(32, size // 96), 96)).astype(np.float32)
    packed, state = bnb.quantize_4bit(to_torch(w), quant_type="nf4", blocksize=64)
    return {
        "4bit/rows/nf4/64/packed": to_numpy(packed).reshape(-1),
        "4bit/rows/nf4/64/absmax": to_numpy(state.absmax),
        "4bit/rows/nf4/64/dequantised": to_numpy(bnb.dequantize_4bit(packed, state)),
    }


def observe_8bit(seed: int, size: int) -> Observed:
    """Constants quantised a second time by bitsandbytes on a CPU, with its offset."""
    observed: Observed = {}
    for name, absmax in constants(np.random.default_rng(seed), max(1000, size // 64)).items():
        observed |= quantise_8bit(name, absmax)
    return observed


def quantise_8bit(name: str, absmax: np.ndarray) -> Observed:
    import bitsandbytes.functional as bnb

    x = to_torch(absmax)
    offset = x.mean()
    codes, state = bnb.quantize_blockwise(x - offset, blocksize=NESTED_BLOCK)
    return {
        f"8bit/{name}/absmax": absmax,
        f"8bit/{name}/offset": to_numpy(offset).reshape(()),
        f"8bit/{name}/binned": to_numpy(codes),
        f"8bit/{name}/nested_absmax": to_numpy(state.absmax),
        f"8bit/{name}/back": to_numpy(bnb.dequantize_blockwise(codes, state) + offset),
        "codebook/dynamic": to_numpy(state.code),
    }


def observe_torchao(seed: int, size: int) -> Observed:
    from torchao.quantization import NF4Tensor

    rows = max(64, size // 256 // 64 * 64)  # it takes only full blocks of constants
    w = np.random.default_rng(seed).standard_normal((rows, 256)).astype(ml_dtypes.bfloat16)
    q = NF4Tensor.from_tensor(to_torch(w.astype(np.float32)), 64, 256)
    return {
        "w": w,
        "packed": to_numpy(q.quantized_data).reshape(-1),
        "constants": to_numpy(
            q.dequantize_scalers(q.quantized_scalers, q.quantization_factor, q.scaler_block_size)
        ).reshape(-1),
        "dequantised": to_numpy(q.get_original_weight()),
    }


# ---- comparing ---------------------------------------------------------------------------------------------


def cases(observed: Observed) -> Iterator[tuple[Case, dict[str, np.ndarray]]]:
    """Each 4-bit case with its parts."""
    for key in sorted({key.rsplit("/", 1)[0] for key in observed if key.startswith("4bit/")}):
        _, tensor, kind, block_size = key.split("/")
        parts = ("packed", "absmax", "dequantised")
        found = {part: observed[f"{key}/{part}"] for part in parts if f"{key}/{part}" in observed}
        yield Case(tensor, kind, int(block_size)), found


def _counted(pairs: Iterable[tuple[str, Any, Any]], note: str = "") -> Outcome:
    """(part, found, expected) -> the number of elements of each part that differ."""
    parts: dict[str, float] = {}
    elements = 0
    for part, found, expected in pairs:
        parts[part] = parts.get(part, 0) + len(differing(found, expected))
        elements += np.size(expected)
    return Outcome(parts, elements, note)


def compare_codebooks(observed: Observed) -> Outcome:
    ours = {"nf4": NF4, "fp4": FP4, "dynamic": DYNAMIC, "dynamic_unsigned": dynamic_map(signed=False)}
    there = [name for name in ours if f"codebook/{name}" in observed]
    note = "" if there == [*ours] else "without the dynamic maps: torch has no fused multiply-add here"
    return _counted(((name, ours[name], observed[f"codebook/{name}"]) for name in there), note)


def compare_packing(observed: Observed) -> Outcome:
    def pairs() -> Iterator[tuple[str, Any, Any]]:
        for case, theirs in cases(observed):
            w = observed[f"w/{case.tensor}"]
            q = quantize(w, CODEBOOKS[case.kind], case.block_size, double_quant=False, name=case.tensor)
            yield "packed", q.packed, theirs["packed"]
            yield "absmax", q.absmax, theirs["absmax"]

    return _counted(pairs())


def compare_dequantisation(observed: Observed) -> Outcome:
    """Dequantise *their* codes and constants, so that the check does not depend on our quantisation."""

    def pairs() -> Iterator[tuple[str, Any, Any]]:
        for case, theirs in cases(observed):
            if "dequantised" not in theirs:
                continue
            back, codebook = theirs["dequantised"], CODEBOOKS[case.kind]
            q = QuantizedTensor(
                theirs["packed"], theirs["absmax"], codebook, back.shape, case.block_size, np.dtype(np.float32)
            )
            yield "dequantised", dequantize(q, back.dtype), back

    return _counted(pairs())


def compare_rows(observed: Observed) -> Outcome:
    """Compare ours with the definition, codebook[code] * absmax, and count bitsandbytes' differences from it."""
    ((_, theirs),) = cases(observed)
    packed, absmax, back = theirs["packed"], theirs["absmax"], theirs["dequantised"]
    codes = unpacked(packed)
    defined = (NF4[codes] * np.repeat(absmax, 64)[: codes.size]).reshape(back.shape)
    q = QuantizedTensor(packed, absmax, NF4, back.shape, 64, np.dtype(np.float32))
    wrong = len(differing(back, defined))
    note = f"bitsandbytes itself uses the wrong constant for {wrong:,} of {back.size:,}"
    right = "bitsandbytes was right where this was computed; its known fault is with AVX512"
    return _counted([("dequantised", dequantize(q), defined)], note if wrong else right)


def constants_cases(observed: Observed) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Each vector of constants, with its parts."""
    for name in sorted({key.split("/")[1] for key in observed if key.startswith("8bit/")}):
        parts = ("absmax", "offset", "binned", "nested_absmax", "back")
        yield name, {part: observed[f"8bit/{name}/{part}"] for part in parts}


def compare_binned(observed: Observed) -> Outcome:
    """nested="bitsandbytes": equal to bitsandbytes on a CPU to the bit, with the map that it computes there."""
    dynamic = observed["codebook/dynamic"]

    def pairs() -> Iterator[tuple[str, Any, Any]]:
        for _, theirs in constants_cases(observed):
            offset = np.float32(theirs["offset"])
            codes, nested_absmax, _ = quantize_constants(theirs["absmax"], "bitsandbytes", offset)
            yield "codes", codes, theirs["binned"]
            yield "nested absmax", nested_absmax, theirs["nested_absmax"]
            back = dequantize_blockwise(theirs["binned"], theirs["nested_absmax"], dynamic, NESTED_BLOCK) + offset
            yield "dequantised", back, theirs["back"]

    return _counted(pairs())


def compare_nearest(observed: Observed) -> Outcome:
    """nested="nearest": the definition in minimal.py, which bitsandbytes meets on CUDA but not on a CPU."""
    found, missed, offsets = [], "", 0.0
    for name, theirs in constants_cases(observed):
        absmax, offset = theirs["absmax"], np.float32(theirs["offset"])
        codes, nested_absmax, _ = quantize_constants(absmax, offset=offset)
        defined, _ = to_codes(absmax - offset, DYNAMIC, NESTED_BLOCK)
        found.append(("codes", codes, defined))
        expected = theirs["nested_absmax"].copy()
        if absmax.size % NESTED_BLOCK:  # for a partial last block of zeros ours is 1e-38, as with 4 bits
            expected[-1:] = np.maximum(expected[-1:], np.float32(1e-38))
        found.append(("nested absmax", nested_absmax, expected))
        if name == "ordinary":  # the others are chosen to be missed
            missed = f"{np.count_nonzero(defined != theirs['binned']):,} of {absmax.size:,}"
        offsets = max(offsets, relative_difference(quantize_constants(absmax)[2], offset))
    note = f"on a CPU {missed} of bitsandbytes' codes of ordinary constants are not the nearest"
    outcome = _counted(found, f"{note}; its offset is within {offsets:.1e} of ours")
    return outcome._replace(parts=outcome.parts | {"offset": float(offsets > 1e-6)})


TORCHAO = np.array(
    [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    + [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1],
    np.float32,
)


def compare_torchao(observed: Observed) -> Outcome:
    """torchao's table has four decimals, and it takes the value with the least float32 distance to x / absmax: with
    both, no code may differ. Its constants are 8-bit integers, with a step for each block of 256."""
    w = observed["w"].astype(np.float32)
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks / absmax[:, None]
    codes = np.empty(w.size, np.uint8)
    for start in range(0, w.size, 1 << 16):  # (n, 16) at a time
        piece = scaled.reshape(-1)[start : start + (1 << 16), None]
        codes[start : start + (1 << 16)] = np.abs(piece - TORCHAO).argmin(axis=1)
    packed = codes[0::2] << 4 | codes[1::2]
    theirs = observed["packed"]
    back = (TORCHAO[codes].reshape(-1, 64) * observed["constants"][:, None]).reshape(w.shape)

    offset = absmax.mean(dtype=np.float64)
    centred = (absmax - offset).reshape(-1, 256)
    step = np.abs(centred).max(axis=1, keepdims=True) / 128
    linear = (np.clip(np.round(centred / step), -128, 127) * step).reshape(-1) + offset
    steps_off = np.abs(observed["constants"] - linear).reshape(-1, 256) / step

    q = quantize(w)
    differ = np.count_nonzero(unpacked(q.packed) != unpacked(theirs))
    errors = [np.linalg.norm(x - w) / np.linalg.norm(w) for x in (dequantize(q), observed["dequantised"])]
    note = (
        f"{differ:,} of {w.size:,} codes differ from NF4's, all because of its table of four decimals; "
        f"relative error of the weights {errors[1]:.5f}, ours {errors[0]:.5f}"
    )
    outcome = _counted([("packed", packed, theirs), ("dequantised", back, observed["dequantised"])], note)
    # A constant halfway between two integers may be rounded either way: one step, not two.
    return outcome._replace(parts=outcome.parts | {"constants": int(np.count_nonzero(steps_off > 1.001))})
