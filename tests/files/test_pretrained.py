"""Files in and out: round trips to the bit, no half-written file, and a name in every error."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import streaming
from spoil import TOKENS, assert_same_bits, change_json, change_tensors, complaint, cut_short, new_model

import refqlora as rq
from refqlora import lm_head as head
from refqlora.files import config_json, model_files, pretrained
from refqlora.files import reading as files
from refqlora.files.writing import new_directory, write_tensors


def with_adapter(model, **options):
    model.add_adapter(**{"rank": 5, "alpha": 7, **options})
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    return model


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


def into_shards(directory, shards=3):
    """Model.safetensors -> model-0000i-of-00003.safetensors and the index; returns the index's path."""
    tensors = dict(files.read_tensors(directory / "model.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_tensors(directory / file, {name: tensors[name] for name in names[i::shards]})
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
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    assert rq.__version__ == project["version"]


# ---- round trips ----

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


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_sixteen_bits_stay_and_the_logits_are_those_of_a_model_cast_at_once(stored, dtype, tied, tmp_path, monkeypatch):
    """Cast whole when it was read, and quantised after that: the same to the bit, and so are the gradients."""
    monkeypatch.setattr(head, "TILE", 13 * 20)  # the head in three tiles
    new_model(tied=tied, attention_bias=True).save_pretrained(tmp_path, stored)
    model = rq.Model.from_pretrained(tmp_path, quantize="nf4", dtype=dtype)
    cast = rq.Model.from_pretrained(tmp_path, dtype=dtype)
    cast.quantize()
    kept = stored if np.dtype(stored).itemsize == 2 else dtype
    assert model.dtype == cast.dtype == dtype
    for name, p in model.params.items():
        if not isinstance(p, rq.QuantizedTensor):
            assert p.dtype == (kept if p.ndim > 1 else dtype), name
        else:
            assert p.packed.tobytes() == cast.params[name].packed.tobytes()
            assert p.absmax.tobytes() == cast.params[name].absmax.tobytes()
    logits, grads = [], []
    for m in (model, cast):
        m.add_adapter(rank=2)
        assert {p.dtype for p in m.trainable().values()} == {np.dtype(dtype)}
        y, cache = m.forward(TOKENS)
        logits.append(y)
        grads.append(m.backward(np.cos(y), cache))
    assert logits[0].dtype == dtype
    np.testing.assert_array_equal(*logits)
    assert_same_bits(*grads)


LARGE = rq.Config(8192, 1024, 4096, layers=2, heads=8, kv_heads=4, head_dim=128)  # matrices of 8 and 16 MiB in bfloat16


def peak_of(load):
    """The most bytes of arrays and objects while `load` runs, and what it returns."""
    tracemalloc.start()
    try:
        result = load()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tied", [False, True])
def test_quantising_streams(tied, tmp_path):
    """Memory's peak is what is held, the largest tensor as the file has it, and what `quantize` works with: no second
    tensor, no float32 copy."""
    config = dataclasses.replace(LARGE, tied=tied)
    streaming.write(config, tmp_path, shard_bytes=1)  # a file each, the largest last, where one too many would show
    terms = streaming.predicted(config)
    peak, model = peak_of(lambda: rq.Model.from_pretrained(tmp_path, quantize="nf4"))
    assert sum(p.nbytes for p in model.params.values()) == terms["held"]
    assert terms["scratch"] < terms["largest"]  # so that a tensor too many would show
    assert peak <= sum(terms.values())
    assert peak > terms["held"] + terms["largest"] / 2  # tracemalloc sees the arrays


def test_loading_in_float32_streams(tmp_path):
    """The bytes held, the largest tensor in the file's dtype, and small objects."""
    streaming.write(LARGE, tmp_path, shard_bytes=20_000_000)
    peak, model = peak_of(lambda: rq.Model.from_pretrained(tmp_path))
    held = sum(p.nbytes for p in model.params.values())
    assert held == 4 * sum(p.size for p in model.params.values())
    assert held < peak <= held + 2 * 8192 * 1024 + (1 << 20)


def test_nothing_is_read_before_all_is_known_to_fit(saved, monkeypatch):
    """A missing tensor is found in the headers: not after minutes of quantising the others."""
    change_tensors(saved / "model.safetensors", {Q: ...})
    monkeypatch.setattr(model_files, "read_tensor", pytest.fail)
    with pytest.raises(ValueError, match="is missing"):
        rq.Model.from_pretrained(saved, quantize="nf4")


# ---- generation_config.json ----


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(5, 5), ([5], 5), ([5, 2], (5, 2)), (None, 9), (..., 9)],
    ids=["one", "list", "two", "null", "no"],
)
def test_the_end_tokens_are_those_of_the_generation_config(saved, eos, expected):
    change_json(saved / "config.json", eos_token_id=9)
    (saved / "generation_config.json").write_text(json.dumps({} if eos is ... else {"eos_token_id": eos}))
    model = rq.Model.from_pretrained(saved)
    assert model.config.eos_token_id == expected
    model.save_pretrained(saved.parent / "again")
    assert rq.Model.from_pretrained(saved.parent / "again").config == model.config


def test_what_a_generation_config_says(tmp_path):
    assert config_json.read_generation_config(tmp_path) == {}
    known = {"bos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1}
    known |= {"repetition_penalty": 1.1, "max_new_tokens": 7}
    others = {"_from_model_config": True, "transformers_version": "5.0", "pad_token_id": None, "max_length": "x"}
    (tmp_path / "generation_config.json").write_text(json.dumps({**known, **others, "eos_token_id": [2, 3]}))
    assert config_json.read_generation_config(str(tmp_path)) == {**known, "eos_token_id": (2, 3)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("eos_token_id", value) for value in ("2", [], [2, "3"], -1, [2, None], True, 2.0, {"a": 1})),
        *(("bos_token_id", value) for value in ([1], "1", -1)),
        *((field, value) for field in ("temperature", "repetition_penalty") for value in (-1, "1", [1], True)),
        *((field, value) for field in ("top_p", "min_p") for value in (-0.1, 1.1, "1", float("nan"))),
        *(("top_k", value) for value in (-1, 1.5, "1")),
        *(("max_new_tokens", value) for value in (0, 1.5, "1")),
        *(("do_sample", value) for value in (1, "true")),
    ],
)
def test_a_generation_config_that_cannot_be_is_refused(tmp_path, field, value):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 1, field: value}))
    message = complaint(config_json.read_generation_config, tmp_path)
    assert message.startswith(f"{path}: {field}: expected ")


# ---- shards ----


def weights(directory):
    return sorted(file.name for file in directory.iterdir() if file.name != "config.json")


def test_a_large_model_is_written_in_shards(tmp_path):
    """transformers' names and index; every shard within the size, but where one tensor alone is larger."""
    model = new_model()
    sizes = {name: 2 * p.size for name, p in model.params.items()}
    model.save_pretrained(tmp_path, np.float16, max_shard_size=1500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == model.params.keys()
    n = len(set(index["weight_map"].values()))
    shards = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    assert weights(tmp_path) == [*shards, "model.safetensors.index.json"]
    for shard in shards:
        held = files.read_header(tmp_path / shard)[0]
        assert {name for name, file in index["weight_map"].items() if file == shard} == held.keys()
        assert len(held) == 1 or sum(sizes[name] for name in held) <= 1500
    assert max(sizes.values()) > 1500  # one was
    assert any(len(files.read_header(tmp_path / shard)[0]) > 1 for shard in shards)
    again = rq.Model.from_pretrained(tmp_path)
    assert_same_bits(again.params, {k: p.astype(np.float16).astype(np.float32) for k, p in model.params.items()})


def test_five_gigabytes_are_the_limit():
    assert model_files.SHARD == model_files.parse_size("5GB") == 5_000_000_000
    assert [model_files.parse_size(x) for x in (7, "7", "3KB", "2 MB", "1gb")] == [7, 7, 3000, 2 * 10**6, 10**9]


@pytest.mark.parametrize("size", [0, -1, "0GB", "5GiB", "", "GB", "1.5GB", None, True, 2.5])
def test_a_shard_s_size_that_cannot_be_is_refused_before_anything_is_written(size, tmp_path):
    with pytest.raises(ValueError, match=r"max_shard_size: expected a number of bytes, or text such as .5GB., got "):
        new_model().save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


SIZES_OF_SHARDS = {"one file": "5GB", "shards": 30_000, "other shards": 20_000}


@pytest.mark.parametrize("old", SIZES_OF_SHARDS)
@pytest.mark.parametrize("new", SIZES_OF_SHARDS)
def test_nothing_is_left_of_the_model_that_was_there(old, new, tmp_path):
    new_model(seed=1, layers=3).save_pretrained(tmp_path / "a", max_shard_size=SIZES_OF_SHARDS[old])
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    for directory in ("a", "b"):
        new_model(seed=2).save_pretrained(tmp_path / directory, max_shard_size=SIZES_OF_SHARDS[new])
    assert weights(tmp_path / "a") == [*weights(tmp_path / "b"), "tokenizer.json"]
    assert_same_bits(rq.Model.from_pretrained(tmp_path / "a").params, new_model(seed=2).params)


@pytest.mark.parametrize("old", SIZES_OF_SHARDS)
@pytest.mark.parametrize("new", SIZES_OF_SHARDS)
def test_killed_at_any_rename_no_two_models_are_mixed(old, new, tmp_path, monkeypatch):
    """After each step of putting the new weights in place, in turn: the old model, the new one, or none."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of the time
    models = [new_model(seed=seed) for seed in (1, 2)]
    step = kinds = 0
    while True:
        place = tmp_path / str(step)
        models[0].save_pretrained(place, max_shard_size=SIZES_OF_SHARDS[old])
        left = step

        def killed(function):
            def call(*args, **options):
                nonlocal left
                if left == 0:
                    raise Cut
                left -= 1
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed(os.replace))
            patch.setattr(Path, "unlink", killed(Path.unlink))
            try:
                models[1].save_pretrained(place, max_shard_size=SIZES_OF_SHARDS[new])
            except Cut:
                done = False
            else:
                done = True
        try:
            found = rq.Model.from_pretrained(place).params
        except FileNotFoundError as error:
            assert str(error) == f"{place / 'config.json'}: no such file"  # noqa: PT017
            assert not done
        else:
            same = [all(np.array_equal(found[name], p) for name, p in m.params.items()) for m in models]
            assert any(same)
            kinds |= same[0] + 2 * same[1]
        if done:
            break
        step += 1
    assert kinds == 3  # both the old and the new were seen
    assert step > 2


def test_saving_holds_one_shard_at_the_most(tmp_path):
    """No copy where the dtype is the model's own; in another, one shard's."""
    model = rq.Model.from_config(dataclasses.replace(LARGE, layers=1))
    largest = 2 * 8192 * 1024
    assert peak_of(lambda: model.save_pretrained(tmp_path, max_shard_size="40MB"))[0] < 1 << 20
    peak, _ = peak_of(lambda: model.save_pretrained(tmp_path, np.float16, max_shard_size=largest))
    assert peak < largest + (1 << 20)


def test_tensors_of_older_writers_are_accepted(tmp_path):
    model = new_model(tied=True)
    model.save_pretrained(tmp_path)
    copy = model.params["model.embed_tokens.weight"]
    frequencies = np.ones(4, np.float32)
    extra = {"lm_head.weight": copy, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    change_tensors(tmp_path / "model.safetensors", extra)
    assert_same_bits(rq.Model.from_pretrained(tmp_path).params, model.params)


# ---- a write that does not end ----


class Cut(Exception):
    pass


def cut(*args):
    raise Cut


@pytest.mark.parametrize(("module", "function"), [(shutil, "copyfileobj"), (os, "fsync"), (os, "replace")])
def test_an_error_while_writing_leaves_the_old_model(saved, monkeypatch, module, function):
    before = {file: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(module, function, cut)
    with pytest.raises(Cut):
        new_model(seed=2).save_pretrained(saved)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_what_is_killed_before_the_renames_leaves_the_old_model(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    child = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import spoil
os.fsync = lambda file: os._exit(9)
spoil.new_model(seed=2).save_pretrained({str(saved)!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(rq.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", child], env=environment).returncode == 9
    assert {file.name: file.read_bytes() for file in saved.iterdir() if file.name in before} == before
    assert any(saved.rglob(".*/model.safetensors"))
    assert_same_bits(rq.Model.from_pretrained(saved).params, new_model().params)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        rq.Model.from_pretrained(saved)
    new_model(seed=2).save_pretrained(saved)  # clears away what was left
    assert {file.name for file in saved.iterdir()} == set(before)
    assert_same_bits(rq.Model.from_pretrained(saved).params, new_model(seed=2).params)


# ---- what is wrong with a model is said ----

Q = "model.layers.1.self_attn.q_proj.weight"  # (48, 20)


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
        ['config.json: "hidden_size" is missing'],
    ),
    "config of another architecture": (
        lambda d: change_json(d / "config.json", model_type="gemma"),
        ["config.json: model_type: 'gemma' is not supported"],
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors: no such file"]),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["pytorch_model.bin: pickled files are never opened"],
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
        ['model.safetensors.index.json: expected a "weight_map"'],
    ),
    "index to numbers": (
        lambda d: change_json(into_shards(d), weight_map={Q: 1}),
        ['model.safetensors.index.json: expected a "weight_map"'],
    ),
    "missing shard": (lambda d: shard(d).unlink(), ["-of-00003.safetensors: no such file"]),
    "pickled shard": (lambda d: shard(d).rename(d / "model-2.bin"), ["model-2.bin: pickled files are never opened"]),
    "shard cut short": (
        lambda d: cut_short(shard(d), -1),
        ["-of-00003.safetensors: not a valid safetensors"],
    ),
    "shard without its tensor": (
        lambda d: change_tensors(shard(d), {Q: ...}),
        [f"-of-00003.safetensors: {Q} is missing, although model.safetensors.index.json names it"],
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


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("spoil", "said"), MODEL_FAULTS.values(), ids=MODEL_FAULTS)
def test_a_spoilt_model_is_refused_by_name(saved, spoil, said, quantize):
    rq.Model.from_pretrained(saved)
    spoil(saved)
    message = complaint(lambda path: rq.Model.from_pretrained(path, quantize=quantize), saved)
    assert str(saved) in message
    for part in said:
        assert part in message


def test_quantize_is_a_codebook_or_nothing(saved):
    assert "quantize: expected one of nf4, fp4, int4, got 'int8'" in complaint(
        lambda path: rq.Model.from_pretrained(path, quantize="int8"), saved
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_cannot_be_quantized_is_named(saved, value):
    weight = np.zeros((48, 20), np.float32)
    weight[7, 3] = value
    change_tensors(saved / "model.safetensors", {Q: weight})
    message = complaint(lambda path: rq.Model.from_pretrained(path, quantize="nf4"), saved)
    assert Q in message
    assert "7, 3" in message


# ---- a model made from another ----


def test_a_model_made_from_another_keeps_what_is_not_changed(saved, tmp_path):
    """config.json but for the dtype, in its own spelling; the tokenizer and its like; no README, no pickles."""
    change_json(saved / "config.json", unk_token_id=3, use_cache=True, initializer_range=0.02, torch_dtype=...)
    companions = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "merges.txt"]
    companions += ["chat_template.jinja", "additional_chat_templates/tools.jinja"]
    others = ["README.md", "loss.png", "pytorch_model.bin", "tokenizer.bin", ".cache", "notes/tokenizer.json"]
    for name in companions + others:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("{}")
    model = rq.Model.from_pretrained(saved)
    model.quantize()
    for dtype in (np.float16, np.float32):
        out = tmp_path / np.dtype(dtype).name
        pretrained.save(out, model.config, model.params, dtype, base=saved)
        written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        assert written == {*companions, "config.json", "model.safetensors"}
        before, config = (json.loads((d / "config.json").read_text()) for d in (saved, out))
        assert config.pop("quantization_config")["bnb_4bit_compute_dtype"] == np.dtype(dtype).name
        assert config == {**before, "dtype": np.dtype(dtype).name}
        dense = rq.Model.from_pretrained(out)
        pretrained.save(out / "dense", dense.config, new_model().params, np.float32, base=out)
        assert json.loads((out / "dense/config.json").read_text()) == {**before, "dtype": "float32"}


# ---- what is not finite ----

NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight", Q])
def test_a_weight_that_is_not_finite_is_named_where_it_enters(name, stored, quantize, tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path, stored)
    weight = model.params[name].astype(stored)
    weight.flat[5] = np.nan
    change_tensors(tmp_path / "model.safetensors", {name: weight})
    message = complaint(lambda path: rq.Model.from_pretrained(path, quantize=quantize), tmp_path)
    at = tuple(map(int, np.unravel_index(5, weight.shape)))
    assert message == f"{tmp_path}: {name}: expected finite numbers, got nan at {at}"


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight", Q])
@pytest.mark.parametrize(
    ("value", "said"), [(70000.0, "a number that float16 holds, got 70000.0"), (np.inf, "finite numbers, got inf")]
)
def test_what_the_file_s_dtype_does_not_hold_is_not_written(name, value, said, saved):
    before = {file: file.read_bytes() for file in saved.iterdir()}
    model = new_model()
    model.params[name].flat[0] = value
    message = complaint(lambda path: model.save_pretrained(path, np.float16), saved)
    at = (0,) * model.params[name].ndim
    assert message == f"{saved}: {name}: expected {said} at {at}"
    with pytest.raises(ValueError, match="expected") as error, new_directory(saved / "new") as new:
        model.save_pretrained(new, np.float16)
    assert str(error.value) == f"{saved / 'new'}: {name}: expected {said} at {at}"
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize("dtype", [np.complex64, np.int8, "bool"])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype, saved):
    for call in (
        lambda path: rq.Model.from_pretrained(path, dtype=dtype),
        lambda path: new_model().save_pretrained(path, dtype),
    ):
        assert complaint(call, saved).startswith("dtype: expected one of ")
