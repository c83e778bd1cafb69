"""A mapped safetensors file: what the library reads, without reading it."""

import json

import ml_dtypes
import numpy as np
import pytest

from refqlora.files.mapped import map_tensors
from refqlora.files.writing import write_tensors


def test_it_gives_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, np.uint8, np.bool_]
    expected = {f"t{i}": (9 * rng.standard_normal((3, 5))).astype(dtype) for i, dtype in enumerate(dtypes)}
    expected |= {"none": np.zeros((0, 4), np.float32), "scalar": np.float32(3).reshape(())}
    write_tensors(tmp_path / "a.safetensors", expected, {"made by": "hand"})
    found, metadata = map_tensors(tmp_path / "a.safetensors")
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
    t = map_tensors(tmp_path / "a.safetensors")[0]["b"]
    np.testing.assert_array_equal(t.array, x)
    np.testing.assert_array_equal(t.read(), x)


def test_a_dtype_of_8_bits(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "a.safetensors", header, b"1234")
    t = map_tensors(tmp_path / "a.safetensors")[0]["a"]
    assert (t.dtype, t.shape, t.nbytes, t.array.tobytes()) == ("F8_E4M3", (4,), 4, b"1234")


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_a_file_cut_short_is_named(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.ones(3, np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a valid safetensors file"):
        map_tensors(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: no such file"):
        map_tensors(path)
