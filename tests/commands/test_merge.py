"""Adapters merged into their base: the files, the errors, and the output directory."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny
from spoil import change_json, change_tensors

import refqlora as rq
from refqlora import commands as cli
from refqlora.commands import merge
from refqlora.commands.merge import merge_model
from refqlora.files import reading as files

TOKENS = np.arange(24).reshape(2, 12)
KINDS = {
    "LoRA": {},
    "DoRA on q and down": {"dora": True, "targets": ("q_proj", "down_proj")},
    "PiSSA": {"init": "pissa", "rank_pattern": {"q_proj": 2}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tiny.save(tmp_path_factory.mktemp("base"))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "pytorch_model.bin").write_bytes(b"old")
    (path / ".cache").write_text("hidden")
    return path


def trained(base, path, seed=0, size=0.02, **options):
    """An adapter's directory, each of its arrays moved at random."""
    model = rq.Model.from_pretrained(base)
    model.add_adapter(**{"rank": 4, "alpha": 8, **options})
    rng = np.random.default_rng(seed)
    for p in model.trainable().values():
        p += (size * rng.standard_normal(p.shape)).astype(p.dtype)
    model.save_adapter(path)
    return path


def with_adapter(base, *adapters, nf4):
    """The model that was trained: the last adapter's, on its base."""
    model = rq.Model.from_pretrained(base)
    for i, adapter in enumerate(adapters):
        model.load_adapter(adapter, str(i))
    if nf4:
        model.quantize()
    return model


def off(found, expected):
    return abs(found - expected).max() / abs(expected).max()


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_merged_it_is_the_model_that_was_trained(kind, nf4, base, tmp_path):
    """In 32 bits to rounding; and without an adapter every linear is what the base's was."""
    adapter = trained(base, tmp_path / "a", **kind)
    facts = merge_model(base, [adapter], tmp_path / "out", trained_on_nf4=nf4)
    assert (facts["into"], facts["dtype"]) == ("dequantised" if nf4 else "original", "float32")
    merged, model = rq.Model.from_pretrained(tmp_path / "out"), with_adapter(base, adapter, nf4=nf4)
    expected = model.forward(TOKENS)[0]
    assert off(merged.forward(TOKENS)[0], expected) < 1e-5
    model.set_adapter(None)
    assert off(model.forward(TOKENS)[0], expected) > 1e-3
    assert facts["all"]["dequantised" if nf4 else "original"] < 1e-5
    assert facts["all"]["original" if nf4 else "dequantised"] > 0.1


def test_what_is_written(base, tmp_path):
    adapter = trained(base, tmp_path / "a")
    merge_model(base, [adapter], tmp_path / "new" / "out", dtype="bfloat16")
    written = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    tensors = dict(files.read_tensors(tmp_path / "new/out/model.safetensors"))
    assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "new/out/config.json").read_text())["dtype"] == "bfloat16"
    merge_model(tmp_path / "new" / "out", [adapter], tmp_path / "again")  # the dtype of the base's files
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_the_errors_are_their_definitions(base, tmp_path):
    adapter = trained(base, tmp_path / "a", targets=("q_proj", "up_proj"))
    facts = merge_model(base, [adapter], tmp_path / "out", dtype="float16")
    model = with_adapter(base, adapter, nf4=False)
    squares = dict.fromkeys(("weight", "change", "original", "dequantised", "requantised"), 0.0)
    for i in (0, 1):
        linear = f"model.layers.{i}.self_attn.q_proj"
        w = model.params[linear + ".weight"]
        a, b, scale, *_ = model.adapters["0"].lora(linear)
        change = scale * b @ a
        learnt = rq.dequantize(rq.quantize(w)) + change
        squares["weight"] += (w**2).sum()
        squares["change"] += (change**2).sum()
        squares["original"] += (((w + change).astype(np.float16).astype(np.float32) - learnt) ** 2).sum()
        squares["dequantised"] += ((learnt.astype(np.float16).astype(np.float32) - learnt) ** 2).sum()
        squares["requantised"] += ((rq.dequantize(rq.quantize(learnt)) - learnt) ** 2).sum()
    row = facts["kinds"]["q_proj"]
    assert row["linears"] == 2
    assert row["change"] == pytest.approx((squares["change"] / squares["weight"]) ** 0.5, rel=1e-4)
    for way in ("original", "dequantised", "requantised"):
        assert row[way] == pytest.approx((squares[way] / squares["change"]) ** 0.5, rel=1e-3)
    assert facts["kinds"]["k_proj"]["original"] is None  # nothing changes there
    assert facts["all"]["linears"] == 14


def test_what_requantising_erases(base, tmp_path):
    """Small changes are lost in 4 bits, large ones are not."""
    sizes = {0.002: None, 0.3: None}
    for size in sizes:
        adapter = trained(base, tmp_path / f"{size}", size=size)
        sizes[size] = merge_model(base, [adapter], tmp_path / f"out{size}")
    small, large = sizes.values()
    assert small["all"]["change"] < 0.05 < 1 < large["all"]["change"]
    assert (small["erased"], large["erased"]) == (True, False)
    assert small["all"]["kept"] < 0.3
    assert large["all"]["kept"] == pytest.approx(1, abs=0.02)
    assert small["all"]["requantised"] > 0.9
    assert large["all"]["requantised"] < 0.2
    assert small["all"]["original"] > 1 > large["all"]["original"]


def test_what_4_bits_keep(base, tmp_path):
    """By its definition, on one matrix with all linears' weights; and noise makes an error of what is kept in full."""
    adapter = trained(base, tmp_path / "a", size=0.05)
    model = with_adapter(base, adapter, nf4=False)
    names = [linear + ".weight" for linear in model.config.linears()]
    q = [rq.quantize(model.params[name]) for name in names]
    learnt = [rq.dequantize(w) + _change(model, name) for w, name in zip(q, names, strict=True)]
    again = [rq.quantize(w) for w in learnt]
    before, trained_to, after = (
        np.concatenate([w.ravel() for w in ws]).astype(np.float64)
        for ws in ([*map(rq.dequantize, q)], learnt, [*map(rq.dequantize, again)])
    )
    change, left = trained_to - before, after - before
    kept = merge.kept_in_4_bits(model, model.adapters)
    assert kept["change"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before), rel=1e-5)
    assert kept["kept"] == pytest.approx(left @ change / (change @ change), rel=1e-4)
    assert kept["error"] == pytest.approx(np.linalg.norm(left - change) / np.linalg.norm(change), rel=1e-4)
    codes = (
        [np.stack([w.packed >> 4, w.packed & 15]) for w in q],
        [np.stack([w.packed >> 4, w.packed & 15]) for w in again],
    )
    different = sum(int((a != b).sum()) for a, b in zip(*codes, strict=True))
    assert kept["codes"] == different / len(before) > 0.01
    noise = np.linalg.norm(left - kept["kept"] * change) / np.linalg.norm(change)
    assert kept["error"] ** 2 == pytest.approx((1 - kept["kept"]) ** 2 + noise**2, rel=1e-4)


def _change(model, name):
    lora = model.adapters[model.active].lora(name.removesuffix(".weight"))
    return lora.scale * lora.B @ lora.A


def test_4_bits_keep_large_changes_only(base, tmp_path):
    small, large = (
        merge.kept_in_4_bits(model, model.adapters)
        for size in (0.001, 0.3)
        for model in [with_adapter(base, trained(base, tmp_path / f"{size}", size=size), nf4=False)]
    )
    assert small["codes"] < 0.001 < 0.5 < large["codes"]
    assert abs(small["kept"]) < 0.1 < 0.95 < large["kept"] < 1.05
    assert small["error"] > 0.9 > large["error"]


def test_several_adapters_add_up(base, tmp_path):
    one, two = (trained(base, tmp_path / str(seed), seed=seed, dora=seed == 1) for seed in (0, 1))
    merge_model(base, [one, two], tmp_path / "out", trained_on_nf4=False)
    merged = rq.Model.from_pretrained(tmp_path / "out")
    model = with_adapter(base, one, two, nf4=False)
    for linear in model.config.linears():
        w = model.params[linear + ".weight"]
        expected = sum(rq.merge(w, model.adapters[name].lora(linear)) - w for name in "01") + w
        np.testing.assert_allclose(merged.params[linear + ".weight"], expected, atol=1e-6)


def test_back_into_4_bits(base, tmp_path):
    """Every linear is requantised, those without an adapter too."""
    adapter = trained(base, tmp_path / "a", targets=("q_proj",))
    facts = merge_model(base, [adapter], tmp_path / "out", into="nf4", dtype="bfloat16")
    assert (facts["into"], facts["dtype"]) == ("nf4", "bfloat16")
    merged, expected = rq.Model.from_pretrained(tmp_path / "out"), with_adapter(base, adapter, nf4=True)
    for linear in merged.config.linears():
        weight, lora = expected.params[linear + ".weight"], expected.adapters["0"].lora(linear)
        wanted = rq.dequantize(weight) if lora is None else rq.merge(weight, lora)
        np.testing.assert_array_equal(merged.params[linear + ".weight"].packed, rq.quantize(wanted).packed)


def test_an_error_leaves_nothing(base, tmp_path, monkeypatch):
    adapter = trained(base, tmp_path / "a")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(merge.pretrained, "save", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_model(base, [adapter], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    merge_model(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_other_tensors_stay_the_same(base, tmp_path):
    """In config.json, and of the files beside it what describes the tokenizer, not these weights."""
    copy = shutil.copytree(base, tmp_path / "base")
    change_json(copy / "config.json", use_cache=False, unk_token_id=3, initializer_range=0.5, torch_dtype=...)
    (copy / "README.md").write_text("about the base")
    (copy / "loss.png").touch()
    merge_model(copy, [trained(base, tmp_path / "a")], tmp_path / "out", dtype="float16")
    before, after = (json.loads((d / "config.json").read_text()) for d in (copy, tmp_path / "out"))
    assert after == before | {"dtype": "float16"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


def test_the_place_is_checked_before_the_work(base, tmp_path, monkeypatch):
    adapter = trained(base, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(merge.Model, "from_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(ValueError, match="link: expected a new or empty directory, got a link to nothing"):
        merge_model(base, [adapter], tmp_path / "link")
    monkeypatch.undo()
    (tmp_path / "nowhere").mkdir()
    merge_model(base, [adapter], tmp_path / "link")
    assert (tmp_path / "nowhere" / "config.json").is_file()


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_what_a_dtype_does_not_hold_is_named(name, base, tmp_path):
    name += ".weight"
    copy = shutil.copytree(base, tmp_path / "base")
    value = dict(files.read_tensors(copy / "model.safetensors"))[name]
    value.flat[3] = 1e6
    change_tensors(copy / "model.safetensors", {name: value})
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a number that float16 holds, got 1000000\.0"):
        merge_model(copy, [trained(base, tmp_path / "a")], tmp_path / "out", dtype="float16", trained_on_nf4=False)
    assert not (tmp_path / "out").exists()


def test_the_adapter_at_fault_is_named(base, tmp_path):
    good, bad = trained(base, tmp_path / "good"), trained(base, tmp_path / "bad", seed=1)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight".format
    huge = {name("A"): np.full((4, 40), 1e30, np.float32), name("B"): np.full((56, 4), 1e30, np.float32)}
    change_tensors(bad / "adapter_model.safetensors", huge)
    with pytest.raises(
        ValueError, match=rf"^{bad}: model\.layers\.1\.mlp\.up_proj: W \+ s B A: expected finite numbers, got inf"
    ):
        merge_model(base, [good, bad], tmp_path / "out")
    change_tensors(bad / "adapter_model.safetensors", {name("A"): np.full((4, 40), np.nan, np.float32)})
    with pytest.raises(ValueError, match=rf"^{bad}: \S+\.up_proj\.lora_A\.weight: expected finite numbers, got nan"):
        merge_model(base, [good, bad], tmp_path / "out")
    merge_model(base, [good, good], tmp_path / "out")  # twice the change


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command(base, tmp_path, capsys):
    adapter = trained(base, tmp_path / "a", size=0.002)
    argv = ["merge", "--model", str(base), "--adapter", str(adapter), "--out"]
    assert cli.main([*argv, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for kind in ("q_proj", "down_proj", "all"):
        assert re.search(rf"│ {kind} +│ +0\.0\d+ │ +[\d.]+ │ +[\d.e-]+ │ +[\d.]+ │", printed), kind
    assert "the trained ones (the NF4 base with the adapter), relative to the adapter's change" in printed
    assert re.search(r"Warning: quantising again keeps \d+ % of the adapter", printed)
    assert "Use the result with --no-quantize." in printed
    assert f"wrote {tmp_path / 'out'}/: merged into the dequantised base, float32" in printed.replace("\n", "")
    use = f"refqlora generate --model {tmp_path / 'out'} --no-quantize --prompt TEXT"
    assert printed.endswith(f"try it: {use}\n")
    assert cli.main([*use.split()[1:], "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*argv, str(tmp_path / "json"), "--no-quantize", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["into"], facts["trained_on_nf4"]) == ("original", False)
    assert cli.main([*argv, str(tmp_path / "original"), "--original", "--dtype", "float16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["into"], facts["trained_on_nf4"], facts["dtype"]) == ("original", True, "float16")


def test_bad_input_is_refused(base, tmp_path, capsys):
    adapter, idle = trained(base, tmp_path / "a"), trained(base, tmp_path / "idle", size=0)
    huge = trained(base, tmp_path / "huge", size=300)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    cases = {
        f"--adapter {adapter} --out {tmp_path / 'full'}": "full: expected a new or empty directory, got",
        f"--adapter {adapter} --out {base}": "expected a new or empty directory, got",
        f"--adapter {tmp_path / 'none'} --out {tmp_path / 'o'}": "none/adapter_config.json: no such file",
        f"--adapter {huge} --out {tmp_path / 'o'} --dtype float16": "expected a number that float16 holds, got",
        f"--adapter {idle} --out {tmp_path / 'o'}": "nothing to merge: the adapters change no weight",
    }
    for argv, message in cases.items():
        assert cli.main(["merge", "--model", str(base), *argv.split()]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1 + ("idle" in argv)  # what is zero throughout is warned of, in a line of its own
        assert not (tmp_path / "o").exists()
    for argv in ("--out o", "--adapter a", "--adapter a --out o --nf4 --original"):
        with pytest.raises(SystemExit):
            cli.main(["merge", *argv.split()])
        assert capsys.readouterr().err.count("\n") == 1


def test_an_untrained_adapter_is_warned_of_in_one_line(base, tmp_path, capsys):
    idle = trained(base, tmp_path / "idle", size=0)
    argv = ["generate", "--model", str(base), "--adapter", str(idle), "--prompt", "a", "--max-new-tokens", "1"]
    assert cli.main(argv) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert re.fullmatch(r"refqlora generate: warning: .*: 14 of 14 lora_B are all zeros \(.*\), so .*", warning)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_generate_quantises_after_the_weights_were_taken_apart(init, base, tmp_path, capsys, monkeypatch):
    adapter = trained(base, tmp_path / "a", init=init)
    seen = []
    monkeypatch.setattr(cli.generate, "stream", lambda model, *args, **options: seen.append(model) or iter([""]))
    assert cli.main(["generate", "--model", str(base), "--adapter", str(adapter), "--prompt", "a"]) == 0
    expected = with_adapter(base, adapter, nf4=True)
    np.testing.assert_array_equal(seen[0].forward(TOKENS)[0], expected.forward(TOKENS)[0])
