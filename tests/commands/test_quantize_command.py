"""`refqlora quantize`: it writes all files of a quantised model, or none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from rich.console import Console

import refqlora as rq
from refqlora.codebooks import CODEBOOKS
from refqlora.commands import main
from refqlora.commands.quantize import quantize_files
from refqlora.files import model_files
from refqlora.files.reading import read_json, read_tensors
from refqlora.files.writing import write_json, write_tensors

QUIET = Console(quiet=True)


@pytest.fixture
def saved(tmp_path):
    """A dense model and its tokenizer."""
    return tiny.save(tmp_path / "model")


def quantize(model, out, **options):
    return quantize_files(model, out, QUIET, **options)


@pytest.mark.parametrize(
    "options", [{}, {"kind": "fp4"}, {"block_size": 32}, {"double_quant": False}, {"shard_bytes": 20_000}]
)
def test_it_writes_what_the_model_would(options, saved, tmp_path):
    facts = quantize(saved, tmp_path / "out", **options)
    shard_bytes = options.pop("shard_bytes", None)
    model = rq.Model.from_pretrained(saved)
    dense = dict(model.params)
    model.quantize(**options)
    model.save_pretrained(tmp_path / "expected")
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= dict(read_tensors(file))
    expected = dict(read_tensors(tmp_path / "expected/model.safetensors"))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (x.dtype, x.shape, x.tobytes())
    assert read_json(tmp_path / "out/config.json") == read_json(tmp_path / "expected/config.json")
    assert (tmp_path / "out" / model_files.INDEX).exists() == (shard_bytes is not None)
    tokens = np.arange(22).reshape(2, 11)
    again = rq.Model.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again.forward(tokens)[0], model.forward(tokens)[0])

    quantized = {n: p for n, p in model.params.items() if isinstance(p, rq.QuantizedTensor)}
    assert facts["bytes"]["after"] == sum(x.nbytes for x in expected.values())
    assert facts["bytes"]["before"] == sum(x.nbytes for x in dense.values())
    size = sum(q.size for q in quantized.values())
    assert facts["linears"]["parameters"] == size
    bits = 8 * sum(q.nbytes for q in quantized.values()) / size
    assert facts["linears"]["bits_per_parameter"] == pytest.approx(bits)
    for kind, row in facts["kinds"].items():
        names = [n for n in quantized if n.endswith(f".{kind}.weight")]
        w = np.concatenate([dense[n].ravel() for n in names]).astype(np.float64)
        e = np.concatenate([rq.dequantize(quantized[n]).ravel() for n in names]) - w
        assert row["tensors"] == len(names) == 2
        assert row["relative_error"] == pytest.approx(np.sqrt((e**2).sum() / (w**2).sum()))
        assert row["largest_error"] == pytest.approx(np.abs(e).max())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_dense_tensors_keep_their_dtype_and_bits(dtype, saved, tmp_path):
    rq.Model.from_pretrained(saved).save_pretrained(saved, dtype)
    quantize(saved, tmp_path / "out")
    before, after = (dict(read_tensors(d / "model.safetensors")) for d in (saved, tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert after[name].dtype == dtype
        assert after[name].tobytes() == before[name].tobytes()
    name = np.dtype(dtype).name
    assert read_json(tmp_path / "out/config.json")["quantization_config"]["bnb_4bit_compute_dtype"] == name
    linear = "model.layers.0.mlp.up_proj.weight"
    q = rq.Model.from_pretrained(tmp_path / "out").params[linear]
    assert q.dtype == dtype
    np.testing.assert_array_equal(q.packed, rq.quantize(before[linear]).packed)


def test_what_belongs_to_the_model_comes_along(saved, tmp_path):
    companions = {"tokenizer_config.json": b"{}", "generation_config.json": b'{"a": 1}', "LICENSE.txt": b"as it is\r\n"}
    others = {"pytorch_model.bin": b"pickle", "optimizer.pt": b"", "README.md": b"a dense model", "notes.json": b"{}"}
    for name, content in (companions | others).items():
        (saved / name).write_bytes(content)
    write_json(
        saved / "config.json", {**read_json(saved / "config.json"), "transformers_version": "5.0", "use_cache": True}
    )
    quantize(saved, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *companions, "tokenizer.json", "config.json", "model.safetensors"
    }  # fmt: skip
    for name in [*companions, "tokenizer.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()
    config = read_json(tmp_path / "out/config.json")
    assert config.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert config == read_json(saved / "config.json")


def test_a_tied_model_and_what_older_writers_leave(tmp_path):
    saved = tiny.save(tmp_path / "model", tied=True)
    tensors = dict(read_tensors(saved / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_tensors(saved / "model.safetensors", tensors)
    quantize(saved, tmp_path / "out")
    tokens = np.arange(22).reshape(2, 11)
    expected = rq.Model.from_pretrained(saved, quantize="nf4").forward(tokens)[0]
    np.testing.assert_array_equal(rq.Model.from_pretrained(tmp_path / "out").forward(tokens)[0], expected)


# ---- what is wrong is said, and nothing is left ----


def spoil(directory, **changes):
    """Set tensors of the model; None removes one."""
    tensors = {**dict(read_tensors(directory / "model.safetensors")), **changes}
    write_tensors(directory / "model.safetensors", {name: x for name, x in tensors.items() if x is not None})


UP = "model.layers.1.mlp.up_proj.weight"
NAN = np.ones((56, 40), np.float32)
NAN[3, 5] = np.nan
FAULTS = {
    "no model": (lambda d: d.rename(d.parent / "elsewhere"), ["no such directory"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors: no such file"]),
    "cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
        ["model.safetensors: not a valid safetensors file"],
    ),
    "a norm not finite": (
        lambda d: spoil(d, **{"model.norm.weight": np.full(40, np.inf, np.float32)}),
        ["model.norm.weight: expected finite numbers, got inf at (0,)"],
    ),
    "not finite": (lambda d: spoil(d, **{UP: NAN}), [UP, "expected finite numbers, got nan at (3, 5)"]),
    "misshapen": (lambda d: spoil(d, **{UP: np.ones((40, 56), np.float32)}), [UP, "(40, 56)", "(56, 40)"]),
    "missing": (lambda d: spoil(d, **{UP: None}), [UP, "missing"]),
    "unexpected": (lambda d: spoil(d, spare=np.ones(3, np.float32)), ["spare is not expected"]),
    "integers": (lambda d: spoil(d, **{UP: np.ones((56, 40), np.uint8)}), [UP, "uint8"]),
    "quantised already": (
        lambda d: write_json(d / "config.json", {**read_json(d / "config.json"), "quantization_config": {}}),
        ["config.json: the model is quantised already"],
    ),
    "another architecture": (
        lambda d: write_json(d / "config.json", {**read_json(d / "config.json"), "model_type": "bert"}),
        ["config.json: model_type: 'bert'"],
    ),
}


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_spoilt_model_is_refused_in_one_line(fault, said, saved, tmp_path, capsys):
    fault(saved)
    (tmp_path / "out").mkdir()
    assert main(["quantize", "--model", str(saved), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("refqlora quantize: ")
    assert err.count("\n") == 1
    for part in [str(saved), *said]:
        assert part in err
    assert not [file for file in tmp_path.rglob("*out*") if file.name != "out" or any(file.iterdir())]


@pytest.mark.parametrize("out", ["model", "full", "file"])
def test_it_writes_over_nothing(out, saved, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert main(["quantize", "--model", str(saved), "--out", str(tmp_path / out)]) == 2
    assert f"{tmp_path / out}: expected a new or empty directory, got " in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_killed_run_leaves_no_model_and_blocks_nothing(saved, tmp_path):
    """Killed when all is written but config.json, which makes it a model."""
    child = f"""
import os
from refqlora import commands
os.replace = lambda a, b: os._exit(9) if str(b).endswith("config.json") else None
commands.main(["quantize", "--model", {str(saved)!r}, "--out", {str(tmp_path / "out")!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(rq.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", child], env=environment).returncode == 9
    with pytest.raises(FileNotFoundError, match=r"out/config\.json: no such file"):
        rq.Model.from_pretrained(tmp_path / "out")
    quantize(saved, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"model", "out"}
    assert not list((tmp_path / "out").glob(".*"))
    rq.Model.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("out", ["link", "link to nothing", "link to a full one"])
def test_a_link_to_an_empty_directory_is_followed(out, saved, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to({"link": "elsewhere", "link to nothing": "none"}.get(out, "model"))
    done = main(["quantize", "--model", str(saved), "--out", str(tmp_path / "out"), "--json"])
    if out == "link":
        assert done == 0
        rq.Model.from_pretrained(tmp_path / "elsewhere")
    else:
        assert done == 2
        assert f"{tmp_path / 'out'}: expected a new or empty directory, got " in capsys.readouterr().err
    assert (tmp_path / "out").is_symlink()


# ---- what a person sees ----


def test_the_table_and_the_json(saved, tmp_path, capsys):
    assert (
        main(["quantize", "--model", str(saved), "--out", str(tmp_path / "a"), "--type", "fp4", "--block-size", "128"])
        == 0
    )
    out = capsys.readouterr().out
    for part in ("FP4 in blocks of 128, constants in 8 bits", "down_proj", "all linears", f"wrote {tmp_path}/a/"):
        assert part in out
    arguments = ["quantize", "--model", str(saved), "--out", str(tmp_path / "b"), "--no-double-quant", "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["type"], facts["block_size"], facts["double_quant"]) == ("nf4", 64, False)
    assert set(facts["kinds"]) == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert f"{tmp_path}/b" not in json.dumps(facts)


@pytest.mark.parametrize("option", [["--type", "int4"], ["--block-size", "65"]])
def test_options_that_make_no_sense(option, saved, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["quantize", "--model", str(saved), "--out", str(tmp_path / "out"), *option])
    assert end.value.code == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_int4_is_for_the_model_only(saved, tmp_path):
    with pytest.raises(ValueError, match="type: expected one of nf4, fp4, got 'int4'"):
        quantize(saved, tmp_path / "out", kind="int4")
    q = rq.Model.from_pretrained(saved, quantize="int4").params[UP]
    assert q.codebook is CODEBOOKS["int4"]
