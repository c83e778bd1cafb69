"""Files in and out: round trips to the bit, no half-written file, and a name in every complaint."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import refqlora as rq
from refqlora import files

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "layers": 2,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 8,
}
TOKENS = np.arange(22).reshape(2, 11)


def new_model(seed=0, **changes):
    """Every parameter random, the norms and biases too."""
    model = rq.Model.from_config(rq.Config(**{**SIZES, **changes}))
    rng = np.random.default_rng(seed)
    for p in model.params.values():
        p[...] = rng.standard_normal(p.shape)
    return model


def with_adapter(model, **options):
    model.add_adapter(**{"rank": 5, "alpha": 7, **options})
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    return model


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


@pytest.fixture
def saved(tmp_path):
    """A model's directory: config.json and model.safetensors."""
    new_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path):
    """An adapter's directory, for the model in `saved`."""
    with_adapter(new_model(), targets=["q_proj", "down_proj"]).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_json(path, **changes):
    """Set keys of a JSON file; ... removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not ...}))


def change_tensors(path, changes):
    """Set tensors of a safetensors file; ... removes one."""
    tensors = dict(files.read_tensors(path)) | changes
    files.write_tensors(path, {name: x for name, x in tensors.items() if x is not ...})


def into_shards(directory, shards=3):
    """Model.safetensors -> model-0000i-of-00003.safetensors and the index; returns the index's path."""
    tensors = dict(files.read_tensors(directory / "model.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        files.write_tensors(directory / file, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


# ---- the public face ----


def test_the_public_face(saved, tmp_path):
    """The lines of the package's docstring, as they stand."""
    labels = np.roll(TOKENS, -1, axis=1)
    model = rq.Model.from_pretrained(saved, quantize="nf4")
    before, _ = model.forward(TOKENS)
    model.add_adapter(rank=16, alpha=32)
    logits, cache = model.forward(TOKENS)
    np.testing.assert_array_equal(logits, before)  # B is zero
    loss, dlogits = rq.cross_entropy(logits, labels)
    grads = model.backward(dlogits, cache)
    assert {name: g.shape for name, g in grads.items()} == {n: p.shape for n, p in model.trainable().items()}
    rq.AdamW(model.trainable(), lr=1e-3).step(grads)
    assert rq.cross_entropy(model.forward(TOKENS)[0], labels)[0] < loss
    model.save_adapter(tmp_path / "out")
    again = rq.Model.from_pretrained(saved, quantize="nf4")
    again.load_adapter(tmp_path / "out")
    np.testing.assert_array_equal(again.forward(TOKENS)[0], model.forward(TOKENS)[0])


def test_the_public_names():
    assert sorted(rq.__all__, key=str.lower) == sorted(set(rq.__all__), key=str.lower)
    assert all(hasattr(rq, name) for name in rq.__all__)
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert rq.__version__ == project["version"]


# ---- round trips ----

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


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
    files.write_tensors(path, {"a.weight": x, "b": np.ones(3, np.float32)}, {"steps": "7"})
    found = dict(files.read_tensors(path))
    assert_same_bits(found, {"a.weight": x, "b": np.ones(3, np.float32)})
    assert files.read_metadata(path) == {"format": "pt", "steps": "7"}


MODELS = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "two ends of text": {"eos_token_id": (2, 5), "bos_token_id": 1, "rope_theta": 5e5, "eps": 1e-5},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shards", [0, 3])
def test_a_model_round_trips(changes, shards, tmp_path):
    model = new_model(**changes)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    if shards:
        into_shards(tmp_path, shards)
    again = rq.Model.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert_same_bits(again.params, model.params)
    wide = rq.Model.from_pretrained(tmp_path, dtype=np.float64)
    assert_same_bits(wide.params, {name: p.astype(np.float64) for name, p in model.params.items()})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_model_in_16_bits_is_rounded_once(dtype, tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path / "a", dtype)
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == np.dtype(dtype).name
    stored = dict(files.read_tensors(tmp_path / "a/model.safetensors"))
    assert_same_bits(stored, {name: p.astype(dtype) for name, p in model.params.items()})
    again = rq.Model.from_pretrained(tmp_path / "a")
    assert_same_bits(again.params, {name: p.astype(np.float32) for name, p in stored.items()})
    again.save_pretrained(tmp_path / "b", dtype)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loading_can_quantize(saved):
    model, quantized = rq.Model.from_pretrained(saved), rq.Model.from_pretrained(saved, quantize="nf4")
    model.quantize()
    linears = {name + ".weight" for name in model.config.linears()}
    assert {n for n, p in quantized.params.items() if isinstance(p, rq.QuantizedTensor)} == linears
    for name in linears:
        np.testing.assert_array_equal(rq.dequantize(quantized.params[name]), rq.dequantize(model.params[name]))
    np.testing.assert_array_equal(quantized.forward(TOKENS)[0], model.forward(TOKENS)[0])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is quantised"):
        quantized.save_pretrained(saved)


def test_what_older_writers_leave_is_no_fault(tmp_path):
    model = new_model(tied=True)
    model.save_pretrained(tmp_path)
    copy = model.params["model.embed_tokens.weight"]
    frequencies = np.ones(4, np.float32)
    extra = {"lm_head.weight": copy, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    change_tensors(tmp_path / "model.safetensors", extra)
    assert_same_bits(rq.Model.from_pretrained(tmp_path).params, model.params)


# ---- whole or not at all ----


class Cut(Exception):
    pass


def half_written(tensors, path, metadata):
    Path(path).write_bytes(b"half of")
    raise Cut


def cut(*args):
    raise Cut


@pytest.mark.parametrize(
    ("module", "function", "replacement"),
    [(files, "save_file", half_written), (os, "fsync", cut), (os, "replace", cut)],
)
def test_an_error_in_the_middle_leaves_the_old_file(saved, adapter, monkeypatch, module, function, replacement):
    before = {file: file.read_bytes() for d in (saved, adapter) for file in d.iterdir()}
    monkeypatch.setattr(module, function, replacement)
    with pytest.raises(Cut):
        new_model(seed=2).save_pretrained(saved)
    with pytest.raises(Cut):
        with_adapter(new_model(), rank=2).save_adapter(adapter)
    if module is os:
        with pytest.raises(Cut):
            files.write_json(saved / "config.json", {})
    assert {file: file.read_bytes() for d in (saved, adapter) for file in d.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_others_may_read_what_was_written(saved):
    (saved / "plain").touch()
    assert {file.stat().st_mode for file in saved.iterdir()} == {(saved / "plain").stat().st_mode}


def test_what_cannot_be_written_leaves_the_old_file(saved):
    before = {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(TypeError):
        files.write_json(saved / "config.json", {"a": object()})
    with pytest.raises(Exception, match="complex128"):
        files.write_tensors(saved / "model.safetensors", {"a": np.zeros(3, complex)})
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_a_killed_run_leaves_the_old_file(saved):
    """Killed when all is written but the name: what it leaves is taken for a model by nobody."""
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    child = f"""
import os, numpy as np
from refqlora import files
os.replace = lambda *args: os._exit(9)
path = files.Path({str(saved / "model.safetensors")!r})
files.write_tensors(path, {{"a": np.ones(3, np.float32)}})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(rq.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", child], env=environment).returncode == 9
    left = {file.name: file.read_bytes() for file in saved.iterdir() if file.is_file()}
    assert before == left
    assert any(saved.rglob(".*/model.safetensors"))
    assert_same_bits(rq.Model.from_pretrained(saved).params, new_model().params)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        rq.Model.from_pretrained(saved)
    new_model(seed=2).save_pretrained(saved)  # and stands in nobody's way
    assert {file.name for file in saved.iterdir()} == set(before)
    assert_same_bits(rq.Model.from_pretrained(saved).params, new_model(seed=2).params)


# ---- what is wrong with a model is said ----

Q = "model.layers.1.self_attn.q_proj.weight"  # (48, 20)


def cut_short(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def shard(directory):
    """The shard that holds Q, and its name."""
    index = json.loads(into_shards(directory).read_text())
    return directory / index["weight_map"][Q]


MODEL_FAULTS = {
    "no directory": (lambda d: d.rename(d.parent / "elsewhere"), ["model: no such directory"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json: no such file"]),
    "config not JSON": (
        lambda d: (d / "config.json").write_text("{'vocab_size': 37}"),
        ["config.json: not valid JSON", "line 1"],
    ),
    "config not UTF-8": (
        lambda d: (d / "config.json").write_bytes(b'{"\xff": 1}'),
        ["config.json: not valid JSON"],
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        ["config.json: expected a JSON object", "list"],
    ),
    "config without a key": (
        lambda d: change_json(d / "config.json", hidden_size=...),
        ['config.json: has no "hidden_size"'],
    ),
    "config of another architecture": (
        lambda d: change_json(d / "config.json", model_type="gemma2"),
        ['config.json: model_type "gemma2" is not supported'],
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors: no such file"]),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["pytorch_model.bin: is pickled"],
    ),
    "empty weights": (
        lambda d: cut_short(d / "model.safetensors", 0),
        ["model.safetensors: not a valid safetensors"],
    ),
    "header cut short": (
        lambda d: cut_short(d / "model.safetensors", 100),
        ["model.safetensors: not a valid safetensors"],
    ),
    "data cut short": (
        lambda d: cut_short(d / "model.safetensors", -1),
        ["model.safetensors: not a valid safetensors"],
    ),
    "missing tensor": (
        lambda d: change_tensors(d / "model.safetensors", {Q: ...}),
        ["model: " + Q, "is missing"],
    ),
    "unexpected tensor": (
        lambda d: change_tensors(d / "model.safetensors", {"extra.weight": np.zeros(3, np.float32)}),
        ["model: extra.weight is not expected"],
    ),
    "unexpected bias": (
        lambda d: change_json(d / "config.json", attention_bias=True),
        ["model: model.layers.0.self_attn.q_proj.bias (48,) is missing"],
    ),
    "wrong shape": (
        lambda d: change_tensors(d / "model.safetensors", {Q: np.zeros((20, 48), np.float32)}),
        [f"model: {Q} has shape (20, 48)", "(48, 20)"],
    ),
    "integer tensor": (
        lambda d: change_tensors(d / "model.safetensors", {Q: np.zeros((48, 20), np.int8)}),
        [f"model.safetensors: {Q} is int8, expected one of float16, bfloat16, float32"],
    ),
    "another head than it is tied to": (
        lambda d: change_json(d / "config.json", tie_word_embeddings=True),
        ["model: lm_head.weight differs from the embedding"],
    ),
    "no head": (
        lambda d: change_tensors(d / "model.safetensors", {"lm_head.weight": ...}),
        ["model: lm_head.weight (37, 20) is missing"],
    ),
    "index not JSON": (
        lambda d: into_shards(d).write_text("{"),
        ["model.safetensors.index.json: not valid JSON"],
    ),
    "index without a map": (
        lambda d: into_shards(d).write_text("{}"),
        ['model.safetensors.index.json: has no "weight_map"'],
    ),
    "index to numbers": (
        lambda d: change_json(into_shards(d), weight_map={Q: 1}),
        ['model.safetensors.index.json: has no "weight_map"'],
    ),
    "missing shard": (lambda d: shard(d).unlink(), ["-of-00003.safetensors: no such file"]),
    "pickled shard": (lambda d: shard(d).rename(d / "model-2.bin"), ["model-2.bin: is pickled"]),
    "shard cut short": (
        lambda d: cut_short(shard(d), -1),
        ["-of-00003.safetensors: not a valid safetensors"],
    ),
    "shard without its tensor": (
        lambda d: change_tensors(shard(d), {Q: ...}),
        [f"-of-00003.safetensors: lacks {Q}, which model.safetensors.index.json says"],
    ),
    "no shard holds a tensor": (
        lambda d: forget(shard(d), d / "model.safetensors.index.json"),
        [f"model: {Q} (48, 20) is missing"],
    ),
}


def forget(path, index):
    change_tensors(path, {Q: ...})
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={name: file for name, file in weight_map.items() if name != Q})


def complaint(load, path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(path)
    assert type(error.value) in (ValueError, FileNotFoundError)  # and none of their kin by accident
    return str(error.value)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("spoil", "said"), MODEL_FAULTS.values(), ids=MODEL_FAULTS)
def test_a_spoilt_model_is_refused_by_name(saved, spoil, said, quantize):
    rq.Model.from_pretrained(saved)
    spoil(saved)
    message = complaint(lambda path: rq.Model.from_pretrained(path, quantize=quantize), saved)
    assert str(saved) in message
    for part in said:
        assert part in message


def test_quantize_is_nf4_or_nothing(saved):
    assert "\"nf4\", not 'int8'" in complaint(lambda path: rq.Model.from_pretrained(path, quantize="int8"), saved)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_cannot_be_quantized_is_named(saved, value):
    weight = np.zeros((48, 20), np.float32)
    weight[7, 3] = value
    change_tensors(saved / "model.safetensors", {Q: weight})
    message = complaint(lambda path: rq.Model.from_pretrained(path, quantize="nf4"), saved)
    assert Q in message
    assert "7, 3" in message
