"""Fine-tuning on one's own text: what is read, what is written, and that the figures are those of the files."""

import io
import json
import re

import numpy as np
import pytest
import tiny
from rich.console import Console
from safetensors.numpy import load_file

import refqlora as rq
from refqlora import adapters
from refqlora.commands import finetune as module
from refqlora.commands.finetune import finetune
from refqlora.files.reading import read_json
from refqlora.text.chat import load_chat_template
from refqlora.text.data_files import read_dataset
from refqlora.text.tokenizer import load_tokenizer
from refqlora.training import evaluate

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
    out, facts, printed = run
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert go(pairs, out, base, resume=True) == (facts, printed)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_stopped_and_resumed(run, pairs, base, tmp_path):
    with tiny.interrupted(module, 3, checkpoint_every=2), pytest.raises(KeyboardInterrupt):
        go(pairs, tmp_path, base)
    facts, printed = go(pairs, tmp_path, base, resume=True)
    assert (facts, printed.replace(str(tmp_path), str(run[0]))) == run[1:]
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


def test_what_is_cut_is_told(pairs, base, tmp_path):
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
    read = module.read_dataset

    def spy(*args):
        seen.extend(read(*args))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_dataset", spy)
        go(pairs, tmp_path / "out", tmp_path)
    assert {int(labels[-1]) for part in seen for labels in part.labels} == {7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max length must be 1 to 64, the model's context, not 65"),
        ({"adapter": {"rank": 0}}, "rank: expected a whole number"),
        ({"adapter": {"targets": ("w_q",)}}, "targets: expected one of .*, got 'w_q'"),
        ({"training": {**TRAINING, "lr": np.nan}}, "lr: expected a finite number"),
        ({"training": {**TRAINING, "warmup": 5}}, "warmup_steps: .* found 5"),
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
