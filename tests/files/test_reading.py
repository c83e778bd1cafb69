"""Reading files: round trips to the bit, with the safetensors library in both directions; errors name the file and the
tensor or key."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from refqlora.files import reading as files
from refqlora.files import writing

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


# ---- round trips ----


@given(
    st.data(),
    st.sampled_from(DTYPES),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    st.sampled_from(["as it is", "transposed", "every second"]),
)
def test_tensors_round_trip(tmp_path_factory, data, dtype, shape, layout):
    """Any bits at all, NaNs and negative zeros among them, and however they lie in memory."""
    dtype = np.dtype(dtype)
    if layout == "every second" and shape:
        shape = (2 * shape[0], *shape[1:])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    x = (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)
    if layout == "transposed":
        x = x.T
    elif layout == "every second" and shape:
        x = x[::2]
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    writing.write_tensors(path, {"a.weight": x, "b": np.ones(3, np.float32)}, {"steps": "7"})
    found = dict(files.read_tensors(path))
    assert_same_bits(found, {"a.weight": x, "b": np.ones(3, np.float32)})
    assert_same_bits(load_file(path), found)  # as the library reads it
    assert files.read_metadata(path) == {"format": "pt", "steps": "7"}


def test_every_dtype_of_the_library_that_numpy_has(tmp_path):
    tensors = {name: np.arange(6).astype(dtype).reshape(2, 3) for name, dtype in files.STORED_DTYPES.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same_bits(dict(files.read_tensors(tmp_path / "x.safetensors")), tensors)
    assert {e.dtype for e in files.read_header(tmp_path / "x.safetensors")[0].values()} == set(
        files.STORED_DTYPES.values()
    )


def test_tensors_come_in_the_order_in_which_they_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    writing.write_tensors(path, {name: np.zeros(5, np.float32) for name in "cabed"})
    starts = [entry.start for entry in files.read_header(path)[0].values()]
    assert starts == sorted(starts)
    assert len(starts) == 5


def test_a_tensor_is_an_array_of_its_own(tmp_path):
    """Not a view of a mapped file, whose pages would count for as long as it is open."""
    path = tmp_path / "x.safetensors"
    writing.write_tensors(path, {"a": np.zeros(5, np.float32)})
    ((_, x),) = files.read_tensors(path)
    x += 1
    base = x
    while base.base is not None:
        base = base.base
    assert type(base) is np.ndarray
    assert (dict(files.read_tensors(path))["a"] == 0).all()


# ---- a safetensors file that is broken or lies ----

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
GOOD |= {"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}


def written(path, header, data=32, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def changed(**fields):
    return {**GOOD, "b": {**GOOD["b"], **fields}}


LIES = {
    "nothing": (lambda p: p.write_bytes(b""), "0 bytes cannot hold a header"),
    "no header": (lambda p: p.write_bytes(b"1234567"), "7 bytes cannot hold a header"),
    "header past the end": (lambda p: written(p, GOOD, length=10**6), "cannot hold a header of 1000000"),
    "header past all": (lambda p: written(p, GOOD, length=2**63), "cannot hold a header of 9223372036854775808"),
    "header not JSON": (lambda p: written(p, b"{'a'}"), "line 1"),
    "header not UTF-8": (lambda p: written(p, b'{"\xff": 1}'), "utf-8"),
    "header of depth": (lambda p: written(p, b"[" * 100000), "nested too deeply"),
    "header a list": (lambda p: written(p, []), "header: expected an object, got list"),
    "a name twice": (
        lambda p: written(p, json.dumps(GOOD).replace('"b"', '"a"').encode()),
        "the key 'a' appears twice",
    ),
    "metadata a number": (lambda p: written(p, {**GOOD, "__metadata__": {"x": 1}}), "metadata"),
    "metadata a list": (lambda p: written(p, {**GOOD, "__metadata__": []}), "metadata"),
    "no fields": (
        lambda p: written(p, {**GOOD, "b": 3}),
        "b: expected the fields dtype, shape and data_offsets, got 3",
    ),
    "no offsets": (
        lambda p: written(p, {**GOOD, "b": {"dtype": "BF16", "shape": [4]}}),
        "b: expected the fields dtype, shape and data_offsets, got {",
    ),
    "a field more": (
        lambda p: written(p, changed(strides=[1])),
        "b: expected the fields dtype, shape and data_offsets, got {",
    ),
    "shape a number": (lambda p: written(p, changed(shape=4)), "b has shape 4"),
    "shape negative": (lambda p: written(p, changed(shape=[-2, -2])), "b has shape [-2, -2]"),
    "shape of fractions": (lambda p: written(p, changed(shape=[4.0])), "b has shape [4.0]"),
    "shape of truths": (lambda p: written(p, changed(shape=[True, 4])), "b has shape [True, 4]"),
    "shape of many": (lambda p: written(p, changed(shape=[1] * 99)), "b has shape [1, 1"),
    "shape too large": (lambda p: written(p, changed(shape=[10**30])), "b has shape [1000000"),
    "none of 2^63": (lambda p: written(p, changed(shape=[0, 2**63])), "b has shape [0, 9223372036854775808]"),
    "none of a product of 2^80": (
        lambda p: written(p, changed(shape=[2**40, 2**40, 0])),
        "b has shape [1099511627776, ",
    ),
    "a name of a megabyte": (
        lambda p: written(p, {**GOOD, "x" * 10**6: GOOD["a"]}),
        "xxx...: expected a name of at most 1000 characters, got 1000000",
    ),
    "shape too small": (
        lambda p: written(p, changed(shape=[3])),
        "b, bfloat16 of shape (3,), takes the bytes [24, 32]",
    ),
    "offsets backwards": (lambda p: written(p, changed(data_offsets=[32, 24])), "b, bfloat16"),
    "offsets past the end": (lambda p: written(p, changed(data_offsets=[24, 10**15])), "b, bfloat16"),
    "offsets of one": (lambda p: written(p, changed(data_offsets=[24])), "b, bfloat16"),
    "overlap": (
        lambda p: written(p, changed(data_offsets=[16, 24])),
        "b, bfloat16 of shape (4,), takes the bytes [16,",
    ),
    "a gap": (
        lambda p: written(p, changed(data_offsets=[26, 34]), 34),
        "b, bfloat16 of shape (4,), takes the bytes [26,",
    ),
    "data cut short": (lambda p: written(p, GOOD, 31), "its tensors end at byte"),
    "data too long": (lambda p: written(p, GOOD, 33), "its tensors end at byte"),
}


@pytest.mark.parametrize(("make", "said"), LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused(tmp_path, make, said):
    path = tmp_path / "x.safetensors"
    make(path)
    for read in (lambda p: list(files.read_tensors(p)), files.read_metadata, lambda p: list(files.read_weights(p))):
        with pytest.raises(ValueError, match="not a valid safetensors file") as error:
            read(path)
        assert str(error.value).startswith(f"{path}: not a valid safetensors file: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["C64", "F4", ["F32"], 3])
def test_a_dtype_that_numpy_lacks_is_named(tmp_path, dtype):
    path = written(tmp_path / "x.safetensors", changed(dtype=dtype))
    with pytest.raises(ValueError, match="expected one of F64, F32") as error:
        list(files.read_tensors(path))
    assert str(error.value).startswith(f"{path}: b is {dtype!r}, expected one of ")


def test_the_library_refuses_what_is_refused_here(tmp_path):
    """But a field more, and what only JSON is at fault with."""
    path = tmp_path / "x.safetensors"
    for name, (make, _) in LIES.items():
        make(path)
        if (
            name not in ("a field more", "header of depth", "a name twice", "a name of a megabyte")
            and "none" not in name
        ):
            with pytest.raises((SafetensorError, ValueError)):
                load_file(path)


def test_a_good_file_is_none_of_those(tmp_path):
    found = dict(files.read_tensors(written(tmp_path / "x.safetensors", GOOD)))
    assert {name: (x.dtype.name, x.shape) for name, x in found.items()} == {
        "a": ("float32", (2, 3)),
        "b": ("bfloat16", (4,)),
    }
    padded = json.dumps({**GOOD, "empty": {"dtype": "I8", "shape": [0, 7], "data_offsets": [32, 32]}}).encode() + b"   "
    assert dict(files.read_tensors(written(tmp_path / "x.safetensors", padded)))["empty"].shape == (0, 7)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    path = written(tmp_path / "x.safetensors", GOOD)
    tensors = files.read_tensors(path)
    next(tensors)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x\.safetensors: the file became shorter"):
        next(tensors)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_what_is_pickled_is_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="pickled files are never opened") as error:
        list(files.read_weights(tmp_path / "model.safetensors"))
    assert str(error.value).startswith(str(tmp_path / name))
    assert "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)" in str(error.value)


# ---- a mapped tensor ----


def test_a_mapped_tensor_is_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, np.uint8, np.bool_]
    expected = {f"t{i}": (9 * rng.standard_normal((3, 5))).astype(dtype) for i, dtype in enumerate(dtypes)}
    expected |= {"none": np.zeros((0, 4), np.float32), "scalar": np.float32(3).reshape(())}
    writing.write_tensors(tmp_path / "a.safetensors", expected, {"made by": "hand"})
    found, metadata = files.map_tensors(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt", "made by": "hand"}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        t = found[name]
        assert (t.path, t.shape, t.nbytes) == (tmp_path / "a.safetensors", x.shape, x.nbytes)
        for array in (t.array, t.read()):
            assert (array.dtype, array.shape, array.tobytes()) == (x.dtype, x.shape, x.tobytes())
        assert not t.array.flags.writeable


def write_raw(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_tensor_that_lies_at_an_odd_byte(tmp_path):
    """Valid, though good writers avoid it."""
    x = np.arange(3, dtype=np.float32)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    write_raw(tmp_path / "a.safetensors", header, b"\0" + x.tobytes())
    t = files.map_tensors(tmp_path / "a.safetensors")[0]["b"]
    np.testing.assert_array_equal(t.array, x)
    np.testing.assert_array_equal(t.read(), x)


def test_a_dtype_of_8_bits(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "a.safetensors", header, b"1234")
    t = files.map_tensors(tmp_path / "a.safetensors")[0]["a"]
    assert (t.dtype, t.shape, t.nbytes, t.array.tobytes()) == ("F8_E4M3", (4,), 4, b"1234")


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_a_file_cut_short_is_not_mapped(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    writing.write_tensors(path, {"a": np.ones(3, np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a valid safetensors file"):
        files.map_tensors(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: no such file"):
        files.map_tensors(path)


# ---- JSON ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"\xff": 1}', "not valid JSON: 'utf-8'"),
        ("\ufeff{}".encode(), "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "not valid JSON: the key 'a' appears twice"),
        (b'{"a": {"b\\n": 1, "b\\n": 1}}', "the key 'b\\n' appears twice"),
        (b'{"a":' * 100000, "not valid JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_anything_but_a_json_object_is_refused(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="JSON") as error:
        files.read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_json_round_trips(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"Zoë": "x\n"}}
    writing.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    with pytest.raises(FileNotFoundError, match=r"y\.json: no such file"):
        files.read_json(tmp_path / "y.json")
