"""A model's safetensors written tensor by tensor, in little memory: all of them or none, and any reader reads them."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refqlora.files import model_files
from refqlora.files.model_files import INDEX, read_model
from refqlora.files.reading import FLOATS

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8]
ALL = FLOATS + (np.dtype(np.int8), np.dtype(np.uint8))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (x.dtype, x.shape, x.tobytes()), name


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=9
    ),
    limit=st.integers(1, 400),
)
def test_what_was_written_is_read(tensors, limit, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    expected = {f"t{i}.weight": (9 * rng.standard_normal(s)).astype(d) for i, (d, s) in enumerate(tensors)}
    nbytes = model_files.write_model(directory, expected.items(), limit)
    assert nbytes == sum(x.nbytes for x in expected.values())
    same(dict(read_model(directory, ALL)), expected)
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        names = list(header)
        sizes = [nbytes for name in names if (nbytes := expected[name].nbytes)]
        assert len(sizes) <= 1 or sum(sizes) <= limit
        for name in names:  # torch maps a tensor where it lies: it must lie where its dtype may
            assert (8 + length + header[name]["data_offsets"][0]) % expected[name].dtype.itemsize == 0


def test_what_is_not_contiguous(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {"a": x.T, "b": x[::2, ::3]}
    model_files.write_model(tmp_path, expected.items())
    same(dict(read_model(tmp_path)), expected)


def test_parts_of_a_weight_share_a_file(tmp_path):
    part = np.zeros(50, np.uint8)
    names = ["a.weight", "a.weight.absmax", "a.weight.quant_map", "ab.weight", "ab.weight.absmax"]
    model_files.write_model(tmp_path, ((name, part) for name in names), 60)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 250}
    assert [index["weight_map"][name][6:11] for name in names] == ["00001"] * 3 + ["00002"] * 2


def test_a_name_that_comes_twice_is_refused(tmp_path):
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="a appears twice"):
        model_files.write_model(tmp_path, [("a", x), ("b", x), ("a", x)])


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    def tensors():
        for i in range(20):
            yield f"t{i}", np.full((1 << 18,), i, np.float32)

    tracemalloc.start()
    model_files.write_model(tmp_path, tensors())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size > 20 << 20
    assert peak < 5 << 20  # two tensors of 1 MiB, and what the copy reads at a time
