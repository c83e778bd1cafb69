"""The command line: its help is complete, its options take effect, and errors are one line."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import tiny

import refqlora as rq
from refqlora import commands as cli
from refqlora.commands import finetune
from refqlora.files.hub import BUNDLED

ROOT = Path(__file__).parent.parent.parent


def commands():
    """Each command's own parser."""
    return {name: subparsers(name)[name] for name in cli.COMMANDS}


def subparsers(command):
    """The parsers of all commands, of which `command` has its options."""
    (choices,) = (action.choices for action in cli.parser(command)._actions if action.dest == "command")
    return choices


def call(*argv):
    """The exit code of `refqlora argv`."""
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0


# ---- help ----


def test_help_names_every_command(capsys):
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +\w", out, re.M) for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_tells_every_option_and_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert call(command, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    for action in commands()[command]._actions:
        assert action.help, action.dest
        assert (action.option_strings or [action.metavar])[-1] in out
        about = out[out.index(action.help.split("%")[0][:40].strip()) :][:200]
        if action.default not in (None, False, "==SUPPRESS==") and action.default != BUNDLED:
            assert f"(default: {action.default})" in about
    assert str(ROOT) not in out  # where it is installed is nobody's default
    assert ("--model" in out) == ("(default: the bundled base)" in out)


def test_alone_it_prints_the_help(capsys):
    assert call("--help") == 0
    help_text = capsys.readouterr().out
    assert call() == 0
    assert capsys.readouterr().out == help_text


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(*command.split(), "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_version_is_the_package_s(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"refqlora {rq.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == rq.__version__


def test_the_entry_point_is_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"refqlora": "refqlora.commands:main"}


# ---- options arrive ----


@pytest.fixture
def recorded(monkeypatch):
    """The call that a command makes, which is not carried out."""
    calls, facts = [], {"held_out_loss": 1.0, "held_out_bits_per_byte": 1.0}
    for name in ("demo", "compare", "finetune", "pretrain"):
        module = import_module(f"refqlora.commands.{name}")
        monkeypatch.setattr(module, name, lambda *a, name=name, **kw: calls.append((name, a, kw)) or facts)
    return calls


def test_every_option_of_finetune_arrives(recorded):
    argv = "finetune --data d.txt --model m --out o --no-quantize --rank 3 --alpha 5 --dropout 0.5 "
    argv += (
        "--exclude .*k_.* --layers 0 2 --dora --init olora --rank-pattern q_proj=4 a=b=5 --alpha-pattern v_proj=1.5 "
    )
    argv += "--targets q_proj,v_proj --rslora --steps 7 --batch-size 8 --micro-batch-size 2 --lr 0.25 "
    argv += "--schedule linear --warmup 1 --weight-decay 0.125 --max-grad-norm 9 --max-length 11 "
    argv += "--held-out 0.75 --eval-every 12 --checkpoint-every 13 --recompute --seed 14 --resume --json"
    given = set(re.findall(r"--[a-z-]+", argv))
    assert given == {action.option_strings[-1] for action in commands()["finetune"]._actions} - {"--help", "--epochs"}
    assert call(*argv.split()) == 0
    ((name, (data, out, console), options),) = recorded
    assert (name, data, out, console.quiet) == ("finetune", Path("d.txt"), Path("o"), True)
    training = {"steps": 7, "batch_size": 8, "micro_batch_size": 2, "lr": 0.25, "schedule": "linear", "warmup": 1}
    training |= {"weight_decay": 0.125, "max_grad_norm": 9.0, "eval_every": 12, "checkpoint_every": 13}
    assert options == {
        "base": "m",
        "quantize": False,
        "adapter": {
            "rank": 3,
            "alpha": 5.0,
            "dropout": 0.5,
            "targets": ("q_proj", "v_proj"),
            "rslora": True,
            "dora": True,
            "init": "olora",
            "exclude": r".*k_.*",
            "layers": (0, 2),
            "rank_pattern": {"q_proj": 4, "a=b": 5},
            "alpha_pattern": {"v_proj": 1.5},
        },
        "training": {**training, "recompute": True, "seed": 14},
        "epochs": None,
        "max_length": 11,
        "held_out": 0.75,
        "resume": True,
    }


def test_the_defaults_of_finetune(recorded):
    assert call("finetune", "--data", "d.txt") == 0
    assert call("finetune", "--data", "d.txt", "--epochs", "0.5") == 0
    options = recorded[0][2]
    assert options["base"] == BUNDLED
    assert options["quantize"] is True
    assert options["resume"] is False
    assert (options["epochs"], recorded[1][2]["epochs"]) == (3.0, 0.5)
    assert options["adapter"]["targets"] == "all-linear"
    rq.TrainingConfig(**options["training"])
    rq.LoraConfig(**options["adapter"])


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        ("demo", "demo", {"steps": 300, "seed": 0, "resume": False}),
        ("demo --steps 5 --seed 6 --resume", "demo", {"steps": 5, "seed": 6, "resume": True}),
        ("compare", "compare", {"steps": 300, "seed": 0}),
        ("compare --steps 5 --seed 6", "compare", {"steps": 5, "seed": 6}),
        (
            "pretrain",
            "pretrain",
            {"steps": 6000, "batch_size": 8, "lr": 2e-3, "seed": 0, "resume": False, "quiet": False},
        ),
        (
            "pretrain --steps 2 --batch-size 3 --lr 0.5 --seed 4 --resume",
            "pretrain",
            {"steps": 2, "batch_size": 3, "lr": 0.5, "seed": 4, "resume": True, "quiet": False},
        ),
    ],
)
def test_what_the_other_commands_pass_on(argv, name, expected, recorded):
    assert call(*argv.split(), "--out", "o") == 0
    ((called, arguments, options),) = recorded
    assert (called, arguments[0], options) == (name, Path("o"), expected)


# ---- a place to work in ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two models, each broken in every way; texts and examples, good and bad."""
    place = tmp_path_factory.mktemp("place")
    tiny.save(place / "model")
    other = rq.Model.from_pretrained(tiny.save(place / "other", hidden_size=48))
    other.add_adapter(rank=2)
    other.save_adapter(place / "other-adapter")

    def texts(**files):
        for name, content in files.items():
            path = place / name.replace("_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in tiny.EXAMPLES]
    chats = [
        json.dumps(
            {"messages": [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.completion}]}
        )
        for e in tiny.EXAMPLES
    ]
    texts(text_txt=tiny.TEXT, empty_txt="", blank_txt=" \n\n", short_txt="sacks", latin_txt="Zoë".encode("latin-1"))
    texts(pairs_jsonl="\n".join(lines), chats_jsonl="\n".join(chats), none_jsonl="\n", one_jsonl=lines[0])
    texts(broken_jsonl="\n".join([*lines[:3], '{"prompt": "two'.strip(), *lines[3:]]))
    texts(keys_jsonl='\n\n{"prompt": "a", "answer": "b"}\n', mute_jsonl='{"prompt": "a", "completion": ""}')
    (place / "texts" / "more").mkdir(parents=True)
    paragraphs = tiny.TEXT.split("\n\n")
    for i, text in enumerate(paragraphs):
        (place / "texts" / ("more" if i else "") / f"{i}.txt").write_text(text, encoding="utf-8")
    (place / "nothing").mkdir()

    for name, change in {
        "no-end": {"eos_token_id": None},
        "empty-end": {"eos_token_id": []},
        "far-end": {"eos_token_id": 300},
        "word-end": {"eos_token_id": "the end"},
        "mamba": {"model_type": "mamba"},
        "headless": {"num_attention_heads": 0},
        "wider": {"hidden_size": 48},
    }.items():
        shutil.copytree(place / "model", place / name)
        path = place / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for name, file, content in [
        ("broken-config", "config.json", b'{"model_type":'),
        ("listed-config", "config.json", b"[]"),
        ("no-config", "config.json", None),
        ("no-weights", "model.safetensors", None),
        ("cut-weights", "model.safetensors", (place / "model" / "model.safetensors").read_bytes()[:9999]),
        ("huge-header", "model.safetensors", struct.pack("<Q", 2**40) + b"{}"),
        ("no-tokenizer", "tokenizer.json", None),
        ("broken-tokenizer", "tokenizer.json", b"{}"),
    ]:
        shutil.copytree(place / "model", place / name)
        (place / name / file).unlink()
        if content is not None:
            (place / name / file).write_bytes(content)
    return place


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """`prepared`, as the working directory's neighbours; the working directory is empty."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(place):
    """Every file below, and what is in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(place.glob("**/*"))}


# ---- what is wrong is said in one line ----

FINETUNE = "finetune --model model --max-length 16 --steps 2 --out out --data text.txt "
GENERATE = "generate --model model --prompt sacks "
BAD = [
    ("--nonsense", "required: COMMAND"),
    ("nonsense", "invalid choice: 'nonsense'"),
    ("finetune --model model", "required: --data"),
    (FINETUNE + "--nonsense", "unrecognized arguments: --nonsense"),
    (FINETUNE + "--data missing.txt", "missing.txt: no such file or directory"),
    (FINETUNE + "--data missing.jsonl", "missing.jsonl: no such file or directory"),
    (FINETUNE + "--data empty.txt", "empty.txt: the file is empty"),
    (FINETUNE + "--data blank.txt", "blank.txt: the file is empty"),
    (FINETUNE + "--data short.txt", "short.txt: expected 17 tokens for a block of 16, got 5"),
    (FINETUNE + "--data latin.txt", "latin.txt: not UTF-8 text: byte offset 2"),
    (FINETUNE + "--data nothing", "nothing: expected a file, or a directory with files"),
    (FINETUNE + "--data none.jsonl", "none.jsonl: expected an example on each line, or an array of them, got none"),
    (FINETUNE + "--data broken.jsonl", "broken.jsonl:4: expected a JSON object"),
    (FINETUNE + "--data keys.jsonl", "keys.jsonl:3: expected the keys .*, got prompt, answer"),
    (FINETUNE + "--data mute.jsonl", "mute.jsonl:1: expected a completion, got an empty one"),
    (FINETUNE + "--data one.jsonl", "takes 1 of 1 examples or blocks of text: nothing is left to train on"),
    (FINETUNE + "--model missing", "missing: no such directory"),
    (FINETUNE + "--model text.txt", "text.txt: expected a directory with config.json"),
    (FINETUNE + "--model nothing", "nothing/config.json: no such file"),
    (FINETUNE + "--model broken-config", "broken-config/config.json: not valid JSON"),
    (FINETUNE + "--model listed-config", "listed-config/config.json: expected a JSON object, got list"),
    (FINETUNE + "--model no-config", "no-config/config.json: no such file"),
    (FINETUNE + "--model mamba", "mamba/config.json: model_type: .mamba. is not supported"),
    (FINETUNE + "--model headless", "headless/config.json: "),
    (FINETUNE + "--model wider", r"wider: model\.\S+ has shape \(.*\), expected \("),
    (FINETUNE + "--model no-weights", "no-weights/model.safetensors: no such file"),
    (FINETUNE + "--model cut-weights", "cut-weights/model.safetensors: not a valid safetensors file"),
    (FINETUNE + "--model huge-header", "huge-header/model.safetensors: not a valid safetensors file"),
    (FINETUNE + "--model no-tokenizer", "no-tokenizer/tokenizer.json"),
    (FINETUNE + "--model broken-tokenizer", "broken-tokenizer/tokenizer.json: the tokenizers library cannot read it"),
    (FINETUNE + "--model no-end", "no-end: eos_token_id: expected a token that ends texts, got None"),
    (
        FINETUNE + "--model empty-end",
        r"empty-end/config.json: eos_token_id: expected a token .*, got \[\]",
    ),
    (FINETUNE + "--model far-end", "far-end: eos_token_id: expected a token that ends texts, got 300"),
    (
        FINETUNE + "--model word-end",
        "word-end/config.json: eos_token_id: expected a token or a list of tokens, got 'the end'",
    ),
    (FINETUNE + "--targets attention", "targets: expected one of down_proj, gate_proj, .*, got 'attention'"),
    (FINETUNE + "--targets q_proj,lm_head", "targets: expected one of down_proj, .*, got 'lm_head'"),
    (FINETUNE + "--exclude o_prj", "exclude: expected one of down_proj, .*, got 'o_prj'"),
    (FINETUNE + "--layers 7", r"layers: expected numbers among \[0, 1\], got 7"),
    (FINETUNE + "--layers 0 --targets .*_proj", "layers: expected none with a regular expression as targets"),
    (FINETUNE + "--init svd", "--init: invalid choice: 'svd'"),
    (FINETUNE + "--init pissa --rank 41", "q_proj: rank: expected at most 40 for pissa on shape"),
    (FINETUNE + "--rank-pattern q_proj", "--rank-pattern: expected NAME=VALUE, got q_proj"),
    (FINETUNE + "--rank-pattern q_proj=0", "--rank-pattern: expected a whole number of 1 or more, got '0'"),
    (
        FINETUNE + "--alpha-pattern lm_head=2",
        "alpha_pattern: expected names of linears .*, got 'lm_head'",
    ),
    (FINETUNE + "--rank 0", "--rank: expected a whole number of 1 or more, got '0'"),
    (FINETUNE + "--rank two", "--rank: expected a whole number of 1 or more, got 'two'"),
    (FINETUNE + "--rank 1000000000000", "rank: expected a whole number from 1 to 2147483647, got 1000000000000"),
    (FINETUNE + "--rank 2147483647", "Unable to allocate .*: a smaller --max-length, .* or --rank, .* needs less"),
    (
        FINETUNE + "--batch-size 2000000000",
        r"a step of 2000000000 sequences .* needs \S+ [GT]B; .* are free, of which 80 % can be planned for: a smaller",
    ),
    (FINETUNE + "--alpha nan", r"alpha: expected a number from 0 to 1e\+09, got nan"),
    (FINETUNE + "--alpha 0", "q_proj: alpha: expected a number above 0, got 0"),
    (FINETUNE + "--dropout 1", "dropout: expected a number from 0 to below 1, got 1.0"),
    (FINETUNE + "--dropout -0.5", "dropout: expected a number from 0 to below 1, got -0.5"),
    (FINETUNE + "--steps 0", "--steps: expected a whole number of 1 or more, got '0'"),
    (FINETUNE + "--steps -3", "--steps: expected a whole number of 1 or more, got '-3'"),
    (FINETUNE + "--epochs 1", "--steps and --epochs exclude each other"),
    ("finetune --data text.txt --model model --epochs 0", "--epochs: expected a number above 0, got 0.0"),
    ("finetune --data text.txt --model model --epochs 1e308", r"epochs: expected .* at most .* steps, got 1e\+308"),
    ("finetune --data text.txt --model model --epochs inf", "--epochs: expected a number above 0, got inf"),
    ("finetune --data text.txt --model model --epochs nan", "--epochs: expected a number above 0, got nan"),
    (FINETUNE + "--max-length 65", "max length: expected 2 to 64, the model's context, got 65"),
    (FINETUNE + "--max-length 1", "max length: expected 2 to 64, the model's context, got 1"),
    (FINETUNE + "--max-length 0", "--max-length: expected a whole number of 1 or more, got '0'"),
    (FINETUNE + "--held-out 1.5", "held-out fraction: expected at least 0 and less than 1, got 1.5"),
    (FINETUNE + "--held-out nan", "held-out fraction: expected at least 0 and less than 1, got nan"),
    (FINETUNE + "--held-out 0.99", "nothing is left to train on"),
    (FINETUNE + "--lr nan", "lr: expected a number from 0 to 1e.300, got nan"),
    (FINETUNE + "--lr -1", "lr: expected a number from 0 to 1e.300, got -1.0"),
    (FINETUNE + "--lr fast", "--lr: invalid float value: 'fast'"),
    (FINETUNE + "--schedule sine", "--schedule: invalid choice: 'sine'"),
    (FINETUNE + "--warmup 3", r"warmup_steps: expected 0 to total_steps \(2\), got 3"),
    (FINETUNE + "--warmup -1", "--warmup: expected a whole number of 0 or more, got '-1'"),
    (FINETUNE + "--weight-decay -1", "weight_decay: expected a number from 0 to 1e.300, got -1.0"),
    (FINETUNE + "--max-grad-norm nan", "max_grad_norm: expected a number from 0 to inf, got nan"),
    (FINETUNE + "--batch-size 0", "--batch-size: expected a whole number of 1 or more, got '0'"),
    (FINETUNE + "--micro-batch-size 0", "--micro-batch-size: expected a whole number of 1 or more, got '0'"),
    (FINETUNE + "--eval-every -1", "--eval-every: expected a whole number of 0 or more, got '-1'"),
    (FINETUNE + "--seed -1", "--seed: expected a whole number of 0 or more, got '-1'"),
    (FINETUNE + "--out text.txt", "text.txt: File exists"),
    (FINETUNE + "--out text.txt/out", "text.txt/out: Not a directory"),
    ("generate --model model", "one of the arguments --prompt --chat is required"),
    ("generate --model missing --prompt sacks", "missing: no such directory"),
    ("generate --model no-tokenizer --prompt sacks", "no-tokenizer/tokenizer.json"),
    (GENERATE + "--adapter missing", "missing/adapter_config.json: no such file"),
    (GENERATE + "--adapter model", "model/adapter_config.json: no such file"),
    (GENERATE + "--adapter other-adapter", r"other-adapter: .*lora_A\.weight has shape \(2, 48\), expected \(2, 40\)"),
    (GENERATE + "--temperature -1", "temperature: expected a number of 0 or more, got -1.0"),
    (GENERATE + "--temperature nan", "temperature: expected a number of 0 or more, got nan"),
    (GENERATE + "--top-p 0", "top_p: expected a number above 0 and at most 1, got 0.0"),
    (GENERATE + "--top-k -1", "--top-k: expected a whole number of 0 or more, got '-1'"),
    (GENERATE + "--max-new-tokens 0", "--max-new-tokens: expected a whole number of 1 or more, got '0'"),
    (GENERATE + "--prompt=", "prompt: expected at least one token, got none"),
    (GENERATE + "--prompt \udcff", "expected UTF-8 text, got half of a surrogate pair"),
    (GENERATE + "--prompt " + 64 * "🐟", "tokens fill the model's context of 64"),
    ("demo --steps 0", "--steps: expected a whole number of 1 or more, got '0'"),
    ("demo --out text.txt", "text.txt: File exists"),
    ("compare --out text.txt", "text.txt: File exists"),
    ("pretrain --out text.txt", "text.txt: File exists"),
    *(
        (f"{job} --out out --resume", "out/checkpoint.safetensors: no such file: there is no run to resume")
        for job in ("demo", "pretrain", "finetune --data text.txt --model model")
    ),
    ("pretrain --out out --lr nan", "lr: expected a number from 0 to 1e.300, got nan"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[ascii(argv.removeprefix(FINETUNE))[1:-1] for argv, _ in BAD])
def test_errors_are_one_line(argv, message, place, capsys):
    before = tree(place)
    assert call(*argv.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"refqlora\b.*: .*\n", err), err  # one line
    assert re.search(message, err), err
    assert "sacks" not in out  # nothing is begun
    assert tree(place) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_to(place, capsys):
    (place / "shut").mkdir(mode=0o500)
    assert call(*(FINETUNE + "--out shut/out").split()) == 2
    assert re.fullmatch(r"refqlora finetune: .*shut/out: Permission denied\n", capsys.readouterr().err)


def test_a_place_that_may_not_be_written_to_for_anyone(place, capsys, monkeypatch):
    """The same where the test runs as root."""

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for argv in (FINETUNE, "demo --out out", "compare --out out", "pretrain --out out"):
        assert call(*argv.split()) == 2
        assert re.fullmatch(r"refqlora \w+: out: Permission denied\n", capsys.readouterr().err)


def test_a_run_that_diverges_gives_one_warning(place, capsys, recwarn):
    argv = FINETUNE.replace("--steps 2", "--steps 9") + "--lr 1e30"
    assert call(*argv.split()) == 2
    message = r"fine-tuning 1/9 .*\nrefqlora finetune: step 2, learning rate 9.7e.29: "
    message += r"gradient of model\.layers\S+: \d+ of \d+ values are NaN or infinite\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert list(recwarn) == []
    assert not (place / "out" / "adapter_model.safetensors").exists()


def test_interrupted_and_resumed(place, capsys):
    options = FINETUNE.replace("--steps 2", "--steps 5")
    with tiny.interrupted(finetune, 3, checkpoint_every=1):
        assert call(*options.split()) == 130
    saved = "refqlora finetune: interrupted: step 3 of 5 is saved in out/checkpoint.safetensors"
    assert f"\n{saved}; to continue: refqlora {options.strip()} --resume\n" in capsys.readouterr().err
    assert call(*options.split()) == 2
    assert "holds an unfinished run, at step 3 of 5: resume it" in capsys.readouterr().err
    assert call(*options.split(), "--resume") == 0
    assert call(*options.replace("--out out", "--out whole").split()) == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place / "out" / file).read_bytes() == (place / "whole" / file).read_bytes()


# ---- finetune, then generate ----

WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "loss.png", "metrics.jsonl"}


@pytest.mark.parametrize("data", ["text.txt", "texts", "pairs.jsonl", "chats.jsonl"])
def test_finetune_then_generate(data, place, capsys):
    options = f"finetune --model model --data {data} --max-length 32 --steps 3 --batch-size 4 --rank 4 --held-out 0.2"
    assert call(*options.split(), "--out", "a") == 0
    out, err = capsys.readouterr()
    bars = r"((fine-tuning|held-out loss (before|after)) \d/\d.* left\n)+"  # a line at times where there is no terminal
    assert re.fullmatch(bars, err)
    assert re.search(
        r"[\d,]+ sequences \([\d,]+ tokens count\), \d+ held out; [\d,]+ trainable parameters; 3 steps", out
    )
    assert re.search(r"held-out loss \d\.\d{4} before, \d\.\d{4} after", out)
    assert "wrote a/: " in out
    assert {path.name for path in (place / "a").iterdir()} == WRITTEN

    assert call(*options.split(), "--out", "b") == 0
    assert (place / "a/adapter_model.safetensors").read_bytes() == (place / "b/adapter_model.safetensors").read_bytes()
    capsys.readouterr()

    texts = []
    for seed in (1, 1, 2):
        sampled = f"{GENERATE} --adapter a --temperature 1 --max-new-tokens 20 --seed {seed}"
        assert call(*sampled.split()) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("sacks") and text.endswith("\n") for text in texts)


def test_a_sample_is_printed(place, capsys):
    """Trained on the examples until it has them by heart, it completes each as it was, and stops."""
    model = rq.Model.from_config(tiny.config())
    model.params["lm_head.weight"] *= 20  # so that a frozen head can speak with certainty
    model.save_pretrained(place / "able")
    shutil.copy(place / "model" / "tokenizer.json", place / "able")
    options = "finetune --model able --data pairs.jsonl --steps 100 --batch-size 11 --lr 1e-2 --held-out 0.01 --json"
    assert call(*options.split(), "--out", "a") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["training_tokens"] > 200
    right = []
    for example in tiny.EXAMPLES:
        prompt = example.prompt.replace("\n", "\\n")
        assert call("generate", "--model", "able", "--adapter", "a", "--prompt", prompt) == 0
        right.append(capsys.readouterr().out == example.prompt + example.completion + "\n")
        assert call("generate", "--model", "able", "--prompt", prompt) == 0
        assert capsys.readouterr().out != example.prompt + example.completion + "\n"
    assert sum(right) >= len(right) - 1  # all but the one that was held out


def test_json_is_all_that_is_printed(place, capsys):
    assert call(*(FINETUNE + "--json").split()) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out, parse_constant=pytest.fail)  # NaN would be no JSON
    assert err == ""
    rows = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert facts["steps"] == len(rows) == 2
    assert facts.keys() == {
        "steps",
        "trainable_parameters",
        "training_tokens",
        "training_loss",
        "held_out_loss",
        "held_out_bits_per_byte",
        "sample",
        "generate",
    }
    assert facts["held_out_loss"].keys() == {"before", "after"}


def test_a_prompt_from_the_pipe(place):
    """The command as it is run: a process, its pipes, its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    argv = [sys.executable, "-c", "import sys; from refqlora.commands import main; sys.exit(main())", *GENERATE.split()]
    run = subprocess.run(
        [*argv, "--prompt", "-"], input="Zoë\n", capture_output=True, env=environment, encoding="utf-8"
    )
    assert (run.returncode, run.stderr.count("\n")) == (0, 1)
    assert "quantised to NF4" in run.stderr
    assert run.stdout.startswith("Zoë\n")
    run = subprocess.run([*argv, "--model", "no"], capture_output=True, env=environment, encoding="utf-8")
    assert (run.returncode, run.stdout, run.stderr) == (
        2,
        "",
        "refqlora generate: no: no such directory (a model on the Hugging Face hub is written org/name)\n",
    )
