"""`refqlora inspect`: the numbers are those of the arrays, the tables fit, and a corrupt file is named in one line."""

import io
import json

import ml_dtypes
import numpy as np
import pytest
import tiny
from bnb_faults import FAULTS
from rich.console import Console
from spoil import new_model

import refqlora as rq
from refqlora.commands import main
from refqlora.commands.inspection import inspect
from refqlora.commands.inspection_tables import LONGEST, tables
from refqlora.files.reading import read_json, read_tensors
from refqlora.files.writing import write_json, write_tensors


@pytest.fixture
def saved(tmp_path):
    """A dense model and its tokenizer."""
    return tiny.save(tmp_path / "model")


@pytest.fixture
def quantized(tmp_path):
    """A model in 4 bits, to be spoilt."""
    model = new_model()
    model.quantize()
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.fixture
def adapter(saved, tmp_path):
    """An adapter of random matrices on `saved`."""
    model = rq.Model.from_pretrained(saved)
    model.add_adapter(rank=3, alpha=12, targets=("q_proj", "down_proj"))
    rng = np.random.default_rng(0)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    model.save_adapter(tmp_path / "adapter", base=str(saved))
    return tmp_path / "adapter"


def shown(facts, width=80):
    """The tables as text, that wide."""
    out = io.StringIO()
    console = Console(file=out, width=width, soft_wrap=True)
    for table in tables(facts):
        console.print(table, highlight=False)
    return out.getvalue()


# ---- what is in it ----


def test_a_dense_model(saved):
    model = rq.Model.from_pretrained(saved)
    facts = inspect(saved)
    assert set(facts) == {"path", "model", "tokenizer"}
    found = facts["model"]
    assert found["config"]["model_type"] == "llama"
    assert found["config"]["hidden_size"] == model.config.hidden_size
    assert {row["name"]: tuple(row["shape"]) for row in found["weights"]} == model.config.shapes()
    assert found["parameters"] == sum(p.size for p in model.params.values())
    nbytes = sum(p.nbytes for p in model.params.values())
    assert found["stored"]["bytes"] == nbytes
    assert found["stored"]["dtypes"] == {"F32": {"tensors": len(model.params), "bytes": nbytes}}
    assert found["stored"]["files"] == {"model.safetensors": nbytes}
    assert "quantized" not in found
    assert facts["tokenizer"]["size"] == 300
    assert facts["tokenizer"]["type"] == "BPE"


def test_the_predicted_error_of_nf4_is_the_real_one(saved):
    weight = "model.layers.1.mlp.up_proj.weight"  # (56, 40)
    tensors = dict(read_tensors(saved / "model.safetensors"))
    tensors[weight][7, 3] = 5.0  # an outlier: the others are about 0.02
    write_tensors(saved / "model.safetensors", tensors)
    rows = inspect(saved)["model"]["nf4_error"]
    assert {row["name"] for row in rows} == {n + ".weight" for n in tiny.config().linears()}
    assert [row["relative_error"] for row in rows] == sorted((row["relative_error"] for row in rows), reverse=True)
    for row in rows:
        w = tensors[row["name"]].astype(np.float64)
        e = rq.dequantize(rq.quantize(tensors[row["name"]])) - w
        rms = np.sqrt((w**2).mean())
        assert row["rms"] == pytest.approx(rms)
        assert row["relative_error"] == pytest.approx(np.sqrt((e**2).mean()) / rms)
        assert row["largest_error"] == pytest.approx(np.abs(e).max())
        assert row["outliers_per_million"] == pytest.approx(1e6 * (np.abs(w) > 6 * rms).mean())
        assert row["largest_absmax"] == pytest.approx(np.abs(w).max() / rms, rel=0.02)  # in 8 bits
    (spoilt,) = (row for row in rows if row["name"] == weight)
    assert spoilt["outliers_per_million"] == pytest.approx(1e6 / (56 * 40))
    assert max(rows, key=lambda row: row["largest_absmax"]) is spoilt


def test_a_model_in_4_bits(quantized):
    model = rq.Model.from_pretrained(quantized)
    found = inspect(quantized)["model"]
    weights = {n: p for n, p in model.params.items() if isinstance(p, rq.QuantizedTensor)}
    rows = {row["name"]: row for row in found["weights"]}
    assert {name: tuple(row["shape"]) for name, row in rows.items()} == model.config.shapes()
    for name, p in model.params.items():
        assert rows[name]["dtype"] == ("nf4" if name in weights else "F32")
        assert rows[name]["bytes"] == p.nbytes
    size = sum(q.size for q in weights.values())
    q = found["quantized"]
    assert (q["tensors"], q["parameters"]) == (len(weights), size)
    assert (q["types"], q["block_sizes"], q["nested"]) == (["nf4"], [64], [True])
    assert q["bits_per_parameter"] == pytest.approx(8 * sum(w.nbytes for w in weights.values()) / size)
    assert q["packed_bytes"] == sum(w.packed.nbytes for w in weights.values())
    assert q["constants_bytes"] == sum(w.constants_nbytes for w in weights.values())
    stored = dict(read_tensors(quantized / "model.safetensors"))
    maps = sum(x.nbytes for name, x in stored.items() if "quant_map" in name or "quant_state" in name)
    assert q["tables_bytes"] == maps
    assert found["stored"]["bytes"] == sum(x.nbytes for x in stored.values())
    assert "nf4_error" not in found
    alone = inspect(quantized / "model.safetensors")["tensors"]
    assert alone["weights"] == found["weights"]
    assert alone["quantized"] == q


def test_shards(saved):
    whole = inspect(saved)["model"]
    rq.Model.from_pretrained(saved).save_pretrained(saved, max_shard_size=30_000)
    found = inspect(saved)["model"]
    assert len(found["stored"]["files"]) > 2
    assert {row["name"]: row for row in found["weights"]} == {row["name"]: row for row in whole["weights"]}
    assert found["stored"]["bytes"] == whole["stored"]["bytes"]
    assert "model-00002-of" in shown({"model": found})


def test_one_shard_of_a_model_in_4_bits_need_not_be_whole(quantized):
    tensors = dict(read_tensors(quantized / "model.safetensors"))
    part = {name: x for name, x in tensors.items() if not name.endswith(".absmax")}
    path = quantized / "model-00001-of-00002.safetensors"
    write_tensors(path, part)
    assert {row["name"] for row in inspect(path, error=False)["tensors"]["weights"]} == set(part)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", ["dense", "quantised", "elsewhere"])
def test_an_adapter(base, rslora, saved, adapter):
    config = read_json(adapter / "adapter_config.json")
    where = saved
    if base == "quantised":
        model = rq.Model.from_pretrained(saved)
        model.quantize()
        where = saved.parent / "quantised"
        model.save_pretrained(where)
    if base == "elsewhere":
        where = "somebody/llama"
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": str(where), "use_rslora": rslora})
    found = inspect(adapter)["adapter"]
    assert found["base"] == str(where)
    assert found["scale"] == pytest.approx(12 / 3**0.5 if rslora else 4)
    tensors = dict(read_tensors(adapter / "adapter_model.safetensors"))
    assert len(found["matrices"]) == 4
    for row in found["matrices"]:
        a, b = (tensors[f"base_model.model.{row['linear']}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        change = found["scale"] * np.linalg.norm(b @ a)
        assert (row["rank"], row["in"], row["out"]) == (3, a.shape[1], b.shape[0])
        assert row["norm_A"] == pytest.approx(np.linalg.norm(a))
        assert row["norm_B"] == pytest.approx(np.linalg.norm(b))
        assert row["norm_change"] == pytest.approx(change)
        if base == "elsewhere":
            assert "relative_change" not in row
        else:
            w = rq.Model.from_pretrained(where).params[row["linear"] + ".weight"]
            w = rq.dequantize(w) if base == "quantised" else w
            assert row["relative_change"] == pytest.approx(change / np.linalg.norm(w))
    by = "norm_change" if base == "elsewhere" else "relative_change"
    assert [row[by] for row in found["matrices"]] == sorted((row[by] for row in found["matrices"]), reverse=True)


def test_what_else_an_adapter_holds_is_named(adapter):
    path = adapter / "adapter_model.safetensors"
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    write_tensors(path, {**dict(read_tensors(path)), extra: np.ones(48, np.float32)})
    assert inspect(adapter)["adapter"]["others"] == [extra]
    assert extra in "".join(shown(inspect(adapter)).split())


def test_an_adapters_file_by_itself(adapter):
    found = inspect(adapter / "adapter_model.safetensors")["adapter"]
    assert "scale" not in found
    assert {row["rank"] for row in found["matrices"]} == {3}
    assert "|B A|" in shown({"adapter": found})


def test_a_run_of_refqlora(saved, tmp_path):
    """Adapter, training checkpoint: what `refqlora finetune` leaves."""
    model = rq.Model.from_pretrained(saved, quantize="nf4")
    model.add_adapter(rank=2)
    rq.train(model, tiny.examples(), rq.TrainingConfig(steps=3, batch_size=2), out=tmp_path / "out")
    model.save_adapter(tmp_path / "out")
    facts = inspect(tmp_path / "out")
    assert set(facts) == {"path", "adapter", "training"}
    training = facts["training"]
    assert training["step"] == 3
    assert training["identity"]["batch_size"] == 2
    nbytes = sum(p.nbytes for p in model.trainable().values())
    assert training["param"] == {"tensors": 28, "bytes": nbytes}
    assert training["adamw"]["bytes"] >= 2 * nbytes
    text = shown(facts)
    assert "3 of 3" in text
    assert "an adapter of rank 2" in text
    assert inspect(tmp_path / "out/checkpoint.safetensors")["training"] == training


def test_a_directory_of_safetensors_only(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones((3, 4), np.float32)})
    write_tensors(tmp_path / "b.safetensors", {"y": np.ones(5, np.int64)}, {"by": "hand"})
    facts = inspect(tmp_path)
    assert [file["path"] for file in facts["files"]] == [str(tmp_path / f"{x}.safetensors") for x in "ab"]
    text = shown(facts)
    assert "metadata: by" in text
    assert "I64" in text


def test_a_model_that_refqlora_does_not_run(saved):
    config = read_json(saved / "config.json")
    write_json(saved / "config.json", {**config, "model_type": "bert"})
    found = inspect(saved)["model"]
    assert "model_type: 'bert' is not supported" in found["not_supported"]
    assert len(found["nf4_error"]) == 14 + 2  # every matrix: it is not known which are linears
    assert "refqlora does not support this model" in shown({"model": found})
    method = {"quant_method": "gptq"}
    write_json(saved / "config.json", {**config, "quantization_config": method})
    assert "got 'gptq'" in inspect(saved, error=False)["model"]["not_supported"]


def test_no_error_reads_no_numbers(saved, adapter, quantized):
    """A NaN in the data goes unnoticed, and nothing is reported that needs the data."""
    for path, file in ((saved, saved / "model.safetensors"), (adapter, adapter / "adapter_model.safetensors")):
        tensors = {name: np.full_like(x, np.nan) for name, x in read_tensors(file)}
        write_tensors(file, tensors)
        facts = inspect(path, error=False)
        text = json.dumps(facts)
        assert "nf4_error" not in text
        assert "norm_A" not in text
        shown(facts)
        with pytest.raises(ValueError, match=str(file.name) + r".*(nan|not finite)"):
            inspect(path)
    assert "quantized" in inspect(quantized, error=False)["model"]


# ---- as a person sees it ----


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(width, saved, quantized, adapter):
    for path in (saved, quantized, adapter, saved / "model.safetensors", rq.BUNDLED):
        for error in (True, False):
            text = shown(inspect(path, error=error), width)
            assert max(map(len, text.splitlines())) <= width, path
            assert "\x1b" not in text


def test_the_worst_come_first_and_the_rest_are_counted():
    facts = inspect(rq.BUNDLED)
    rows = facts["model"]["nf4_error"]
    text = shown(facts)
    assert f"{len(rows) - LONGEST} more in a pipe, or with --json" in text
    names = [row["name"].removeprefix("model.").removesuffix(".weight") for row in rows]
    assert text.index(names[0]) < text.index(names[1]) < text.index(names[LONGEST - 1])
    assert f"{names[LONGEST]} " not in text


def test_in_a_pipe_a_table_has_all_its_rows(capsys):
    rows = inspect(rq.BUNDLED)["model"]["nf4_error"]
    assert len(rows) > LONGEST
    assert main(["inspect", str(rq.BUNDLED)]) == 0
    out = capsys.readouterr().out
    assert all(row["name"].removeprefix("model.").removesuffix(".weight") in out for row in rows)
    assert " more in a pipe" not in out


def test_the_command_prints_tables_or_json(quantized, capsys):
    assert main(["inspect", str(quantized)]) == 0
    out = capsys.readouterr().out
    for part in ("nf4", "bits a parameter", "*.self_attn.q_proj", "llama"):
        assert part in out
    assert "\x1b" not in out
    assert main(["inspect", str(quantized), "--json", "--no-error"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(quantized, error=False)))


# ---- what is corrupt is said ----


def said(path, capsys):
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("refqlora inspect: ")
    return captured.err


# Of these inspect says what is there: other methods, dtypes and embeddings in 4 bits are no damage.
NO_DAMAGE = {name for name in FAULTS if "config" in name or "storage" in name or name.endswith("method")}
NO_DAMAGE |= {"no bits", "integers", "an embedding"}


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [pytest.param(*fault, id=name) for name, fault in FAULTS.items() if name not in NO_DAMAGE],
)
def test_a_spoilt_model_in_4_bits_is_named_as_when_it_is_loaded(spoil, parts, quantized, capsys):
    spoil(quantized)
    message = said(quantized, capsys)
    for part in parts:
        assert part in message


FAULTS = {
    "nothing there": (lambda d: d.rename(d.parent / "elsewhere"), "model: no such directory"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
        "model.safetensors: not a valid safetensors file",
    ),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "a tensor missing": (
        lambda d: write_tensors(d / "model.safetensors", {"lm_head.weight": np.ones((300, 40), np.float32)}),
        "model.embed_tokens.weight (300, 40) is missing",
    ),
    "no tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "tokenizer.json: the tokenizers library cannot read",
    ),
}


@pytest.mark.parametrize(("spoil", "part"), FAULTS.values(), ids=FAULTS)
def test_a_spoilt_directory_is_named(spoil, part, saved, capsys):
    spoil(saved)
    message = said(saved, capsys)
    assert str(saved) in message
    assert part in message


def without(letter):
    def spoil(tensors):
        name = next(name for name in tensors if f"lora_{letter}" in name)
        del tensors[name]

    return spoil


def turned(tensors):
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name].T


ADAPTER_FAULTS = {
    "no A": (without("A"), "lora_A.weight is missing"),
    "no B": (without("B"), "lora_B.weight is missing"),
    "B turned": (turned, "do not fit"),
    "not finite": (
        lambda tensors: next(iter(tensors.values())).fill(np.inf),
        "lora_A.weight: expected finite numbers, got inf at (0, 0)",
    ),
}


@pytest.mark.parametrize(("spoil", "part"), ADAPTER_FAULTS.values(), ids=ADAPTER_FAULTS)
def test_a_spoilt_adapter_is_named(spoil, part, adapter, capsys):
    path = adapter / "adapter_model.safetensors"
    tensors = dict(read_tensors(path))
    spoil(tensors)
    write_tensors(path, tensors)
    message = said(adapter, capsys)
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("r", None), ("lora_alpha", "32"), ("peft_type", "IA3")])
def test_an_unsupported_adapter_is_still_shown(key, value, adapter, capsys):
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), key: value})
    found = inspect(adapter)["adapter"]
    assert found["not_supported"].startswith(f"{path}: {key}")
    assert "scale" not in found
    assert "norm_change" in found["matrices"][0]
    text = shown({"adapter": found})
    assert f"refqlora does not support this adapter: {path}" in text
    assert "|B A|" in text


@pytest.mark.parametrize("value", [1, ["a"], {"a": 1}, "x" * 10**5, "a\0b"])
def test_a_base_that_cannot_be_is_named_or_not_at_hand(value, adapter, capsys):
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), "base_model_name_or_path": value})
    if isinstance(value, str):
        assert main(["inspect", str(adapter)]) == 0
        assert len(capsys.readouterr().out) < 10_000
    else:
        assert f"{path}: base_model_name_or_path: expected text, got {value!r}" in said(adapter, capsys)


@pytest.mark.parametrize("rslora", [False, True])
def test_each_linear_has_its_own_scale(rslora, saved, tmp_path):
    """rank_pattern and alpha_pattern: the change is what the model computes with."""
    model = rq.Model.from_pretrained(saved)
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 0.5, "layers.1.self_attn.q_proj": 40}}
    model.add_adapter(rank=3, alpha=12, targets=("q_proj", "down_proj"), rslora=rslora, **patterns)
    rng = np.random.default_rng(0)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    model.save_adapter(tmp_path / "adapter")
    found = inspect(tmp_path / "adapter")["adapter"]
    scales = set()
    for row in found["matrices"]:
        w = model.params[row["linear"] + ".weight"]
        lora = model.adapters["default"].lora(row["linear"])
        assert row["norm_change"] == pytest.approx(np.linalg.norm(rq.merge(w, lora) - w), rel=1e-5)
        assert row["scale"] == lora.scale
        scales.add(lora.scale)
    assert len(scales) == 3
    assert f"{min(scales):g} to {max(scales):g}" in shown({"adapter": found})


def test_a_config_of_billions_of_layers_is_refused_at_once(saved):
    write_json(saved / "config.json", {**read_json(saved / "config.json"), "num_hidden_layers": 2**31})
    found = inspect(saved, error=False)["model"]["not_supported"]
    assert "config.json: num_hidden_layers: expected a whole number from 1 to 9999, got 2147483648" in found


def test_what_a_file_says_is_cut_and_never_obeyed_by_the_terminal(tmp_path, capsys):
    names = ["[/bold]", "[red]x", "\x1b[2J", "two\nlines", "\ud800", "x" * 999]
    metadata = {"\x1b[31m": "\x1b[0m", "long": "y" * 10**5, "[/x]": "[/y]", "k" * 10**4: "\n"}
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[/bold]" in out
    assert len(out) < 10_000
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["metadata"]["long"] == metadata["long"]


def test_a_model_by_its_id_on_the_hub(saved, monkeypatch, capsys):
    monkeypatch.setattr("refqlora.files.hub._download", lambda *_: saved)
    assert inspect("org/model@main", error=False)["model"] == inspect(saved, error=False)["model"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"identity": "{"},
        {"identity": "{}"},
        {"identity": "[]", "step": "1"},
        {"identity": "[" * 10**5, "step": "1"},
        {"identity": "{}", "step": "1" * 5000},
    ],
)
def test_a_bad_training_checkpoint_is_named(metadata, tmp_path, capsys):
    path = tmp_path / "checkpoint.safetensors"
    write_tensors(path, {"param.x": np.ones(3, ml_dtypes.bfloat16)}, metadata)
    assert "in the metadata: expected a" in said(path, capsys)


def test_a_file_of_another_format_is_named(tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "model.bin: expected a .safetensors file" in said(tmp_path / "model.bin", capsys)
    assert "contains no config.json" in said(tmp_path, capsys)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors: not a valid safetensors file" in said(tmp_path / "model.safetensors", capsys)
