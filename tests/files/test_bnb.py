"""bitsandbytes' 4-bit checkpoints: the file's bits in any order of its parts, and a name in every error."""

import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bnb_faults import EMBEDDING, FAULTS, Q, edit, put
from hypothesis import given, settings
from hypothesis import strategies as st
from spoil import new_model

import refqlora as rq
from refqlora.codebooks import CODEBOOKS, DYNAMIC, INT4
from refqlora.files import bnb
from refqlora.files.reading import read_tensors

RECORDED = Path(__file__).parent / "fixtures" / "bnb_checkpoint"
CONFIG = bnb.quantization_config({"quantization_config": bnb.config_for("nf4", True, np.dtype("float32"))}, "")


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


def test_a_float64_weight_is_recorded_as_float32():
    q = rq.quantize(np.ones((4, 32)))
    state = dict(bnb.parts_of("w", q))["w.quant_state.bitsandbytes__nf4"]
    assert json.loads(state.tobytes())["dtype"] == "float32"


def test_a_codebook_that_bitsandbytes_lacks_is_not_written(tmp_path):
    model = new_model()
    model.quantize("int4")
    assert model.params[Q].codebook is INT4
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: expected a codebook of bitsandbytes \(nf4 or fp4\)"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_codebooks_in_one_model_are_not_written(tmp_path):
    model = new_model()
    model.params[Q] = rq.quantize(model.params[Q], CODEBOOKS["fp4"])
    model.quantize()
    with pytest.raises(ValueError, match="expected one type of 4 bits, got fp4 and nf4"):
        model.save_pretrained(tmp_path / "out")


def test_quantize_asks_for_the_type_of_the_file_or_none(saved):
    """A checkpoint keeps its bits: it is not quantised again, and a skipped linear stays dense."""
    expected = rq.Model.from_pretrained(saved).params
    assert_same_weights(rq.Model.from_pretrained(saved, quantize="nf4").params, expected)
    with pytest.raises(ValueError, match=r"config\.json: the model is quantised to nf4 already: .* --no-quantize"):
        rq.Model.from_pretrained(saved, quantize="fp4")


def test_a_quantised_base_takes_an_adapter(saved):
    model = rq.Model.from_pretrained(saved)
    model.add_adapter(rank=2)
    logits, cache = model.forward(np.arange(22).reshape(2, 11))
    assert model.backward(logits, cache).keys() == model.trainable().keys()


# ---- what is wrong is said ----


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_a_spoilt_checkpoint_is_refused_by_name(saved, spoil, said):
    rq.Model.from_pretrained(saved)
    spoil(saved)
    message = complaint(saved)
    assert message.startswith((f"{saved / 'model.safetensors'}: ", f"{saved / 'config.json'}: ", f"{saved}: "))
    assert message.startswith(f"{saved}: ") == ("has shape" in message)  # which is between the two
    for part in said:
        assert part in message, message


def test_a_tied_head_that_differs_is_refused(tmp_path):
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
