"""Seeded mutations: something valid is changed at random and then used. It must work, or be refused in one line.

    python tests/mutations.py --cases 10000 --seed 0 [--kind config] [--jobs 2]
    python tests/mutations.py --only config:17 --seed 0

A refusal is raised on purpose and names the file, field, tensor, option, line or argument; refusals.py judges that.
Anything else is a fault: another exception, a hang, memory without bound, a file changed or left behind.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import chat_templates
import gradcheck
import numpy as np
import tiny
from mutators import PATTERNS, in_bytes, in_encoding, in_header, in_json, in_name, in_template, in_tensors
from odd_calls import of_call
from refusals import OUT, Begun, Case, Result, command, judge_all

import refqlora as rq
from refqlora import commands

# ---- what is valid -----------------------------------------------------------------------------------------


def build(valid: Path) -> None:
    """models/: one of each architecture, and a Llama whole, in shards and in 4 bits. beside/: an adapter, data. run/: a
    training that was interrupted."""
    sizes = {"vocab_size": 300, "max_positions": 64, "eos_token_id": 0}
    for kind, given in gradcheck.ARCHITECTURES.items():
        config = gradcheck.tiny_config(model_type=kind, **{**given, **sizes})
        _save(rq.Model.from_config(config), valid / "models" / kind)
    model = rq.Model.from_config(tiny.config())
    model.add_adapter(rank=3, alpha=6, dora=True, rank_pattern={"q_proj": 2})
    gradcheck.stir(model.trainable())
    model.save_adapter(valid / "beside/adapter")
    _save(model, valid / "models/plain")
    _save(model, valid / "models/sharded", max_shard_size="50KB")
    model.quantize()
    _save(model, valid / "models/bnb")
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in tiny.EXAMPLES[:5]]
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two sacks."}]
    data = valid / "beside/data"
    data.mkdir()
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    (data / "array.json").write_text(json.dumps(rows))
    (data / "text.txt").write_text(tiny.TEXT * 2, encoding="utf-8")

    def stop(row: dict) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(valid / "run", on_step=stop)


def _save(model: rq.Model, path: Path, **options: object) -> None:
    model.save_pretrained(path, **options)
    tiny.tokenizer().save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": chat_templates.CHATML, "extra_special_tokens": {}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    settings = {"eos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "max_new_tokens": 3}
    (path / "generation_config.json").write_text(json.dumps(settings))


# ---- what uses it ------------------------------------------------------------------------------------------


def load(finite: bool, adapter: bool = False, quantize: str | None = None) -> None:
    model = rq.Model.from_pretrained(Path("model").absolute(), quantize=quantize)
    if adapter:
        model.load_adapter(Path("adapter").absolute())
    logits, _ = model.forward(np.arange(8).reshape(2, 4))
    assert np.isfinite(logits).all() or not finite, "logits that are not finite"


def train(out: Path, **options: object) -> None:
    model = rq.Model.from_config(tiny.config())
    model.add_adapter(rank=2)
    rq.train(model, tiny.examples(), rq.TrainingConfig(steps=3, batch_size=2, checkpoint_every=1), out=out, **options)


def begin(forwards: int, *argv: object) -> None:
    """A command with all its checks, and no more of its work than this many forwards of a model."""
    forward, left = rq.Model.forward, iter(range(forwards))

    def begun(*_: object, **__: object) -> None:
        raise Begun

    def counted(*args: object, **given: object) -> object:
        return forward(*args, **given) if next(left, None) is not None else begun()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(rq.Model, "forward", counted))
        for long in ("text.corpus.modules", "text.corpus.docstring_examples", "commands.parity.run_check"):
            stack.enter_context(mock.patch(f"refqlora.{long}", begun))
        command(*argv)


def ways(home: Path, changed: Path) -> dict[str, partial]:
    """How a model, an adapter, data or a run are used; `changed` is the file that was."""
    model, adapter, out, finite = home / "model", home / "adapter", home / OUT, changed.suffix == ".json"
    generate = ["generate", "--model", model, "--max-new-tokens", 3]
    talk = home / "data/talk.jsonl"
    finetune = ["finetune", "--model", model, "--out", out, "--held-out", 0.3, "--max-length", 8, "--data"]
    return {
        "load": partial(load, finite),
        "load nf4": partial(load, finite, quantize="nf4"),
        "load adapter": partial(load, finite, True),
        "generate": partial(command, *generate, "--prompt", "the mill's Zoë 🐟"),
        "chat": partial(command, *generate, "--chat"),
        "generate adapter": partial(command, *generate, "--prompt", "the", "--adapter", adapter),
        "inspect": partial(command, "inspect", model),
        "inspect headers": partial(command, "inspect", model, "--no-error", "--json"),
        "inspect adapter": partial(command, "inspect", adapter),
        "inspect run": partial(command, "inspect", out),
        "quantize": partial(command, "quantize", "--model", model, "--out", out),
        "merge": partial(command, "merge", "--model", model, "--adapter", adapter, "--out", out),
        "finetune": partial(begin, 0, *finetune, changed if changed.parent.name == "data" else talk),
        "resume": partial(train, out, resume=True),
    }


PLAIN, MODELS = ["plain"], [*gradcheck.ARCHITECTURES, "plain", "sharded", "bnb"]
SAFETENSORS = [in_header, in_tensors, in_tensors, in_bytes]
MODEL_WAYS = ["load", "load nf4", "generate", "inspect", "inspect headers"]
ADAPTER_WAYS = ["load adapter", "generate adapter", "inspect adapter", "merge"]
TALKS = ["generate", "chat", "finetune"]
FILES = {  # kind: models, the files of which one is mutated, how, and the ways in which it is then used
    "config": (MODELS, "model/config.json", [in_json], MODEL_WAYS),
    "generation": (PLAIN, "model/generation_config.json", [in_json, in_json, in_bytes], ["generate", "chat"]),
    "weights": (["plain", "gpt2"], "model/model.safetensors", SAFETENSORS, [*MODEL_WAYS, "quantize"]),
    "bnb": (["bnb"], "model/model.safetensors", SAFETENSORS, MODEL_WAYS),
    "index": (["sharded"], "model/*.index.json", [in_json, in_json, in_bytes], [*MODEL_WAYS, "quantize", "merge"]),
    "adapter config": (PLAIN, "adapter/adapter_config.json", [in_json], ADAPTER_WAYS),
    "adapter": (PLAIN, "adapter/adapter_model.safetensors", SAFETENSORS, ADAPTER_WAYS),
    "resume": (PLAIN, f"{OUT}/checkpoint.safetensors", SAFETENSORS, ["resume", "resume", "inspect run"]),
    "metrics": (PLAIN, f"{OUT}/metrics.jsonl", [in_json, in_bytes], ["resume", "inspect run"]),
    "tokenizer": (PLAIN, "model/tokenizer.json", [in_json, in_json, in_json, in_bytes], TALKS),
    "tokenizer config": (PLAIN, "model/tokenizer_config.json", [in_json, in_bytes], TALKS),
    "template": (PLAIN, "model/tokenizer_config.json", [in_template], TALKS),
    "data": (PLAIN, "data/*", [in_json, in_json, in_bytes, in_encoding, in_name], ["finetune"]),
}


def of_files(kind: str, rng: random.Random, valid: Path, home: Path) -> Case:
    models, pattern, mutations, used = FILES[kind]
    model = rng.choice(models)
    shutil.copytree(valid / "models" / model, home / "model")
    shutil.copytree(valid / "beside", home, dirs_exist_ok=True)
    if pattern.startswith(OUT):
        shutil.copytree(valid / "run", home / OUT)
    path = rng.choice(sorted(home.glob(pattern)))
    mutate, way = rng.choice(mutations), rng.choice(used)
    if path.suffix == ".txt" and mutate is in_json:
        mutate = in_bytes
    said = mutate(rng, path)
    if mutate is in_name:
        path = path.with_name(said)
    names = [str(home), path.name, "the prompt's", "prompt: ", "the message's", "held-out"]
    if path.suffix == ".safetensors":
        names += ["logits", "step "]  # finite weights may overflow
    return Case(f"{way} of {model}: {path.name}: {said}", ways(home, path)[way], names)


WORDS = [
    "", " ", "x", "0", "1", "2", "3", "-1", "0.5", "-0.5", "nan", "inf", "-inf", "1e308", "1e-320", "1e400", "9" * 20,
    "9" * 5000, "2000000000", "1_0", "٣", "é🐟", "\udcff", "x" * 5000, "a/b", "a=b", "q_proj=8", "q_proj=-1", "=", ",",
    "q_proj,v_proj", "q_proj=99999999999999999999", "model", "data", "data/pairs.jsonl", "data/text.txt", "adapter",
    "nowhere/there", "/dev/null", "/dev/null/x", "/proc/x", ".", "-h", "<|endoftext|>", *PATTERNS,
]  # fmt: skip
USUAL = {
    "finetune": {"--data": "data/pairs.jsonl", "--model": "model", "--out": OUT, "--held-out": 0.3, "--steps": 1},
    "generate": {"--model": "model", "--prompt": "the mill", "--max-new-tokens": 3},
    "merge": {"--model": "model", "--adapter": "adapter", "--out": OUT},
    "quantize": {"--model": "model", "--out": OUT},
    "inspect": {"PATH": "model"},
}


def of_options(rng: random.Random, valid: Path, home: Path) -> Case:
    shutil.copytree(valid / "models/plain", home / "model")
    shutil.copytree(valid / "beside", home, dirs_exist_ok=True)
    name = rng.choice(list(commands.COMMANDS))
    (parsers,) = (action.choices for action in commands.parser(name)._actions if action.dest == "command")
    given = dict(USUAL.get(name, {}))
    for action in rng.sample(parsers[name]._actions, min(rng.choice([1, 1, 2, 3]), len(parsers[name]._actions))):
        word = rng.choice([*WORDS, *[choice for choice in action.choices or [] for _ in range(5)]])
        given[(action.option_strings or [action.metavar])[-1]] = None if action.nargs == 0 else word
    if rng.random() < 0.1:
        given.pop(rng.choice(list(given)))
    argv = [str(x) if option[0] != "-" else option if x is None else f"{option}={x}" for option, x in given.items()]
    names = [name for action in parsers[name]._actions for name in (*action.option_strings, action.dest)]
    names += [name.lstrip("-").replace("-", " ") for name in names]
    names += [str(x)[:99] if len(str(x)) > 2 else f" {str(x).strip() or repr(x)}: " for x in given.values()]
    use = partial(begin, 3 if name in USUAL else 0, name, *argv)
    return Case(f"{name} {' '.join(word[:60] for word in argv)!r}", use, names)


KINDS = {kind: partial(of_files, kind) for kind in FILES} | {"options": of_options, "api": of_call}


# ---- the run -----------------------------------------------------------------------------------------------


def run(cases: Iterable[tuple[str, int]], seed: int, jobs: int = 2) -> list[Result]:
    with tempfile.TemporaryDirectory() as valid:
        build(Path(valid))
        return judge_all(KINDS, cases, seed, Path(valid), jobs)


def sample(count: int, kinds: Iterable[str] = KINDS) -> list[tuple[str, int]]:
    """`count` cases, the kinds in turn."""
    kinds = list(kinds)
    return [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="this case alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--refusals", action="store_true", help="print every refusal as well")
    a = parser.parse_args()
    kind, _, number = (a.only or "").partition(":")
    cases = [(kind, int(number))] if a.only else sample(a.cases, a.kind or KINDS)
    results = run(cases, a.seed, a.jobs)
    for r in results:
        if r.ended == "FAILED" or a.only or (a.refusals and r.ended == "refused"):
            print(f"{r.ended} {r.kind}:{r.number} --seed {a.seed} ({r.seconds:.1f} s)\n  {r.said}\n  {r.message}\n")
    print(f"{'kind':18}{'cases':>7}{'success':>9}{'refused':>9}{'FAILED':>9}{'slowest':>10}")
    for kind in [*dict.fromkeys(r.kind for r in results), "all"]:
        these = [r for r in results if kind in ("all", r.kind)]
        count = Counter(r.ended for r in these)
        ends = "".join(f"{count[end]:>9}" for end in ("success", "refused", "FAILED"))
        print(f"{kind:18}{len(these):>7}{ends}{max(r.seconds for r in these):>8.1f} s")
    return 1 if any(r.ended == "FAILED" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
