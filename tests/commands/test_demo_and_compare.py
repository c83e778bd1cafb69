"""The main job, the comparison and the pretraining, on a tiny stand-in for the bundled base."""

import io
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
import tiny
from rich.console import Console
from safetensors.numpy import load_file

import refqlora as rq
from refqlora import commands as cli
from refqlora.commands import compare, demo, pretrain
from refqlora.files.reading import read_json
from refqlora.text import corpus
from refqlora.text.encoding import pack
from refqlora.text.examples import Document, Example
from refqlora.text.generation import complete
from refqlora.text.tokenizer import load_tokenizer, train_bpe
from refqlora.training import evaluate

NAMES = ("read", "write", "open", "close", "count", "split", "join", "find")
THINGS = ("sack", "egg", "mill", "river", "wheel", "word")
FUNCTION = (
    'def {name}_{thing}({thing}, n={n}):\n    """{Name} {n} of the {thing}s."""\n    return {thing}.{name}(n)\n\n\n'
)
DOCUMENTS = [
    Document(
        thing,
        "".join(FUNCTION.format(name=name, Name=name.title(), thing=thing, n=n) for n in range(5) for name in NAMES),
    )
    for thing in THINGS
]
EXAMPLES = [
    Example(f"def {name}_{thing}({thing}):\n", f'    """{name.title()} the {thing}."""\n')
    for thing in THINGS
    for name in NAMES
]


def stand_in(path):
    """A small base that is to be taken for the bundled one."""
    config = tiny.config(vocab_size=320, max_positions=96, tied=True, bos_token_id=0)
    model = rq.Model.from_config(config, 5)
    for p in model.params.values():
        p *= 3
    model.save_pretrained(path, ml_dtypes.bfloat16)
    train_bpe(DOCUMENTS, 320).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The stand-in in the bundled base's place, and a corpus of a few documents."""
    path = stand_in(tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "BUNDLED", path)
        patch.setattr(corpus, "modules", lambda held_out: DOCUMENTS[:5] if held_out else DOCUMENTS[3:])
        patch.setattr(corpus, "docstring_examples", lambda held_out, *_: EXAMPLES[40:] if held_out else EXAMPLES[:40])
        patch.setattr(corpus, "language_reference", lambda held_out: DOCUMENTS[:2] if held_out else DOCUMENTS[2:])
        patch.setattr(demo, "SHOWN", ("find_word", "no_such_function", "open_word"))
        yield path


def run(job, out, **options):
    """The job's figures and what it printed."""
    printed = io.StringIO()
    return job(out, Console(file=printed, width=400), **options), printed.getvalue()


# ---- the demo ----


@pytest.fixture(scope="module")
def demonstrated(base, tmp_path_factory):
    """The directory, figures and words of one demo, to be read only."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, *run(demo.demo, out, steps=12, seed=1)


def test_an_adapter_switched_off_is_the_base(demonstrated):
    _, facts, printed = demonstrated
    assert facts["off_is_base"] is True
    bits = facts["source_bits_per_byte"]
    assert bits["off"] == bits["nf4"]
    assert bits["adapter"] != bits["nf4"] != bits["dense"]
    assert f"adapter on    {bits['adapter']:.4f} bits a byte, {bits['nf4']:.4f} before" in printed
    assert f"adapter off   {bits['nf4']:.4f} bits a byte, as before, to the bit: nothing is forgotten" in printed


def test_an_adapter_that_stays_on_is_noticed(base, tmp_path, monkeypatch):
    """The planted mistake: None switches nothing off."""
    set_adapter = rq.Model.set_adapter
    monkeypatch.setattr(rq.Model, "set_adapter", lambda self, name: name and set_adapter(self, name))
    facts, printed = run(demo.demo, tmp_path, steps=3)
    assert facts["off_is_base"] is False
    assert "nothing is forgotten" not in printed
    assert " bits a byte, NOT as before" in printed


def test_its_bytes_add_up(base, demonstrated):
    _, facts, printed = demonstrated
    shapes = rq.Model.from_pretrained(base).config.shapes()
    linears = [shapes[name + ".weight"] for name in tiny.config().linears()]
    everything, inside = sum(math.prod(shape) for shape in shapes.values()), sum(a * b for a, b in linears)
    constants = sum(n + 4 * -(-n // 256) for n in (-(-a * b // 64) for a, b in linears))
    adapter = 4 * sum(16 * (a + b) for a, b in linears)
    assert facts["bytes"] == {
        "codes": inside // 2,
        "constants": constants,
        "dense": 4 * (everything - inside),
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": 2 * adapter,
        "total": inside // 2 + constants + 4 * (everything - inside) + 4 * adapter,
    }
    q = facts["quantization"]
    assert (q["linears"], q["parameters"], q["model_parameters"]) == (14, inside, everything)
    assert (q["float32_bytes"], q["nf4_bytes"]) == (4 * inside, inside // 2 + constants)
    assert q["model_bytes"] == q["model_float32_bytes"] - q["float32_bytes"] + q["nf4_bytes"]
    assert q["bits_per_param"] == pytest.approx(4 + 8 * constants / inside, rel=1e-12)
    assert 0.05 < q["relative_error"] < 0.15  # NF4's on a normal distribution is about 0.09
    assert facts["trainable_parameters"] == adapter // 4
    assert facts["full_bytes"] == {
        "dense": 4 * everything,
        "gradients": 4 * everything,
        "optimizer": 8 * everything,
        "total": 16 * everything,
    }
    parts = (*facts["bytes"].values(), *facts["full_bytes"].values())
    for number in (*parts, everything, inside, q["nf4_bytes"], q["model_bytes"]):
        assert f"{number:,}" in printed


def test_its_files_are_its_figures(base, demonstrated):
    out, facts, _ = demonstrated
    files = {"adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "loss.png", "metrics.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "refqlora"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4, 6, 8, 10, 12]
    assert facts["seconds_per_step"] == np.median([row["seconds"] for row in rows])

    tokenizer = load_tokenizer(base)
    model = rq.Model.from_pretrained(base, quantize="nf4")
    _, held_out = demo.docstring_task(tokenizer, 0)
    assert evaluate(model, held_out).loss == facts["held_out_loss"]["before"]
    model.load_adapter(out)
    assert evaluate(model, held_out).loss == facts["held_out_loss"]["after"] == rows[-1]["held_out_loss"]
    assert facts["held_out_loss"]["after"] < facts["held_out_loss"]["before"]
    source = demo.plain_source(tokenizer, 0, 96)
    assert evaluate(model, source).bits_per_byte == facts["source_bits_per_byte"]["adapter"]
    for written in facts["written"]:
        how = {"max_new_tokens": 60, "stop": (0,), "repetition_penalty": facts["repetition_penalty"]}
        assert complete(model, written["prompt"], tokenizer=tokenizer, **how) == written["after"]


def test_it_shows_functions_that_are_held_out(demonstrated):
    """Those that are named and there, then others."""
    _, facts, printed = demonstrated
    prompts = [written["prompt"] for written in facts["written"]]
    assert prompts == ["def find_word(word):\n", "def open_word(word):\n", "def read_word(word):\n"]
    for written in facts["written"]:
        assert Example(written["prompt"], written["library"]) in EXAMPLES[40:]
        assert written["before"] != written["after"]
        assert written["prompt"].strip() in printed
        assert demo.one_line(written["library"], 86) in printed


def test_a_loss_is_explained_as_a_probability(demonstrated):
    _, facts, printed = demonstrated
    loss = facts["held_out_loss"]
    assert f"loss {loss['before']:.4f} before, {loss['after']:.4f} after (nats a token)" in printed
    assert f"{math.exp(loss['before']) / math.exp(loss['after']):.2f} times as probable" in printed


def test_no_line_is_longer_than_a_wide_terminal(demonstrated):
    lines = [line for line in demonstrated[2].splitlines() if not line.startswith("Wrote ")]  # and where to
    assert max(map(len, lines)) <= 110
    assert demo.one_line("  a\n    b\n", 10) == "a ⏎ b"
    assert demo.one_line(99 * "x", 10) == 9 * "x" + "…"


def test_a_demo_stopped_and_resumed(base, demonstrated, tmp_path):
    with tiny.interrupted(demo, 7, checkpoint_every=3), pytest.raises(KeyboardInterrupt):
        run(demo.demo, tmp_path, steps=12, seed=1)
    facts, _ = run(demo.demo, tmp_path, steps=12, seed=1, resume=True)
    timeless = [{k: v for k, v in f.items() if "seconds" not in k} for f in (facts, demonstrated[1])]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("steps", [1, 2, 19])
def test_a_run_shorter_than_the_warm_up(steps):
    config = demo.training_config(steps, 0)
    assert config.warmup == steps // 2
    assert any(config.learning_rate(step) > 0 for step in range(steps))
    assert demo.training_config(600, 0).warmup == 20


def test_the_command_and_its_json(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--steps", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out, parse_constant=pytest.fail)
    assert err == ""
    assert facts["off_is_base"] is True
    assert (tmp_path / "refqlora-demo" / "adapter_model.safetensors").is_file()
    assert cli.main(["demo", "--steps", "2"]) == 0
    out, _ = capsys.readouterr()
    assert [f"{i}. " in out for i in range(1, 6)] == [True] * 4 + [False]
    assert "Wrote refqlora-demo/: adapter_model.safetensors" in out


# ---- the comparison ----


def test_the_comparison_has_every_method_and_rank(base, tmp_path):
    facts, printed = run(compare.compare, tmp_path / "out", steps=2, seed=3)
    rows = facts["methods"]
    ranks = [1, 2, 4, 8, 16, 64]
    assert [(row["method"], row["rank"]) for row in rows] == [
        ("full", None),
        *(("LoRA", rank) for rank in ranks),
        *(("QLoRA", rank) for rank in ranks),
    ]
    model = rq.Model.from_pretrained(base)
    shapes = model.config.shapes()
    per_rank = sum(sum(shapes[name + ".weight"]) for name in model.config.linears())
    weights = {"full": sum(p.nbytes for p in model.params.values())}
    weights["LoRA"] = weights["full"]
    quantized = rq.Model.from_pretrained(base, quantize="nf4")  # whose embedding stays in the file's 16 bits
    weights["QLoRA"] = sum(p.nbytes for p in quantized.params.values())
    before = {row["method"]: (row["new_before"], row["old_before"]) for row in rows}
    assert before["full"] == before["LoRA"] != before["QLoRA"]
    for row in rows:
        assert (row["new_before"], row["old_before"]) == before[row["method"]]
        assert row["new_after"] != row["new_before"]
        assert row["old_after"] != row["old_before"]
        if row["rank"] is None:
            assert row["trainable"] == weights["full"] // 4
            assert row["bytes"] == 4 * weights["full"]
        else:
            assert row["trainable"] == row["rank"] * per_rank
            assert row["bytes"] == weights[row["method"]] + 4 * 4 * row["trainable"]

    table = [line for line in printed.splitlines() if re.search(r"(full|LoRA|QLoRA) ", line)]
    for row in rows:
        cells = [
            row["method"],
            "" if row["rank"] is None else str(row["rank"]),
            "0.0002" if row["rank"] is None else "0.002",
            f"{row['trainable']:,}",
            f"{row['bytes']:,}",
        ]
        cells += [
            f"{row['seconds_per_step']:.3f}",
            f"{row['new_after']:.4f}",
            f"{row['new_after'] - row['new_before']:+.4f}",
        ]
        cells += [f"{row['old_after']:.4f}", f"{row['old_after'] - row['old_before']:+.4f}"]
        assert [cell.strip() for cell in re.split("[│┃]", table.pop(0))[1:-1]] == cells

    merging = facts["merging"]
    assert list(merging) == ["adapter", "original", "dequantised", "bfloat16", "nf4", "none"]
    trained = next(row for row in rows if (row["method"], row["rank"]) == ("QLoRA", 16))
    assert merging["adapter"]["loss"] == trained["new_after"]
    assert merging["dequantised"]["loss"] == pytest.approx(trained["new_after"], rel=1e-6)
    assert merging["none"]["loss"] == trained["new_before"]
    assert merging["dequantised"]["error"] == 0 < merging["bfloat16"]["error"] < merging["original"]["error"]
    assert "into 4 bits again" in printed

    losses = facts["modularity"]
    assert list(losses) == ["none", "docstrings", "language reference"]
    assert all(list(row) == ["docstrings", "language reference"] for row in losses.values())
    assert losses["none"]["docstrings"] == before["QLoRA"][0]
    assert len({loss for row in losses.values() for loss in row.values()}) == 6
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == facts


def test_of_several_adapters_the_active_one_is_merged(base):
    model, tokenizer, eos = demo.bundled(quantize="nf4")
    _, held_out = demo.docstring_task(tokenizer, eos)
    for seed, name in enumerate(("one", "other")):
        model.add_adapter(name, rank=2, seed=seed)
        for p in model.trainable().values():
            p += np.float32(0.05) * np.random.default_rng(seed).standard_normal(p.shape, np.float32)
    losses = compare.losses_of_each(model, {"docstrings": held_out})
    assert list(losses) == ["none", "one", "other"]
    assert model.active == "other"
    for name in ("one", "other"):
        model.set_adapter(name)
        merging = compare.merging_losses(model, held_out)
        assert model.active == name
        assert merging["adapter"]["loss"] == losses[name]["docstrings"] == evaluate(model, held_out).loss
        assert merging["dequantised"]["loss"] == pytest.approx(losses[name]["docstrings"], rel=1e-6)
        assert merging["none"]["loss"] == losses["none"]["docstrings"]


# ---- pretraining ----


@pytest.fixture
def small(base, monkeypatch):
    """Pretraining of the stand-in's size."""
    monkeypatch.setattr(pretrain, "BASE", tiny.config(vocab_size=320, max_positions=48, tied=True, bos_token_id=0))
    monkeypatch.setattr(pretrain, "CONTEXT", 48)
    monkeypatch.setattr(pretrain, "SAMPLING", {**pretrain.SAMPLING, "max_new_tokens": 8})


def test_pretraining_makes_a_base(small, tmp_path):
    facts = pretrain.pretrain(tmp_path / "a", steps=20, batch_size=4, seed=2)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png", "metrics.jsonl",
    }  # fmt: skip
    model, tokenizer = rq.Model.from_pretrained(tmp_path / "a"), load_tokenizer(tmp_path / "a")
    assert {x.dtype for x in load_file(tmp_path / "a" / "model.safetensors").values()} == {np.dtype(ml_dtypes.bfloat16)}
    result = evaluate(model, pack(corpus.modules(True), tokenizer, 48, 0))
    assert (result.loss, result.bits_per_byte) == (facts["held_out_loss"], facts["held_out_bits_per_byte"])
    assert result.loss < 5.5 < math.log(320)
    assert [step for step, _ in facts["curve"]] == list(range(1, 21))
    assert facts["parameters"] == sum(p.size for p in model.params.values())
    assert facts["tokens_seen"] == 20 * 4 * 48
    assert facts["command"] == "refqlora pretrain --steps 20 --batch-size 4 --lr 0.002 --seed 2"
    card = (tmp_path / "a" / "README.md").read_text()
    for figure in (f"{facts['parameters']:,}", f"{facts['held_out_loss']:.4f}", facts["command"], "| 20 | "):
        assert figure in card
    settings = pretrain.SAMPLING
    assert f"temperature {settings['temperature']}, top-p {settings['top_p']}" in card


def test_pretraining_stopped_and_resumed(small, tmp_path):
    options = {"steps": 20, "batch_size": 2}
    with tiny.interrupted(pretrain, 13, checkpoint_every=5), pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "a", **options)
    pretrain.pretrain(tmp_path / "a", **options, resume=True)
    pretrain.pretrain(tmp_path / "b", **options)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
