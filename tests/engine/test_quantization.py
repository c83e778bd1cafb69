"""The fast path against the definition, and both against what bitsandbytes made of the recorded tensors."""

import importlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refqlora import blockwise
from refqlora.blockwise import BLOCK_SIZES, dequantize_blockwise, quantize_blockwise, quantize_constants
from refqlora.codebooks import DYNAMIC, FP4, INT4, NF4, dynamic_map
from refqlora.files.reading import read_metadata, read_tensors
from refqlora.parity.checks import VECTORS
from refqlora.parity.quantization import cases, constants_cases
from refqlora.quantization import QuantizedTensor, dequantize, quantize, quantized_nbytes

BF16 = ml_dtypes.bfloat16
FLOATS = [np.float32, np.float16, BF16, np.float64]
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}

RECORDED = dict(read_tensors(VECTORS))
CASES = [(case, parts) for case, parts in cases(RECORDED) if "dequantised" in parts]
CONSTANTS = list(constants_cases(RECORDED))


# ---- the definition ----------------------------------------------------------------------------------------


def codes_by_definition(scaled, codebook):
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    return order[np.searchsorted((values[:-1] + values[1:]) / np.float32(2), scaled)]


def scale_by_definition(block, full):
    absmax = np.abs(block).max()
    divisor = np.maximum(absmax, np.float32(1e-38))
    return (block * (1 / divisor), absmax) if full else (block / divisor, divisor)


def by_definition(w, codebook, block_size, *, scale=scale_by_definition, decide=codes_by_definition, high_first=True):
    """(packed, absmax, dequantised), block after block. The keywords are where mistakes are planted."""
    flat = w.reshape(-1).astype(np.float32)
    codes, absmax, back = [decide(np.zeros(0, np.float32), codebook)], [], []
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        scaled, a = scale(block, block.size == block_size)
        codes.append(decide(scaled, codebook))
        absmax.append(a)
        back.append(codebook[codes[-1]] * a)
    codes = np.concatenate(codes)
    if codes.size % 2:
        codes = np.append(codes, decide(np.zeros(1, np.float32), codebook))
    first, second = (codes[0::2], codes[1::2]) if high_first else (codes[1::2], codes[0::2])
    packed = (first << 4 | second).astype(np.uint8)
    back = np.concatenate([*back, np.zeros(0, np.float32)]).reshape(w.shape)
    return packed, np.array(absmax, np.float32), back


def bits(x):
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def same(found, expected):
    """Equal to the bit, NaN and -0.0 included."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


@st.composite
def tensors(draw):
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 12), max_size=4).map(tuple),
            st.tuples(st.integers(1, 40), st.integers(1, 300)),
            st.tuples(st.integers(1, 20000)),
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-4, 2))
    kind = draw(st.sampled_from(["plain", "zeros", "outlier", "sparse", "ties"]))
    if w.size:
        flat = w.reshape(-1)
        if kind == "zeros":
            flat[rng.integers(w.size) :] = 0
        elif kind == "outlier":
            flat[rng.integers(w.size)] = 5e4
        elif kind == "sparse":
            flat[rng.random(w.size) < 0.9] = -0.0
        elif kind == "ties":
            values = np.sort(NF4)
            flat[:] = rng.choice((values[:-1] + values[1:]) / 2, w.size)
            flat[::32] = 1
    return w.astype(draw(st.sampled_from(FLOATS)))


@settings(deadline=None, max_examples=200)
@given(
    w=tensors(),
    block_size=st.sampled_from(BLOCK_SIZES),
    codebook=st.sampled_from(list(CODEBOOKS.values())),
    small_chunks=st.booleans(),
)
def test_fast_path_is_the_definition(w, block_size, codebook, small_chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "CHUNK", 4096 if small_chunks else blockwise.CHUNK)
        q = quantize(w, codebook, block_size, double_quant=False)
        found = dequantize(q)
    packed, absmax, back = by_definition(w, codebook, block_size)
    same(q.packed, packed)
    same(q.absmax, absmax)
    assert (q.shape, q.size, q.dtype) == (w.shape, w.size, w.dtype)
    assert found.shape == w.shape
    same(found, back)


@settings(deadline=None, max_examples=60)
@given(w=tensors(), signed=st.booleans(), block_size=st.sampled_from(BLOCK_SIZES))
def test_blockwise_is_the_definition(w, signed, block_size):
    codebook = dynamic_map(signed)
    codes, absmax = quantize_blockwise(w, codebook, block_size)
    assert (codes.shape, codes.dtype) == (w.shape, np.uint8)
    _, expected_absmax, back = by_definition(w, codebook, block_size)
    same(absmax, expected_absmax)
    same(dequantize_blockwise(codes, absmax, codebook, block_size), back)


@settings(deadline=None, max_examples=60)
@given(w=tensors(), block_size=st.sampled_from(BLOCK_SIZES[:3]))
def test_double_quantisation_is_quantisation_of_the_constants_less_their_mean(w, block_size):
    single = quantize(w, block_size=block_size, double_quant=False)
    q = quantize(w, block_size=block_size)
    same(q.packed, single.packed)
    mean = np.float32(single.absmax.astype(np.float64).mean()) if w.size else np.float32(0)
    assert q.offset == mean
    _, nested, back = by_definition(single.absmax - mean, DYNAMIC, 256)
    same(q.nested_absmax, nested)
    same(q.constants(), back + mean)
    expected = QuantizedTensor(q.packed, q.constants(), NF4, q.shape, block_size, q.dtype)
    same(dequantize(q), dequantize(expected))


@settings(deadline=None, max_examples=60)
@given(w=tensors(), block_size=st.sampled_from(BLOCK_SIZES))
def test_what_came_back_quantises_to_itself(w, block_size):
    q = quantize(w, block_size=block_size, double_quant=False)
    again = quantize(dequantize(q), block_size=block_size, double_quant=False)
    same(again.packed, q.packed)
    same(dequantize(again), dequantize(q))


@settings(deadline=None, max_examples=60)
@given(w=tensors(), block_size=st.sampled_from(BLOCK_SIZES))
def test_error_is_at_most_half_the_widest_gap(w, block_size):
    q = quantize(w, block_size=block_size, double_quant=False)
    limit = np.repeat(q.absmax, block_size)[: w.size].reshape(w.shape) * np.diff(NF4).max() / 2
    assert (np.abs(dequantize(q) - w.astype(np.float32)) <= limit * (1 + 1e-6)).all()


# ---- recorded from bitsandbytes ----------------------------------------------------------------------------


def test_the_vectors_say_where_they_come_from():
    assert {"bitsandbytes", "torch", "numpy", "machine"} <= set(read_metadata(VECTORS))
    assert len(CASES) == 36


@pytest.mark.parametrize(("case", "parts"), CASES, ids=[case.key for case, _ in CASES])
def test_recorded(case, parts):
    w = RECORDED[f"w/{case.tensor}"]
    q = quantize(w, CODEBOOKS[case.kind], case.block_size, double_quant=False)
    same(q.packed, parts["packed"])
    same(q.absmax, parts["absmax"])
    found, expected = dequantize(q, w.dtype), parts["dequantised"]
    zero = found == 0  # of either sign: FP4's second zero is -0.0 in some of their kernels
    assert (expected[zero] == 0).all()
    same(found[~zero], expected[~zero])


@pytest.mark.parametrize(("name", "parts"), CONSTANTS, ids=[name for name, _ in CONSTANTS])
def test_recorded_constants_are_binned_and_not_the_nearest(name, parts):
    offset = np.float32(parts["offset"])
    codes, absmax, _ = quantize_constants(parts["absmax"], "bitsandbytes", offset)
    same(codes, parts["binned"])
    same(absmax, parts["nested_absmax"])
    exact, _, _ = quantize_constants(parts["absmax"], offset=offset)
    same(exact, RECORDED[f"8bit/{name}/nearest"])
    if name == "equal to the mean":
        assert offset == 2
        assert (codes[256:] == 0).all()
        assert (codes[1:256:2] == 131).all()  # an exact zero beside others falls into a bin that is not zero's
        assert (exact[1:256:2] == 127).all()
    if name == "ordinary":
        assert np.abs(exact.astype(int) - codes).max() == 1
    if name == "ties":
        assert offset == 0
        assert np.abs(exact.astype(int) - codes).max() > 1  # some values lie closer together than the bins


def upward(scaled, codebook):
    """A tie goes up."""
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    return order[np.searchsorted((values[:-1] + values[1:]) / np.float32(2), scaled, side="right")]


def by_distance(scaled, codebook):
    """The nearest by float32 distance, not by a threshold."""
    return np.abs(scaled[:, None] - codebook).argmin(axis=1)


def divide(block, full):
    divisor = np.maximum(np.abs(block).max(), np.float32(1e-38))
    return block / divisor, np.abs(block).max() if full else divisor


def multiply_tail_too(block, full):
    divisor = np.maximum(np.abs(block).max(), np.float32(1e-38))
    return block * (1 / divisor), np.abs(block).max() if full else divisor


def no_least_divisor(block, full):
    absmax = np.abs(block).max()
    with np.errstate(all="ignore"):
        scaled = block * (1 / absmax) if full else block / absmax
    return np.where(np.isnan(scaled), 0, scaled).astype(np.float32), absmax


MISTAKES = {
    "nothing": {},
    "swapped nibbles": {"high_first": False},
    "ties go up": {"decide": upward},
    "distances for thresholds": {"decide": by_distance},
    "a division for the reciprocal": {"scale": divide},
    "the reciprocal in the tail too": {"scale": multiply_tail_too},
    "no least divisor": {"scale": no_least_divisor},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_recorded_tensors_tell_a_mistake(mistake):
    wrong = 0
    for case, parts in CASES:
        w = RECORDED[f"w/{case.tensor}"]
        packed, absmax, _ = by_definition(w, CODEBOOKS[case.kind], case.block_size, **MISTAKES[mistake])
        wrong += np.count_nonzero(packed != parts["packed"])
        wrong += np.count_nonzero(absmax != parts["absmax"])
    assert (wrong > 0) == (mistake != "nothing")


def test_recorded_constants_tell_an_offset_left_out():
    parts = dict(CONSTANTS)["ordinary"]
    codes, _, _ = quantize_constants(parts["absmax"], "bitsandbytes", np.float32(0))
    assert np.mean(codes != parts["binned"]) > 0.9


# ---- awkward values ----------------------------------------------------------------------------------------


def test_zeros_come_back_as_zeros():
    for n in (1, 64, 65, 200):
        for double_quant in (False, True):
            q = quantize(np.zeros(n, np.float32), double_quant=double_quant)
            assert (q.packed == 0x77).all()
            assert (dequantize(q) == 0).all()
    same(dequantize(quantize(np.zeros(65, np.float32), double_quant=False)), np.zeros(65, np.float32))


def test_the_order_of_nibbles_and_the_filling():
    assert quantize(np.float32([1, -1])).packed.tolist() == [0xF0]
    assert quantize(np.float32([1, -1, 1])).packed.tolist() == [0xF0, 0xF7]
    assert quantize(np.float32([1, -1, 1]), INT4).packed.tolist() == [0xF1, 0xF8]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 3e-39, 1e-38, 3e38])
def test_tiny_and_huge_stay_finite(scale, double_quant):
    w = np.random.default_rng(0).uniform(-1, 1, (5, 70)).astype(np.float32) * np.float32(scale)
    back = dequantize(quantize(w, double_quant=double_quant))
    assert np.isfinite(back).all()
    assert np.abs(back - w).max() <= max(0.2 * scale, 1e-38)


def test_an_outlier_spoils_its_own_block_only():
    w = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    spoilt = w.copy()
    spoilt[70] = 1e6
    a, b = (dequantize(quantize(x, double_quant=False)) for x in (w, spoilt))
    changed = np.flatnonzero((a != b).reshape(4, 64).any(axis=1))
    assert changed.tolist() == [1]
    assert (b[64:128] != 0).sum() == 1


def test_any_layout_is_read_in_row_major_order():
    w = np.random.default_rng(0).standard_normal((48, 80)).astype(np.float32)
    for view in (w.T, w[::2, ::-1], np.broadcast_to(w[0], (7, 80))):
        same(quantize(view).packed, quantize(view.copy()).packed)


def test_the_input_is_left_alone():
    w = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    before = w.copy()
    quantize(w)
    quantize_blockwise(w, DYNAMIC, 32)
    same(w, before)


# ---- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: np.dtype(t).name)
def test_dequantise_casts_once_from_float32(dtype):
    q = quantize(np.random.default_rng(0).standard_normal((37, 41)).astype(np.float32))
    same(dequantize(q, dtype), dequantize(q).astype(dtype))
    out = np.full(q.shape, np.nan, dtype)
    assert dequantize(q, out=out) is out
    same(out, dequantize(q, dtype))


def test_out_must_fit():
    q = quantize(np.ones((4, 6), np.float32))
    for out in (np.empty((6, 4), np.float32), np.empty((4, 12), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match=r"out: expected .* of shape \(4, 6\), got"):
            dequantize(q, out=out)


def test_bits_per_parameter():
    assert quantized_nbytes(4096 * 4096) == 8_388_608 + 262_144 + 1_024 * 4
    assert 8 * quantized_nbytes(4096 * 4096) / 4096**2 == 4.126953125
    assert 8 * quantized_nbytes(4096 * 4096, double_quant=False) / 4096**2 == 4.5
    w = np.zeros((128, 128), np.float32)
    assert quantize(w).bits_per_param == 4.126953125
    assert quantize(w, double_quant=False).bits_per_param == 4.5
    assert quantize(w[:0]).bits_per_param == 0


@settings(deadline=None, max_examples=60)
@given(w=tensors(), block_size=st.sampled_from(BLOCK_SIZES), double_quant=st.booleans())
def test_bytes_are_those_of_the_arrays(w, block_size, double_quant):
    q = quantize(w, block_size=block_size, double_quant=double_quant)
    arrays = [q.packed, q.absmax] + ([q.nested_absmax] if double_quant else [])
    assert q.nbytes == sum(len(x.tobytes()) for x in arrays) == quantized_nbytes(w.size, block_size, double_quant)
    assert q.constants_nbytes == q.nbytes - q.packed.nbytes


def test_repr_says_what_it_is():
    assert repr(quantize(np.zeros((128, 128), np.float16))) == (
        "QuantizedTensor((128, 128) in nf4, blocks of 64, double-quantised; 8,452 bytes, 4.127 bits a parameter)"
    )


def test_as_an_array_it_is_dequantised():
    q = quantize(np.random.default_rng(0).standard_normal((7, 30), np.float32))
    np.testing.assert_array_equal(np.asarray(q), dequantize(q))
    assert np.asarray(q, np.float16).dtype == np.float16


def test_what_is_no_array_is_made_one():
    np.testing.assert_array_equal(quantize([[0.5, -1.0]]).packed, quantize(np.array([[0.5, -1.0]])).packed)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_a_codebook_goes_by_its_name(name):
    w = np.random.default_rng(0).standard_normal(640, np.float32)
    np.testing.assert_array_equal(quantize(w, name).packed, quantize(w, CODEBOOKS[name]).packed)


def test_elsewhere_than_on_a_cpu(monkeypatch):
    """The way a GPU takes, with NumPy under another name: at once, and by search."""
    w = np.random.default_rng(0).standard_normal((37, 41)).astype(np.float16)
    on_cpu = {kind: quantize(w, codebook) for kind, codebook in CODEBOOKS.items()}
    back = {kind: dequantize(q) for kind, q in on_cpu.items()}
    elsewhere = SimpleNamespace(**{**vars(np), "__name__": "cupy"})
    for name in ("refqlora.blockwise", "refqlora.quantization", "refqlora.codebooks"):
        monkeypatch.setattr(importlib.import_module(name), "array_module", lambda x: elsewhere)
    monkeypatch.setattr(blockwise, "CHUNK", None)
    for kind, expected in on_cpu.items():
        q = quantize(w, CODEBOOKS[kind])
        for part in ("packed", "absmax", "nested_absmax"):
            same(getattr(q, part), getattr(expected, part))
        same(dequantize(q), back[kind])


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: np.dtype(t).name)
def test_what_is_not_finite_is_refused_by_name_and_place(value, dtype):
    w = np.ones((3, 5, 7), dtype)
    w[1, 2, 3] = value
    w[2, 4, 6] = np.nan
    with pytest.raises(ValueError, match=rf"layers\.0\.q_proj: expected finite numbers, got {value} at \(1, 2, 3\)"):
        quantize(w, name="layers.0.q_proj")
    with pytest.raises(ValueError, match=rf"state: expected finite numbers, got {value} at \(1, 2, 3\)"):
        quantize_blockwise(w, DYNAMIC, 256, name="state")


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"tensor: expected a number that float32 holds, got 1e\+39 at \(1,\)"):
        quantize(np.array([1, 1e39]))


@pytest.mark.parametrize("block_size", [0, 16, 63, 96, 8192, -64, None, 64.0, "64", "(" * 10_000])
def test_block_size_is_checked(block_size):
    w = np.ones(100, np.float32)
    for call in (
        lambda: quantize(w, block_size=block_size, name="w"),
        lambda: quantize_blockwise(w, DYNAMIC, block_size, name="w"),
        lambda: dequantize_blockwise(np.zeros(100, np.uint8), w, DYNAMIC, block_size),
        lambda: quantized_nbytes(100, block_size),
    ):
        with pytest.raises(ValueError, match="block_size: expected one of") as error:
            call()
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.complex64, ml_dtypes.float8_e4m3fn])
def test_dtype_is_checked(dtype):
    with pytest.raises(ValueError, match=rf"w: dtype: expected one of float16, .*got {np.dtype(dtype)}"):
        quantize(np.ones(4, dtype), name="w")
    with pytest.raises(ValueError, match=r"dtype: expected .*, got <U1"):
        quantize("x")


def test_codebook_is_checked():
    w = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"w: codebook: expected nf4, fp4, int4 or 16 values of float32, got .*256"):
        quantize(w, DYNAMIC, name="w")
    with pytest.raises(ValueError, match="got float64"):
        quantize(w, NF4.astype(np.float64))
    for codebook in ("nf3", None, 4):
        with pytest.raises(ValueError, match=f"codebook: .*, got {codebook!r}"):
            quantize(w, codebook)
    for codebook in (NF4[:1], np.zeros(257, np.float32), DYNAMIC.astype(np.float64), NF4.reshape(4, 4)):
        with pytest.raises(ValueError, match="or 2 to 256 values"):
            quantize_blockwise(w, codebook, 64)
        with pytest.raises(ValueError, match="or 2 to 256 values"):
            dequantize_blockwise(np.zeros(4, np.uint8), w[:1], codebook, 64)


def test_nested_is_checked():
    with pytest.raises(ValueError, match="nested: expected one of nearest, bitsandbytes, got 'exact'"):
        quantize(np.ones(4, np.float32), nested="exact")


def test_dequantise_blockwise_checks_what_it_is_given():
    codes = np.uint8([0, 15, 16])
    with pytest.raises(ValueError, match="codes: expected below 16, got 16"):
        dequantize_blockwise(codes, np.ones(1, np.float32), NF4, 64)
    with pytest.raises(ValueError, match=r"absmax: expected shape \(1,\), got \(2,\)"):
        dequantize_blockwise(codes, np.ones(2, np.float32), DYNAMIC, 64)


def test_fields_that_disagree_are_refused():
    q = quantize(np.ones((4, 70), np.float32))
    good = dict(vars(q))
    QuantizedTensor(**good)
    for field, value, message in [
        ("packed", q.packed[:-1], r"packed: expected uint8 of shape \(140,\), got uint8 of shape \(139,\)"),
        ("packed", q.packed[:, None], "packed: expected"),
        ("packed", q.packed.astype(np.int8), "got int8"),
        ("shape", (4, 71), r"QuantizedTensor of shape \(4, 71\): packed: expected"),
        ("block_size", 32, r"absmax: expected uint8 of shape \(9,\)"),
        ("block_size", 48, "block_size: expected one of"),
        ("absmax", q.constants(), "absmax: expected uint8"),
        ("codebook", DYNAMIC, "codebook: expected"),
        ("nested_codebook", NF4, r"nested_codebook: expected float32 of shape \(256,\)"),
        ("nested_absmax", np.zeros(2, np.float32), "nested_absmax: expected"),
        ("nested_absmax", None, "absmax: expected float32"),
        ("offset", None, "both nested_absmax and offset, or neither"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedTensor(**(good | {field: value}))
