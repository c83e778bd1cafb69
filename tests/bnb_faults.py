"""Faults of a bitsandbytes 4-bit checkpoint, and what each error must name."""

import json

import numpy as np

import refqlora as rq
from refqlora.files import bnb
from refqlora.files.reading import read_tensors
from refqlora.files.writing import write_tensors

Q = "model.layers.1.self_attn.q_proj.weight"  # (48, 20): 960 weights, 480 bytes, 15 blocks
STATE = Q + ".quant_state.bitsandbytes__nf4"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
EMBEDDING = "model.embed_tokens.weight"


def edit(change):
    """A fault: `change(tensors)` in the file."""

    def spoil(directory):
        tensors = dict(read_tensors(directory / "model.safetensors"))
        change(tensors)
        write_tensors(directory / "model.safetensors", tensors)

    return spoil


def state(**changes):
    """A fault: fields of Q's JSON object; ... removes one."""

    def change(tensors):
        d = {**json.loads(tensors[STATE].tobytes()), **changes}
        text = json.dumps({key: x for key, x in d.items() if x is not ...})
        tensors[STATE] = np.frombuffer(text.encode(), np.uint8)

    return edit(change)


def put(key, make):
    """A fault: the tensor `key` becomes make(tensor)."""

    def change(tensors):
        tensors[key] = make(tensors.get(key))

    return edit(change)


def raw(text):
    return put(STATE, lambda x: np.frombuffer(text, np.uint8))


def drop(key):
    return edit(lambda tensors: tensors.pop(key))


def quantization(**changes):
    """A fault: fields of the config's quantization_config."""

    def spoil(directory):
        path = directory / "config.json"
        d = json.loads(path.read_text())
        d["quantization_config"] = {
            key: x for key, x in {**d["quantization_config"], **changes}.items() if x is not ...
        }
        path.write_text(json.dumps(d))

    return spoil


def without_config(directory):
    d = json.loads((directory / "config.json").read_text())
    del d["quantization_config"]
    (directory / "config.json").write_text(json.dumps(d))


def of(array, value):
    array = array.copy()
    array.reshape(-1)[-1] = value
    return array


FAULTS = {
    **{f"without {part or 'the weight'}": (drop(Q + part), [Q + part, "missing"]) for part in PARTS},
    "dense, with parts": (put(Q, lambda x: np.ones((48, 20), np.float32)), [Q, "missing or dense"]),
    "nothing but a part": (
        put("model.norm.weight.absmax", lambda x: np.ones(3, np.float32)),
        ["model.norm.weight has 4 bits, but model.norm.weight.quant_state.bitsandbytes__nf4", "missing"],
    ),
    "a part of no weight": (put("a.weight.quant_map", lambda x: rq.NF4), ["a.weight has 4 bits"]),
    "bytes that are no part": (
        put("model.norm.bias", lambda x: np.ones(3, np.uint8)),
        ["model.norm.bias is uint8 of shape (3,), not part of a 4-bit weight"],
    ),
    "8 bits": (put(Q, lambda x: np.ones((48, 20), np.int8)), [Q, "is int8 of shape (48, 20), not part"]),
    "integers": (put(Q, lambda x: np.ones((48, 20), np.int64)), [Q, "int64"]),
    "an embedding": (
        edit(lambda t: t.update(bnb.parts_of(EMBEDDING, rq.quantize(t.pop(EMBEDDING))))),
        [EMBEDDING, "only linears may be quantised"],
    ),
    "the state twice": (
        put(STATE.replace("nf4", "fp4"), lambda x: np.frombuffer(b"{}", np.uint8)),
        [Q + ".quant_state.bitsandbytes__"],
    ),
    "an unknown type": (
        edit(lambda t: t.update({STATE.replace("nf4", "nf3"): t.pop(STATE)})),
        [Q + ".quant_state.bitsandbytes__nf3", "quant_type: expected", "got 'nf4'", '"nf3" as in the key'],
    ),
    "an unknown type, twice": (state(quant_type="nf5"), [STATE, "quant_type: expected one of nf4, fp4", "got 'nf5'"]),
    "another type than the key's": (state(quant_type="fp4"), [STATE, "quant_type: expected \"nf4\" as in the key"]),
    "bytes too few": (put(Q, lambda x: x[:-1]), [Q, "uint8 of shape (479, 1), expected uint8 of shape (480, 1)"]),
    "bytes too many": (put(Q, lambda x: np.append(x, x)[:, None]), [Q, "(960, 1)", "48 x 20 weights in blocks of 64"]),
    "bytes in a row": (put(Q, lambda x: x.T), [Q, "(1, 480)", "expected uint8 of shape (480, 1)"]),
    "absmax too short": (put(Q + ".absmax", lambda x: x[:-1]), [Q + ".absmax", "(14,)", "uint8 of shape (15,)"]),
    "absmax not in codes": (put(Q + ".absmax", lambda x: x.astype("f4")), [Q + ".absmax", "float32", "expected uint8"]),
    "nested absmax too long": (
        put(Q + ".nested_absmax", lambda x: np.append(x, x)),
        [Q + ".nested_absmax", "(2,)", "expected float32 of shape (1,)"],
    ),
    "nested absmax in float64": (put(Q + ".nested_absmax", lambda x: x.astype("f8")), ["nested_absmax", "float64"]),
    "nested absmax not finite": (put(Q + ".nested_absmax", lambda x: of(x, np.nan)), ["nested_absmax: expected fin"]),
    "nested map too short": (put(Q + ".nested_quant_map", lambda x: x[1:]), [Q + ".nested_quant_map", "(255,)"]),
    "nested map not finite": (put(Q + ".nested_quant_map", lambda x: of(x, np.inf)), ["nested_quant_map: expected"]),
    "another codebook": (put(Q + ".quant_map", lambda x: of(x, 0.5)), [Q + ".quant_map is not the codebook of nf4"]),
    "a codebook of 15": (put(Q + ".quant_map", lambda x: x[1:]), [Q + ".quant_map", "(15,)", "expected float32"]),
    "a codebook not finite": (put(Q + ".quant_map", lambda x: of(x, -np.inf)), [Q + ".quant_map: expected"]),
    "JSON cut short": (put(STATE, lambda x: x[:-9]), [STATE, "not valid JSON"]),
    "JSON empty": (raw(b""), [STATE, "not valid JSON"]),
    "JSON not UTF-8": (raw(b'{"\xff": 1}'), [STATE, "not valid JSON"]),
    "JSON too deep": (raw(b"[" * 100_000), [STATE, "not valid JSON"]),
    "JSON a list": (raw(b"[1]"), [STATE, "expected a JSON object, got list"]),
    "JSON as floats": (put(STATE, lambda x: np.ones(9, np.float32)), [STATE, "float32 of shape (9,), expected bytes"]),
    "no blocksize": (state(blocksize=...), [STATE, '"blocksize" is missing']),
    "no shape": (state(shape=...), [STATE, '"shape" is missing']),
    "a field more": (state(axis=1), [STATE, '"axis" is not expected']),
    "half nested": (state(nested_offset=...), [STATE, '"nested_offset" is missing']),
    "blocksize not allowed": (state(blocksize=65), [STATE, "blocksize: expected one of (32, 64,", "got 65"]),
    "blocksize another": (state(blocksize=128), [Q + ".absmax", "expected uint8 of shape (8,)", "blocks of 128"]),
    "blocksize no number": (state(blocksize="64"), [STATE, "blocksize: expected", "got '64'"]),
    "blocksize not whole": (state(blocksize=64.0), [STATE, "blocksize: expected", "got 64.0"]),
    "blocksize 0": (state(blocksize=0), [STATE, "blocksize: expected", "got 0"]),
    "dtype unknown": (state(dtype="int8"), [STATE, "dtype: expected one of float32, float16", "got 'int8'"]),
    "dtype a list": (state(dtype=["float32"]), [STATE, "dtype: expected", "got ['float32']"]),
    "shape another": (state(shape=[48, 22]), [Q + " is uint8 of shape (480, 1)", "(528, 1)", "48 x 22"]),
    "shape turned": (state(shape=[20, 48]), [Q, "(20, 48)", "expected (48, 20)"]),
    "shape huge": (state(shape=[2**31, 2**31]), [Q, "expected uint8 of shape (2305843009213693952, 1)"]),
    "shape absurd": (state(shape=[10**30, 20]), [STATE, "shape: expected two whole numbers, 1 to 2^40"]),
    "shape negative": (state(shape=[-48, -20]), [STATE, "shape: expected", "got [-48, -20]"]),
    "shape flat": (state(shape=[960]), [STATE, "shape: expected two", "got [960]"]),
    "shape of floats": (state(shape=[48.0, 20.0]), [STATE, "shape: expected", "got [48.0, 20.0]"]),
    "shape null": (state(shape=None), [STATE, "shape: expected", "got None"]),
    "nested blocksize": (state(nested_blocksize=128), [STATE, "nested_blocksize: expected 256", "got 128"]),
    "nested dtype": (state(nested_dtype="bfloat16"), [STATE, "nested_dtype: expected \"float32\"", "got 'bfloat16'"]),
    "offset NaN": (state(nested_offset=float("nan")), [STATE, "nested_offset: expected a finite number", "got nan"]),
    "offset beyond float32": (state(nested_offset=1e39), [STATE, "nested_offset: expected", "got 1e+39"]),
    "offset a string": (state(nested_offset="0.1"), [STATE, "nested_offset: expected", "got '0.1'"]),
    "not nested, but parts": (
        state(nested_offset=..., nested_dtype=..., nested_blocksize=...),
        [Q + ".nested_", "is not expected"],
    ),
    "config no object": (
        lambda d: (d / "config.json").write_text(
            json.dumps({**json.loads((d / "config.json").read_text()), "quantization_config": "nf4"})
        ),
        ["config.json: quantization_config: expected an object, got 'nf4'"],
    ),
    "another method": (quantization(quant_method="gptq"), ["quant_method: expected \"bitsandbytes\"", "got 'gptq'"]),
    "8 bits in the config": (quantization(load_in_8bit=True, load_in_4bit=False), ["load_in_8bit: expected load"]),
    "no bits": (quantization(load_in_4bit=...), ["load_in_4bit: expected true", "got None"]),
    "type in the config": (quantization(bnb_4bit_quant_type="int4"), ["quant_type: expected one of nf4, fp4, got"]),
    "storage in the config": (quantization(bnb_4bit_quant_storage="int3"), ["storage: expected", "got 'int3'"]),
    "storage a list": (quantization(bnb_4bit_quant_storage=["uint8"]), ["storage: expected", "got ['uint8']"]),
    "no quantization_config": (without_config, ["is uint8, expected one of float16"]),
}  # fmt: skip
