"""bitsandbytes' 4-bit checkpoints: the bits of the file in any order of its parts, and a name in every complaint."""

import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refqlora as rq
from refqlora import bnb
from refqlora.codebooks import CODEBOOKS, DYNAMIC, INT4
from refqlora.files import read_tensors, write_tensors

RECORDED = Path(__file__).parent / "fixtures" / "bnb_checkpoint"
SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "layers": 2,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 8,
}
Q = "model.layers.1.self_attn.q_proj.weight"  # (48, 20): 960 weights, 480 bytes, 15 blocks
STATE = Q + ".quant_state.bitsandbytes__nf4"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
CONFIG = bnb.quantization_config({"quantization_config": bnb.config_for("nf4", True, np.dtype("float32"))}, "")


def new_model(seed=0, **changes):
    """Every parameter random."""
    model = rq.Model.from_config(rq.Config(**{**SIZES, **changes}))
    rng = np.random.default_rng(seed)
    for p in model.params.values():
        p[...] = rng.standard_normal(p.shape)
    return model


@pytest.fixture
def saved(tmp_path):
    """A quantised model's directory."""
    model = new_model()
    model.quantize()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def complaint(path):
    with pytest.raises((ValueError, OSError)) as caught:
        rq.Model.from_pretrained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        if not isinstance(w, rq.QuantizedTensor):
            np.testing.assert_array_equal(found[name], w)
            continue
        for field in ("packed", "absmax", "codebook", "nested_absmax", "nested_codebook", "offset"):
            a, b = getattr(found[name], field), getattr(w, field)
            assert (a is None) == (b is None), (name, field)
            if b is not None:
                assert a.dtype == b.dtype
                assert a.tobytes() == b.tobytes(), (name, field)
        for field in ("shape", "block_size", "dtype"):
            assert getattr(found[name], field) == getattr(w, field), (name, field)


def stored(path):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in read_tensors(path / "model.safetensors")}


# ---- what the real libraries wrote ----


def test_a_recorded_checkpoint_comes_in_and_out_to_the_bit(tmp_path):
    model = rq.Model.from_pretrained(RECORDED)
    expected = json.loads((RECORDED / "dequantized.json").read_text())["dequantized"]
    quantized = {name: w for name, w in model.params.items() if isinstance(w, rq.QuantizedTensor)}
    assert quantized.keys() == expected.keys() == {name + ".weight" for name in model.config.linears()}
    for name, q in quantized.items():
        assert zlib.crc32(rq.dequantize(q, ml_dtypes.bfloat16).tobytes()) == expected[name], name
    model.save_pretrained(tmp_path, ml_dtypes.bfloat16)
    assert stored(tmp_path) == stored(RECORDED)
    theirs, ours = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (RECORDED, tmp_path))
    assert {key: theirs[key] for key in ours} == ours
    assert {key for key in theirs if not key.startswith("_")} == set(ours)


def test_tables_that_are_ours_are_shared():
    for q in rq.Model.from_pretrained(RECORDED).params.values():
        if isinstance(q, rq.QuantizedTensor):
            assert q.codebook is rq.NF4
            assert q.nested_codebook is DYNAMIC


def test_the_nested_codebook_of_the_file_counts_and_comes_back(saved, tmp_path):
    """It is computed where the file is written, and its last bits depend on the machine."""
    key = Q + ".nested_quant_map"
    put(key, lambda x: np.nextafter(x, np.float32(2), dtype=np.float32))(saved)
    model = rq.Model.from_pretrained(saved)
    q, table = model.params[Q], dict(read_tensors(saved / "model.safetensors"))[key]
    expected = table[q.absmax] * np.repeat(q.nested_absmax, 256)[: q.absmax.size] + q.offset
    np.testing.assert_array_equal(q.constants(), expected)
    assert not np.array_equal(q.constants(), replace(q, nested_codebook=DYNAMIC).constants())
    model.save_pretrained(tmp_path / "out")
    assert stored(tmp_path / "out") == stored(saved)


# ---- ours, theirs, ours ----


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_round_trips(kind, block_size, double_quant, tied, tmp_path):
    model = new_model(tied=tied)
    model.quantize(kind, block_size=block_size, double_quant=double_quant)
    model.save_pretrained(tmp_path)
    again = rq.Model.from_pretrained(tmp_path)
    assert_same_weights(again.params, model.params)
    tokens = np.arange(22).reshape(2, 11)
    np.testing.assert_array_equal(again.forward(tokens)[0], model.forward(tokens)[0])
    q = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (q["bnb_4bit_quant_type"], q["bnb_4bit_use_double_quant"]) == (kind, double_quant)
    assert q["llm_int8_skip_modules"] is None


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 80)),
    block_size=st.sampled_from([32, 64, 256]),
    kind=st.sampled_from(bnb.TYPES),
    nested=st.booleans(),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]),
    storage=st.sampled_from(bnb.STORAGE),
    seed=st.integers(0, 99),
)
def test_parts_in_any_order_make_the_same_weight(shape, block_size, kind, nested, dtype, storage, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(dtype)
    weights = {f"{i}.weight": rq.quantize(w, CODEBOOKS[kind], block_size, nested) for i in range(2)}
    norm = rng.standard_normal(5).astype(dtype)
    parts = [("norm.weight", norm), *(part for name, q in weights.items() for part in bnb.parts_of(name, q))]
    if storage != "uint8" and weights["0.weight"].packed.size % np.dtype(storage).itemsize == 0:
        named = np.dtype(storage) if storage != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
        parts = [(n, x.reshape(-1).view(named)[:, None] if n in weights else x) for n, x in parts]
    else:
        storage = "uint8"
    random.Random(seed).shuffle(parts)
    found = dict(bnb.assemble(iter(parts), {**CONFIG, "bnb_4bit_quant_storage": storage}, ""))
    assert found.pop("norm.weight") is norm
    assert_same_weights(found, weights)


def test_a_weight_comes_out_as_soon_as_it_is_whole():
    """So that no more than the weights in the making are held."""
    q = rq.quantize(np.ones((4, 32), np.float32))
    taken = []

    def tensors():
        for i in range(3):
            for key, x in bnb.parts_of(f"{i}.weight", q):
                taken.append(key)
                yield key, x

    for i, (name, _) in enumerate(bnb.assemble(tensors(), CONFIG, "")):
        assert name == f"{i}.weight"
        assert len(taken) == 6 * (i + 1)


def test_what_is_dense_is_listed_as_skipped(tmp_path):
    model = new_model()
    dense = model.params[Q]
    model.quantize()
    model.params[Q] = dense
    model.save_pretrained(tmp_path)
    q = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert q["llm_int8_skip_modules"] == [Q.removesuffix(".weight"), "lm_head"]
    assert_same_weights(rq.Model.from_pretrained(tmp_path).params, model.params)


def test_the_head_may_be_quantised(tmp_path):
    model = new_model()
    model.quantize()
    model.params["lm_head.weight"] = rq.quantize(model.params["lm_head.weight"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == []
    assert_same_weights(rq.Model.from_pretrained(tmp_path).params, model.params)


@pytest.mark.parametrize(
    ("dtype", "compute"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "bfloat16"), (np.float64, "float32")]
)
def test_bitsandbytes_computes_in_the_dtype_of_the_dense_tensors(dtype, compute, tmp_path):
    model = new_model()
    model.quantize()
    model.save_pretrained(tmp_path, dtype)
    d = json.loads((tmp_path / "config.json").read_text())
    assert d["quantization_config"]["bnb_4bit_compute_dtype"] == compute
    assert dict(read_tensors(tmp_path / "model.safetensors"))["model.norm.weight"].dtype == dtype


def test_a_float64_weight_is_said_to_be_float32():
    q = rq.quantize(np.ones((4, 32)))
    state = dict(bnb.parts_of("w", q))["w.quant_state.bitsandbytes__nf4"]
    assert json.loads(state.tobytes())["dtype"] == "float32"


def test_a_codebook_that_bitsandbytes_lacks_is_not_written(tmp_path):
    model = new_model()
    model.quantize("int4")
    assert model.params[Q].codebook is INT4
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: its codebook is none of .* nf4 and fp4"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_codebooks_in_one_model_are_not_written(tmp_path):
    model = new_model()
    model.params[Q] = rq.quantize(model.params[Q], CODEBOOKS["fp4"])
    model.quantize()
    with pytest.raises(ValueError, match="fp4 and nf4 in one model"):
        model.save_pretrained(tmp_path / "out")


def test_quantize_asks_for_the_type_of_the_file_or_none(saved):
    """A checkpoint keeps its bits: it is not quantised again, and a skipped linear stays dense."""
    expected = rq.Model.from_pretrained(saved).params
    assert_same_weights(rq.Model.from_pretrained(saved, quantize="nf4").params, expected)
    with pytest.raises(ValueError, match=r"config\.json: is quantised already, not to fp4: .* --no-quantize"):
        rq.Model.from_pretrained(saved, quantize="fp4")


def test_a_quantised_base_takes_an_adapter(saved):
    model = rq.Model.from_pretrained(saved)
    model.add_adapter(rank=2)
    logits, cache = model.forward(np.arange(22).reshape(2, 11))
    assert model.backward(logits, cache).keys() == model.trainable().keys()


# ---- what is wrong is said ----


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


EMBEDDING = "model.embed_tokens.weight"
FAULTS = {
    **{f"without {part or 'the weight'}": (drop(Q + part), [Q + part, "missing"]) for part in PARTS},
    "dense, with parts": (put(Q, lambda x: np.ones((48, 20), np.float32)), [Q, "missing or dense"]),
    "nothing but a part": (
        put("model.norm.weight.absmax", lambda x: np.ones(3, np.float32)),
        ["model.norm.weight is in 4 bits, but model.norm.weight.quant_state.bitsandbytes__nf4", "missing"],
    ),
    "a part of no weight": (put("a.weight.quant_map", lambda x: rq.NF4), ["a.weight is in 4 bits"]),
    "bytes that are no part": (
        put("model.norm.bias", lambda x: np.ones(3, np.uint8)),
        ["model.norm.bias is uint8 of shape (3,): no part of a 4-bit weight"],
    ),
    "8 bits": (put(Q, lambda x: np.ones((48, 20), np.int8)), [Q, "is int8 of shape (48, 20): no part"]),
    "integers": (put(Q, lambda x: np.ones((48, 20), np.int64)), [Q, "int64"]),
    "an embedding": (
        edit(lambda t: t.update(bnb.parts_of(EMBEDDING, rq.quantize(t.pop(EMBEDDING))))),
        [EMBEDDING, "only a linear's weight"],
    ),
    "the state twice": (
        put(STATE.replace("nf4", "fp4"), lambda x: np.frombuffer(b"{}", np.uint8)),
        [Q + ".quant_state.bitsandbytes__"],
    ),
    "an unknown type": (
        edit(lambda t: t.update({STATE.replace("nf4", "nf3"): t.pop(STATE)})),
        [Q + ".quant_state.bitsandbytes__nf3", '"quant_type" is "nf4"', '"nf3" as in the key'],
    ),
    "an unknown type, twice": (state(quant_type="nf5"), [STATE, '"quant_type" is "nf5", expected one of nf4, fp4']),
    "another type than the key's": (state(quant_type="fp4"), [STATE, '"quant_type" is "fp4"', '"nf4" as in the key']),
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
    "nested absmax not finite": (put(Q + ".nested_absmax", lambda x: of(x, np.nan)), [Q + ".nested_absmax holds nan"]),
    "nested map too short": (put(Q + ".nested_quant_map", lambda x: x[1:]), [Q + ".nested_quant_map", "(255,)"]),
    "nested map not finite": (put(Q + ".nested_quant_map", lambda x: of(x, np.inf)), ["nested_quant_map holds inf"]),
    "another codebook": (put(Q + ".quant_map", lambda x: of(x, 0.5)), [Q + ".quant_map is not the codebook of nf4"]),
    "a codebook of 15": (put(Q + ".quant_map", lambda x: x[1:]), [Q + ".quant_map", "(15,)", "expected float32"]),
    "a codebook not finite": (put(Q + ".quant_map", lambda x: of(x, -np.inf)), [Q + ".quant_map holds -inf"]),
    "JSON cut short": (put(STATE, lambda x: x[:-9]), [STATE, "not valid JSON"]),
    "JSON empty": (raw(b""), [STATE, "not valid JSON"]),
    "JSON not UTF-8": (raw(b'{"\xff": 1}'), [STATE, "not valid JSON"]),
    "JSON too deep": (raw(b"[" * 100_000), [STATE, "not valid JSON"]),
    "JSON a list": (raw(b"[1]"), [STATE, "expected a JSON object, found list"]),
    "JSON as floats": (put(STATE, lambda x: np.ones(9, np.float32)), [STATE, "float32 of shape (9,), expected bytes"]),
    "no blocksize": (state(blocksize=...), [STATE, 'has no "blocksize"']),
    "no shape": (state(shape=...), [STATE, 'has no "shape"']),
    "a field more": (state(axis=1), [STATE, 'does not know "axis"']),
    "half nested": (state(nested_offset=...), [STATE, 'has no "nested_offset"']),
    "blocksize not allowed": (state(blocksize=65), [STATE, '"blocksize" is 65, expected one of (32, 64,']),
    "blocksize another": (state(blocksize=128), [Q + ".absmax", "expected uint8 of shape (8,)", "blocks of 128"]),
    "blocksize no number": (state(blocksize="64"), [STATE, '"blocksize" is "64"']),
    "blocksize not whole": (state(blocksize=64.0), [STATE, '"blocksize" is 64.0']),
    "blocksize 0": (state(blocksize=0), [STATE, '"blocksize" is 0']),
    "dtype unknown": (state(dtype="int8"), [STATE, '"dtype" is "int8", expected one of float32, float16, bfloat16']),
    "dtype a list": (state(dtype=["float32"]), [STATE, '"dtype" is ["float32"]']),
    "shape another": (state(shape=[48, 22]), [Q + " is uint8 of shape (480, 1)", "(528, 1)", "48 x 22"]),
    "shape turned": (state(shape=[20, 48]), [Q, "(20, 48)", "expected (48, 20)"]),
    "shape huge": (state(shape=[2**31, 2**31]), [Q, "expected uint8 of shape (2305843009213693952, 1)"]),
    "shape absurd": (state(shape=[10**30, 20]), [STATE, '"shape" is', "two whole numbers, 1 to 2^40"]),
    "shape negative": (state(shape=[-48, -20]), [STATE, '"shape" is [-48, -20]']),
    "shape flat": (state(shape=[960]), [STATE, '"shape" is [960], expected two']),
    "shape of floats": (state(shape=[48.0, 20.0]), [STATE, '"shape" is [48.0, 20.0]']),
    "shape null": (state(shape=None), [STATE, '"shape" is null']),
    "nested blocksize": (state(nested_blocksize=128), [STATE, '"nested_blocksize" is 128, expected 256']),
    "nested dtype": (state(nested_dtype="bfloat16"), [STATE, '"nested_dtype" is "bfloat16", expected "float32"']),
    "offset NaN": (state(nested_offset=float("nan")), [STATE, '"nested_offset" is NaN, expected a finite number']),
    "offset beyond float32": (state(nested_offset=1e39), [STATE, '"nested_offset" is 1e+39']),
    "offset a string": (state(nested_offset="0.1"), [STATE, '"nested_offset" is "0.1"']),
    "not nested, but parts": (
        state(nested_offset=..., nested_dtype=..., nested_blocksize=...),
        [Q + ".nested_", "is not expected"],
    ),
    "config no object": (
        lambda d: (d / "config.json").write_text(
            json.dumps({**json.loads((d / "config.json").read_text()), "quantization_config": "nf4"})
        ),
        ['config.json: quantization_config must be an object, not "nf4"'],
    ),
    "another method": (quantization(quant_method="gptq"), ['"quant_method" is "gptq", expected "bitsandbytes"']),
    "8 bits in the config": (quantization(load_in_8bit=True, load_in_4bit=False), ['"load_in_8bit" is true', "4bit"]),
    "no bits": (quantization(load_in_4bit=...), ['"load_in_4bit" is null, expected true']),
    "type in the config": (quantization(bnb_4bit_quant_type="int4"), ['"bnb_4bit_quant_type" is "int4"', "nf4, fp4"]),
    "storage in the config": (quantization(bnb_4bit_quant_storage="int3"), ['"bnb_4bit_quant_storage" is "int3"']),
    "storage a list": (quantization(bnb_4bit_quant_storage=["uint8"]), ['"bnb_4bit_quant_storage" is ["uint8"]']),
    "no quantization_config": (without_config, ["is uint8, expected one of float16"]),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_a_spoilt_checkpoint_is_refused_by_name(saved, spoil, said):
    rq.Model.from_pretrained(saved)
    spoil(saved)
    message = complaint(saved)
    assert message.startswith((f"{saved / 'model.safetensors'}: ", f"{saved / 'config.json'}: ", f"{saved}: "))
    assert message.startswith(f"{saved}: ") == ("has shape" in message)  # which is between the two
    for part in said:
        assert part in message, message


def test_a_tied_head_of_its_own_is_refused(tmp_path):
    model = new_model(tied=True)
    model.quantize()
    model.save_pretrained(tmp_path)
    head = rq.quantize(model.params[EMBEDDING])
    edit(lambda tensors: tensors.update(bnb.parts_of("lm_head.weight", head)))(tmp_path)
    assert "lm_head.weight differs from the embedding" in complaint(tmp_path)


def test_parts_that_come_after_a_whole_weight_are_refused():
    q = rq.quantize(np.ones((4, 32), np.float32), double_quant=False)
    parts = list(bnb.parts_of("w.weight", q))
    late = [("w.weight.nested_absmax", np.ones(1, np.float32)), parts[1]]
    for extra in late:
        with pytest.raises(ValueError, match=r"^there: w\.weight\.\w+ is not expected"):
            list(bnb.assemble(iter([*parts, extra]), CONFIG, "there"))


def test_a_config_without_the_method_is_bitsandbytes_of_old():
    config = bnb.quantization_config({"quantization_config": {"load_in_4bit": True}}, "")
    assert config["bnb_4bit_quant_type"] == "fp4"
    assert config["bnb_4bit_quant_storage"] == "uint8"
