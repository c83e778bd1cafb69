"""Fine-tuning on one's own text: what is read and written, and that the results match the files."""

import io
import json
import re
import shlex

import numpy as np
import pytest
import tiny
from rich.console import Console
from safetensors.numpy import load_file

import refqlora as rq
from refqlora import adapters
from refqlora.commands import finetune as module
from refqlora.commands import main
from refqlora.commands.finetune import finetune
from refqlora.commands.sample import show_sample
from refqlora.files.reading import read_json
from refqlora.resume import read_identity
from refqlora.text.chat import load_chat_template
from refqlora.text.data_files import datasets, read_dataset
from refqlora.text.examples import Example
from refqlora.text.tokenizer import load_tokenizer
from refqlora.training import Evaluation, evaluate

ADAPTER = {"rank": 3, "alpha": 6.0}
TRAINING = {"steps": 4, "batch_size": 3, "lr": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.EXAMPLES)


def write_pairs(path, examples):
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples), encoding="utf-8")
    return path


def go(data, out, base, **options):
    """`finetune`; -> its figures and what it printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    options = {"adapter": ADAPTER, "training": TRAINING, "held_out": 0.25, **options}
    return finetune(data, out, console, base=base, **options), printed.getvalue()


def settled(facts, printed, out):
    """What a run says, but for the directory and for how much memory was free."""
    printed = re.sub(r"; \S+ \S+ are free", "", printed)
    return json.loads(json.dumps(facts).replace(str(out), "OUT")), printed.replace(str(out), "OUT")


def sets(data, base, max_length=64):
    tokenizer = load_tokenizer(base)
    return read_dataset(data, tokenizer, load_chat_template(base, tokenizer, 0), 0, max_length, 0.25, 0)


@pytest.fixture(scope="module")
def run(pairs, base, tmp_path_factory):
    """The directory, figures and words of one run, to be read only."""
    out = tmp_path_factory.mktemp("run") / "not" / "yet"
    return out, *go(pairs, out, base)


KINDS = [{}, {"dora": True}, {"init": "pissa", "dora": True}, {"init": "olora", "rank_pattern": {"q_proj": 2}}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("quantize", [True, False])
def test_the_figures_are_those_of_the_files(quantize, kind, pairs, base, tmp_path):
    """What stands in the directory, loaded anew, gives the losses that were reported, to the bit. PiSSA and OLoRA take
    the dense weights apart, and are quantised after that."""
    facts, printed = go(pairs, tmp_path, base, quantize=quantize, adapter={**ADAPTER, **kind})
    train_set, held_out = sets(pairs, base)
    late = "init" in kind
    model = rq.Model.from_pretrained(base, quantize="nf4" if quantize and not late else None)
    if late:
        model.load_adapter(tmp_path)
        model.set_adapter(None)
    if quantize:
        model.quantize()
    before = evaluate(model, held_out, TRAINING["batch_size"])
    model.set_adapter("default") if late else model.load_adapter(tmp_path)
    after = evaluate(model, held_out, TRAINING["batch_size"])
    assert facts["held_out_loss"] == {"before": before.loss, "after": after.loss}
    assert facts["held_out_bits_per_byte"] == {"before": before.bits_per_byte, "after": after.bits_per_byte}
    assert after.loss < before.loss
    assert facts["trainable_parameters"] == sum(p.size for p in model.trainable().values())
    assert facts["training_tokens"] == train_set.counted_tokens
    assert facts["steps"] == 4
    assert (len(train_set), len(held_out)) == (9, 3)
    assert (
        f"9 sequences ({train_set.counted_tokens} tokens count), 3 held out; {facts['trainable_parameters']:,}"
        in printed
    )
    assert f"held-out loss {before.loss:.4f} before, {after.loss:.4f} after" in printed


def test_what_is_written(run, base):
    out, _, printed = run
    files = {"adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "loss.png", "metrics.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    for name in files - {"checkpoint.safetensors"}:
        assert name in printed
    config = read_json(out / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, str(base))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_bundled_base_has_a_name(pairs, base, tmp_path, monkeypatch):
    """An adapter of the bundled base does not record where this machine keeps it."""
    monkeypatch.setattr(module, "BUNDLED", base)
    go(pairs, tmp_path, base)
    assert read_json(tmp_path / "adapter_config.json")["base_model_name_or_path"] == "refqlora"


def test_a_finished_run_resumed_changes_nothing(run, pairs, base):
    out, *said = run
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert settled(*go(pairs, out, base, resume=True), out) == settled(*said, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_stopped_and_resumed(run, pairs, base, tmp_path):
    with tiny.interrupted(module, 3, checkpoint_every=2), pytest.raises(KeyboardInterrupt):
        go(pairs, tmp_path, base)
    said = go(pairs, tmp_path, base, resume=True)
    assert settled(*said, tmp_path) == settled(*run[1:], run[0])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_every_kind_resumes_to_the_bit(kind, pairs, base, tmp_path):
    adapter = {**ADAPTER, "dropout": 0.1, **kind}
    go(pairs, tmp_path / "whole", base, adapter=adapter)
    with tiny.interrupted(module, 3, checkpoint_every=2), pytest.raises(KeyboardInterrupt):
        go(pairs, tmp_path / "cut", base, adapter=adapter)
    go(pairs, tmp_path / "cut", base, adapter=adapter, resume=True)
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert {name: x.tobytes() for name, x in whole.items()} == {name: x.tobytes() for name, x in cut.items()}


def test_another_residual_is_another_run(pairs, base, tmp_path, monkeypatch):
    """What PiSSA sits on is part of the frozen weights: where it comes out otherwise, nothing is resumed."""
    adapter = {**ADAPTER, "init": "pissa"}
    with tiny.interrupted(module, 3, checkpoint_every=2), pytest.raises(KeyboardInterrupt):
        go(pairs, tmp_path, base, adapter=adapter)
    right = adapters.residual
    monkeypatch.setattr(adapters, "residual", lambda w, *ab: right(w, *ab) * np.float32(1.001))
    with pytest.raises(ValueError, match="is of another run: the weights' checksum"):
        go(pairs, tmp_path, base, adapter=adapter, resume=True)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2.5, 8), (0.01, 1)])
def test_epochs_are_passes_over_the_data(epochs, steps, pairs, base, tmp_path):
    """9 sequences in batches of 3."""
    facts, _ = go(pairs, tmp_path, base, epochs=epochs)
    assert facts["steps"] == steps == len((tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed, run, pairs, base, tmp_path):
    go(pairs, tmp_path, base, training={**TRAINING, "seed": seed})
    same = (tmp_path / "adapter_model.safetensors").read_bytes() == (run[0] / "adapter_model.safetensors").read_bytes()
    assert same == (seed == 0)


def test_the_seed_decides_where_it_begins(pairs, base, tmp_path):
    """At a learning rate of 0 it ends there."""
    for seed in (0, 1):
        go(pairs, tmp_path / str(seed), base, training={**TRAINING, "lr": 0.0, "seed": seed})
    found = [load_file(tmp_path / str(seed) / "adapter_model.safetensors") for seed in (0, 1)]
    for name in found[0]:
        assert np.array_equal(found[0][name], found[1][name]) == name.endswith("lora_B.weight")


def test_text_is_cut_into_blocks_and_examples_are_not(base, tmp_path, pairs):
    path = tmp_path / "mill.txt"
    path.write_text(tiny.TEXT, encoding="utf-8")
    for part in sets(path, base, 16):
        assert {len(tokens) for tokens in part.tokens} == {16}
        assert part.counted_tokens == 16 * len(part)
    for part in sets(pairs, base):
        assert len({len(tokens) for tokens in part.tokens}) > 1
        assert part.counted_tokens < sum(len(tokens) for tokens in part.tokens)


def test_what_is_held_out_is_not_trained_on(base, pairs):
    train_set, held_out = ({tuple(tokens) for tokens in part.tokens} for part in sets(pairs, base))
    assert not train_set & held_out
    assert len(train_set | held_out) == len(tiny.EXAMPLES)


def test_cut_examples_are_reported(pairs, base, tmp_path):
    _, printed = go(pairs, tmp_path, base, max_length=40)
    long = sum(len(tokens) > 40 for tokens in tiny.examples().tokens)
    assert long > 0
    assert f"{long} examples are longer than 40 tokens and were cut" in printed


def test_memory_is_that_of_a_micro_batch(pairs, base, tmp_path, monkeypatch):
    sizes = []
    forward = rq.Model.forward
    monkeypatch.setattr(
        rq.Model, "forward", lambda self, tokens, **kw: sizes.append(len(tokens)) or forward(self, tokens, **kw)
    )
    go(pairs, tmp_path, base, training={**TRAINING, "micro_batch_size": 2, "eval_every": 2})
    assert max(sizes) == 2


def test_a_model_may_end_texts_in_several_ways(pairs, base, tmp_path):
    """The first of them ends those that it is trained on."""
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 0]}))
    seen = []

    def spy(*args):
        seen.extend(datasets(*args))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "datasets", spy)
        go(pairs, tmp_path / "out", tmp_path)
    assert {int(labels[-1]) for part in seen for labels in part.labels} == {7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max length: expected 2 to 64, the model's context, got 65"),
        ({"max_length": 1}, "max length: expected 2 to 64, the model's context, got 1"),
        ({"epochs": 1e308}, r"epochs: expected .* got 1e\+308"),
        ({"epochs": -1.0}, "epochs: expected a number above 0"),
        ({"epochs": np.nan}, "epochs: expected a number above 0"),
        ({"adapter": {"rank": 0}}, "rank: expected a whole number"),
        ({"adapter": {"targets": ("w_q",)}}, "targets: expected one of .*, got 'w_q'"),
        ({"training": {**TRAINING, "lr": np.nan}}, "lr: expected a number from 0"),
        ({"training": {**TRAINING, "warmup": 5}}, "warmup_steps: .* got 5"),
        ({"held_out": 1.0}, "held-out fraction: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_nothing_is_begun_with_what_cannot_be_used(options, message, pairs, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(pairs, tmp_path / "out", base, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_only_a_name(base, tmp_path):
    """Neither rich's markup nor matplotlib's formulas are read in the names of files."""
    data = write_pairs(tmp_path / "[b]a$^$b.jsonl", tiny.EXAMPLES)
    out = tmp_path / "[red]o[/blue]"
    _, printed = go(data, out, base)
    assert f"wrote {out}/: " in re.sub(r"\s*\n\s*", "", printed)
    assert (out / "loss.png").stat().st_size > 1000


# ---- where it writes ----


def test_a_finished_run_is_not_written_over(run, pairs, base):
    out = run[0]
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=f"{out}/checkpoint.safetensors: an adapter has been trained here: .*--resume"):
        go(pairs, out, base)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_of_others_is_not_written_over(name, pairs, base, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"{name}: an adapter has been trained here"):
        go(pairs, tmp_path, base)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_nothing_to_resume(pairs, base, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"out/checkpoint\.safetensors: no such file: there is no run to resume"
    ):
        go(pairs, tmp_path / "out", base, resume=True)
    assert list(tmp_path.iterdir()) == []


# ---- what is held out ----


def test_all_is_trained_on_where_nothing_is_held_out(base, tmp_path):
    """Also a single example."""
    data = write_pairs(tmp_path / "one.jsonl", tiny.EXAMPLES[:1])
    facts, printed = go(data, tmp_path / "out", base, held_out=0.0, training={**TRAINING, "eval_every": 1})
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert facts["held_out_loss"] is facts["held_out_bits_per_byte"] is None
    assert facts["training_loss"] == {"first": rows[0]["loss"], "last": rows[-1]["loss"]}
    assert all("held_out_loss" not in row for row in rows)
    assert "1 sequences" in printed
    assert f"training loss {rows[0]['loss']:.4f} in the first step, {rows[-1]['loss']:.4f} in the last" in printed
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000


def test_a_worse_adapter_gives_a_warning(pairs, base, tmp_path, monkeypatch):
    found = iter([Evaluation(2.0, 9, 3.0), Evaluation(2.5, 9, 3.5)])
    monkeypatch.setattr(module, "evaluate", lambda *args: next(found))
    with pytest.warns(
        UserWarning, match=r"the held-out loss rose from 2\.0000 to 2\.5000: this adapter is worse than none"
    ):
        go(pairs, tmp_path / "out", base)


# ---- memory ----


@pytest.fixture
def room(monkeypatch):
    def set_room(nbytes):
        monkeypatch.setattr(module, "available_bytes", lambda: nbytes)

    return set_room


def micro_batch(out):
    return read_identity(out / "checkpoint.safetensors")["micro_batch_size"]


def test_a_step_is_made_to_fit(pairs, base, tmp_path, room):
    sizes = {}
    for name, free in (("all", 10**9), ("some", 700_000), ("none", None)):
        room(free)
        _, printed = go(pairs, tmp_path / name, base)
        sizes[name] = micro_batch(tmp_path / name)
        assert re.search(
            r"memory: \S+ kB for the model, \S+ [kM]B more for a step of 3 sequences of up to \d+ tokens", printed
        )
        assert ("are free" in printed) == (free is not None)
    assert sizes == {"all": None, "some": 1, "none": None}


def test_layers_are_recomputed_where_nothing_else_fits(pairs, base, tmp_path, room):
    room(550_000)
    _, printed = go(pairs, tmp_path / "a", base, training={**TRAINING, "micro_batch_size": 1})
    assert ", 1 at a time, each layer recomputed in the backward; 550 kB are free" in printed
    room(10**9)
    go(pairs, tmp_path / "b", base, training={**TRAINING, "micro_batch_size": 1})
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_resumed_run_keeps_its_micro_batches(pairs, base, tmp_path, room):
    """Whatever is free by then: the last bits depend on them."""
    room(700_000)
    go(pairs, tmp_path / "whole", base)
    with tiny.interrupted(module, 3, checkpoint_every=2), pytest.raises(KeyboardInterrupt):
        go(pairs, tmp_path / "cut", base)
    room(10**9)
    go(pairs, tmp_path / "cut", base, resume=True)
    assert micro_batch(tmp_path / "cut") == 1
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_a_step_that_cannot_fit_is_refused_at_once(pairs, base, tmp_path, room):
    room(100_000)
    with pytest.raises(
        MemoryError, match=r"a step of 3 sequences .* 1 at a time, .* needs \d+ kB; 100 kB are free, of which 80 % can"
    ):
        go(pairs, tmp_path / "out", base)
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_has_512_tokens_at_most(tmp_path):
    """Unless --max-length asks for more: a model's context may be far more than memory holds."""
    base = tiny.save(tmp_path / "base", max_positions=700)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 8, encoding="utf-8")
    for asked, length in ((None, 512), (600, 600)):
        training = {"steps": 1, "batch_size": 1}
        _, printed = go(tmp_path / "text.txt", tmp_path / str(length), base, max_length=asked, training=training)
        assert f"a step of 1 sequences of up to {length} tokens" in printed


# ---- the sample ----


@pytest.mark.parametrize("kind", ["pairs", "chat", "text"])
def test_a_sample_and_the_command_that_writes_more(kind, base, tmp_path, capsys):
    """The command that is printed writes what the sample shows: without the adapter, and with it."""
    data = tmp_path / ("data.txt" if kind == "text" else "data.jsonl")
    if kind == "pairs":
        write_pairs(data, tiny.EXAMPLES)
    elif kind == "text":
        data.write_text(tiny.TEXT, encoding="utf-8")
    else:
        messages = [
            [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": f"{n}."}] for n in range(9)
        ]
        data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    out = tmp_path / "it's"
    facts, printed = go(data, out, base, max_length=32)
    sample, words = facts["sample"], shlex.split(facts["generate"])
    assert sample.keys() == {"prompt", "base", "adapter"}
    assert sample["base"] != sample["adapter"]
    assert printed.endswith(f"\n{facts['generate']}\n")
    assert words[:4] == ["refqlora", "generate", "--adapter", str(out)]
    if kind == "chat":
        assert words[4:] == ["--model", str(base), "--chat"]
        assert sample["prompt"].startswith("user: How many?")
        return
    assert words[4:] == ["--model", str(base), "--prompt", sample["prompt"].replace("\n", "\\n")]
    assert main([*words[1:], "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == sample["prompt"] + sample["adapter"] + "\n"


def test_a_long_prompt_leaves_room_for_the_sample(base, tmp_path):
    data = write_pairs(tmp_path / "long.jsonl", [Example("sack " * 200, "!\n")] * 4)
    facts, _ = go(data, tmp_path / "out", base)
    tokens = tiny.tokenizer().encode("sack " * 200).ids
    assert facts["sample"]["prompt"] == tiny.tokenizer().decode(tokens[-24:])  # of the model's 64, 40 are to be written


def test_control_characters_are_not_printed():
    printed = io.StringIO()
    show_sample({"prompt": "a\x1b[31m\nb\r"}, "refqlora generate", Console(file=printed, width=200))
    assert "  prompt   a�[31m⏎ b\n" in printed.getvalue()
