"""bitsandbytes' 4-bit weights in and out: the parts of a weight in the file, and the QuantizedTensor that they make.

A weight of n elements that bitsandbytes quantised is stored in a safetensors file as four tensors, or as six if its
constants (one for each of its `blocks`) are quantised too:

    <weight>                                uint8 (ceil(n / 2), 1): two codes a byte, the first in the high nibble
    <weight>.absmax                         float32 (blocks,); quantised, uint8 (blocks,)
    <weight>.quant_map                      float32 (16,): the codebook
    <weight>.nested_absmax                  float32 (ceil(blocks / 256),)
    <weight>.nested_quant_map               float32 (256,): the codebook of the constants
    <weight>.quant_state.bitsandbytes__nf4  uint8: a JSON object in UTF-8, see `State`; or ...__fp4

bitsandbytes writes them in QuantState.as_dict, and transformers reads them if config.json has a quantization_config.
A weight stored as floats is dense: it was not quantised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..backend import Array
from ..blockwise import BLOCK_SIZES, NESTED_BLOCK
from ..checks import cut, finite, number, shown
from ..codebooks import CODEBOOKS, DYNAMIC
from ..quantization import QuantizedTensor
from . import model_files
from .reading import FLOATS, parse_object

TYPES = ("nf4", "fp4")  # the codebooks that bitsandbytes has
# The dtypes that a weight may have had before it was quantised, and those of the dense tensors beside it.
DENSE_DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
STORAGE = ("uint8", "int8", "float64", *DENSE_DTYPES)  # dtypes that packed bytes may be stored as
INTEGERS = (np.dtype(np.uint8), np.dtype(np.int8))

_PART = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
_STATE = "quant_state.bitsandbytes__"
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")


class State(NamedTuple):
    """The JSON object, checked: quant_type, blocksize, dtype and shape of the weight, and nested_offset, which was
    subtracted from the constants before they were quantised (None if they were not)."""

    quant_type: str
    blocksize: int
    dtype: np.dtype
    shape: tuple[int, ...]
    nested_offset: np.float32 | None


# ---- in --------------------------------------------------------------------------------------------------------


def quantization_config(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The quantization_config of a config.json, with transformers' defaults filled in; None if there is none.

    Raises ValueError, beginning with `where`, unless it is bitsandbytes' 4-bit NF4 or FP4.
    """
    q = config.get("quantization_config")
    if q is None:
        return None
    if not isinstance(q, dict):
        raise ValueError(f"{where}: quantization_config: expected an object, got {shown(q)}")
    q = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"} | q
    storage = q.get("bnb_4bit_quant_storage") or "uint8"
    for key, good, expected in [
        ("quant_method", q["quant_method"] == "bitsandbytes", '"bitsandbytes" with load_in_4bit'),
        ("load_in_8bit", not q.get("load_in_8bit"), "load_in_4bit: the 8 bits of LLM.int8() are not supported"),
        ("load_in_4bit", q.get("load_in_4bit") is True, "true"),
        ("bnb_4bit_quant_type", q["bnb_4bit_quant_type"] in TYPES, f"one of {', '.join(TYPES)}"),
        ("bnb_4bit_quant_storage", storage in STORAGE, f"one of {', '.join(STORAGE)}"),
    ]:
        if not good:
            raise ValueError(f"{where}: quantization_config: {key}: expected {expected}, got {shown(q.get(key))}")
    return {**q, "bnb_4bit_quant_storage": storage}


def read_model(directory: Path, config: Mapping[str, Any] | None) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """`model_files.read_model`, with bitsandbytes' weights assembled if `config` is a quantization_config."""
    if config is None:
        return model_files.read_model(directory)
    where = str(model_files.weights_file(directory))
    return assemble(model_files.read_model(directory, FLOATS + INTEGERS), config, where)


def assemble(
    tensors: Iterable[tuple[str, np.ndarray]], config: Mapping[str, Any], where: str
) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """(key, array) of a model's tensors -> (name, QuantizedTensor) of each 4-bit weight, the others as they are.

    `config` is what `quantization_config` returns. Parts may come in any order and from several shards; they are kept
    until their weight is complete. The bits stay the file's. Raises ValueError, beginning with `where` and the
    tensor's name, for a part that is missing, not expected or does not fit the weight's shape, for constants that are
    not finite, and for a codebook that is not its type's: bitsandbytes ignores the file's codebook and uses the
    type's, so its numbers would not be those of the file. (It does use the file's nested codebook, and so do we.)
    """
    storage = config["bnb_4bit_quant_storage"]
    waiting: dict[str, dict[str, Any]] = {}  # by weight, the parts so far: arrays, and "quant_state" as a State
    made = set()
    for key, array in tensors:
        name, part = _split(key, array, storage)
        if part is None:
            if array.dtype in INTEGERS:
                raise ValueError(f"{where}: {key} is {array.dtype} of shape {array.shape}, not part of a 4-bit weight")
            yield key, array
            continue
        if name in made or part in waiting.get(name, ()):
            raise ValueError(f"{where}: {key} is not expected: {name} has all its parts without it")
        parts = waiting.setdefault(name, {})
        if part == "weight" and array.dtype != np.uint8:
            array = array.view(np.uint8).reshape(-1, 1)
        parts[part] = _state(key, array, where) if part == "quant_state" else array
        if "quant_state" in parts and _wanted(parts["quant_state"]) <= parts.keys():
            yield name, _assembled(name, waiting.pop(name), where)
            made.add(name)
    for name, parts in waiting.items():
        if "quant_state" not in parts:
            raise ValueError(f"{where}: {name} has 4 bits, but {name}.{_STATE}nf4 (or fp4) is missing")
        missing = min(_wanted(parts["quant_state"]) - parts.keys())
        if missing == "weight":
            raise ValueError(f"{where}: {name} is missing or dense, but has a quant_state")
        raise ValueError(f"{where}: {name}.{missing} is missing")


def _split(key: str, array: np.ndarray, storage: str) -> tuple[str, str | None]:
    """The weight that a tensor belongs to, and which part of it the tensor is; None if it is not a part."""
    if match := _PART.fullmatch(key):
        name, part = match.groups()
        return name, "quant_state" if part.startswith(_STATE) else part
    column = array.ndim == 2 and array.shape[1] == 1 and array.dtype.name == storage  # bytes under another dtype's name
    packed = key.endswith(".weight") and (array.dtype == np.uint8 or column)
    return key, "weight" if packed else None


def _wanted(state: State) -> set[str]:
    nested = {"nested_absmax", "nested_quant_map"} if state.nested_offset is not None else set()
    return {"weight", "absmax", "quant_map", "quant_state"} | nested


def _state(key: str, array: np.ndarray, where: str) -> State:
    """The JSON object, each field checked on its own."""
    where = f"{where}: {key}"
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{where} is {array.dtype} of shape {array.shape}, expected bytes, uint8 (length,)")
    d = parse_object(array.tobytes(), where)
    nested = any(field in d for field in _NESTED)
    fields = {"quant_type", "blocksize", "dtype", "shape", *(_NESTED if nested else ())}
    for field in sorted(fields ^ d.keys()):
        raise ValueError(f'{where}: "{cut(field, 60)}" is {"missing" if field in fields else "not expected"}')

    kind = key.rpartition("__")[2]
    shape, offset, top = d["shape"], d.get("nested_offset"), float(np.finfo(np.float32).max)
    for field, good, expected in [
        ("quant_type", d["quant_type"] in TYPES, f"one of {', '.join(TYPES)}"),
        ("quant_type", d["quant_type"] == kind, f'"{kind}" as in the key'),
        ("blocksize", type(d["blocksize"]) is int and d["blocksize"] in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
        ("dtype", d["dtype"] in tuple(DENSE_DTYPES), f"one of {', '.join(DENSE_DTYPES)}"),
        ("shape", isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**40 for n in shape),
         "two whole numbers, 1 to 2^40"),
        ("nested_blocksize", not nested or d["nested_blocksize"] == NESTED_BLOCK, str(NESTED_BLOCK)),
        ("nested_dtype", not nested or d["nested_dtype"] == "float32", '"float32"'),
        ("nested_offset", not nested or number(-top, top).fits(offset), "a finite number"),
    ]:  # fmt: skip
        if not good:
            raise ValueError(f"{where}: {field}: expected {expected}, got {shown(d[field])}")
    offset = np.float32(offset) if nested else None
    return State(d["quant_type"], d["blocksize"], DENSE_DTYPES[d["dtype"]], tuple(shape), offset)


def _assembled(name: str, parts: dict[str, Any], where: str) -> QuantizedTensor:
    state: State = parts.pop("quant_state")
    for part in sorted(parts.keys() - _wanted(state)):
        raise ValueError(f"{where}: {name}.{part} is not expected: by its quant_state, absmax is not quantised")
    n = math.prod(state.shape)
    nested, blocks = state.nested_offset is not None, -(-n // state.blocksize)
    expected = {
        "weight": ("uint8", (-(-n // 2), 1)),
        "absmax": ("uint8" if nested else "float32", (blocks,)),
        "quant_map": ("float32", (16,)),
        "nested_absmax": ("float32", (-(-blocks // NESTED_BLOCK),)),
        "nested_quant_map": ("float32", (256,)),
    }
    for part, (dtype, shape) in expected.items():
        if part not in parts:
            continue
        key, array = name if part == "weight" else f"{name}.{part}", parts[part]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{where}: {key} is {array.dtype} of shape {array.shape}, expected {dtype} of shape {shape}: "
                f"{state.shape[0]} x {state.shape[1]} weights in blocks of {state.blocksize}"
            )
        if dtype == "float32":
            finite(f"{where}: {key}", array)
    if not np.array_equal(parts["quant_map"], CODEBOOKS[state.quant_type]):
        raise ValueError(f"{where}: {name}.quant_map is not the codebook of {state.quant_type}")
    q = QuantizedTensor(
        packed=parts["weight"].reshape(-1),
        absmax=parts["absmax"],
        codebook=_shared(parts["quant_map"], CODEBOOKS[state.quant_type]),
        shape=state.shape,
        block_size=state.blocksize,
        dtype=state.dtype,
        nested_absmax=parts.get("nested_absmax"),
        offset=state.nested_offset,
        nested_codebook=_shared(parts.get("nested_quant_map", DYNAMIC), DYNAMIC),
    )
    if nested:
        with np.errstate(over="ignore"):
            finite(f"{where}: {name}.absmax, dequantised", q.constants())
    return q


def _shared(table: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Our table if the file's has the same bits, so that a model holds it once; else the file's."""
    return ours if table.tobytes() == ours.tobytes() else table


# ---- out -------------------------------------------------------------------------------------------------------


def disassemble(
    params: Mapping[str, Array | QuantizedTensor], dtype: Any, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `assemble`: dense tensors in `dtype`, and the parts of quantised ones.

    Raises ValueError, beginning with `where` and the tensor's name, for a number that is not finite or too large for
    `dtype`.
    """
    for name, param in params.items():
        if isinstance(param, QuantizedTensor):
            yield from parts_of(name, param)
        else:
            yield name, finite(f"{where}: {name}", param, dtype)


def parts_of(name: str, q: QuantizedTensor) -> Iterator[tuple[str, np.ndarray]]:
    """(key, array) of one weight's parts, equal to bitsandbytes' own to the byte.

    A float64 weight is recorded as float32, as bitsandbytes does not know float64. Raises ValueError for a codebook
    that it does not know.
    """
    kind = type_of(name, q)
    state = {
        "quant_type": kind,
        "blocksize": q.block_size,
        "dtype": q.dtype.name if q.dtype.name in DENSE_DTYPES else "float32",
        "shape": list(q.shape),
    }
    yield name, q.packed.reshape(-1, 1)
    yield f"{name}.absmax", q.absmax
    if q.nested_absmax is not None and q.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.offset)}
        yield f"{name}.nested_absmax", q.nested_absmax
        yield f"{name}.nested_quant_map", q.nested_codebook
    yield f"{name}.quant_map", q.codebook
    yield f"{name}.{_STATE}{kind}", np.frombuffer(json.dumps(state).encode(), np.uint8)


def type_of(name: str, q: QuantizedTensor) -> str:
    """bitsandbytes' name of a weight's codebook. Raises ValueError if it is not one of bitsandbytes'."""
    for kind in TYPES:
        if np.array_equal(q.codebook, CODEBOOKS[kind]):
            return kind
    raise ValueError(f"{name}: expected a codebook of bitsandbytes ({' or '.join(TYPES)}), got another")


def config_of(params: Mapping[str, Array | QuantizedTensor], linears: list[str], dtype: Any) -> dict[str, Any]:
    """{"quantization_config": ...} for a model's config.json, or {} if no weight is quantised.

    linears: names without .weight; the dense ones are listed as skipped. dtype: of the dense tensors. Raises
    ValueError if NF4 and FP4 are mixed.
    """
    quantized = {name: p for name, p in params.items() if isinstance(p, QuantizedTensor)}
    if not quantized:
        return {}
    kinds = sorted({type_of(name, q) for name, q in quantized.items()})
    if len(kinds) > 1:
        raise ValueError(f"expected one type of 4 bits, got {' and '.join(kinds)} in one model")
    nested = any(q.nested_absmax is not None for q in quantized.values())
    skipped = [name for name in [*linears, "lm_head"] if name + ".weight" not in quantized]
    return {"quantization_config": config_for(kinds[0], nested, np.dtype(dtype), skipped)}


def config_for(kind: str, nested: bool, dtype: np.dtype, skipped: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The quantization_config for weights of type `kind`, their constants quantised if `nested`.

    dtype: of the dense tensors; bitsandbytes computes in it. skipped: the dense linears; the list is left out if it is
    transformers' default, the output head alone.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype.name if dtype.name in DENSE_DTYPES else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None if list(skipped) == ["lm_head"] else list(skipped),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }
