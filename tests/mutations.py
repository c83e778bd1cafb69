"""Seeded mutations: something valid is changed at random and then used. It must work, or be refused in one line.

    python tests/mutations.py --cases 10000 --seed 0 [--kind config] [--jobs 2]
    python tests/mutations.py --only config:17 --seed 0

A refusal is raised on purpose and names the file, field, tensor, option, line or argument; refusals.py judges that.
Anything else is a fault: another exception, a hang, memory without bound, a file changed or left behind.
"""

import argparse
import copy
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
from odd_calls import PATTERNS, TEXTS, VALUES, of_call
from refusals import OUT, Begun, Case, Result, command, judge_all
from safetensors import safe_open
from safetensors.numpy import save_file

import refqlora as rq
from refqlora import commands

RAW = ["1e400", "9" * 5000, "[" * 100_000, '{"a":' * 100_000, '"\\ud800"', "01", "{", "", "\xff", '0, "a": 1, "a": 2']
MARK = "raw text {} of a mutation"


# ---- mutations ---------------------------------------------------------------------------------------------


def mutated_json(rng: random.Random, text: str) -> tuple[str, str]:
    """JSON with one to three changes, which may no longer be JSON; and what they are."""
    try:
        root, said = {"": json.loads(text)}, []
    except ValueError:
        root, said = {"": text}, []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key, path = root, "", ""
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            path += f".{key}"
        said.append(f"{path[1:61]} {_mutate(rng, holder, key)}")
    text = json.dumps(root[""])
    for i, raw in enumerate(RAW):
        text = text.replace(json.dumps(MARK.format(i)), raw)
    return text, "; ".join(said)


def _mutate(rng: random.Random, holder: dict | list, key: str | int) -> str:
    """Change holder[key]; -> what was done."""
    value, how = holder[key], rng.choice(["value"] * 3 + ["raw", "removed", "swapped", "nudged", "wrapped", "renamed"])
    if key == "" and how in ("removed", "renamed"):  # there is nothing but it
        how = "wrapped"
    match how:
        case "removed":
            del holder[key]
            return how
        case "renamed" if isinstance(holder, dict):
            new = rng.choice([f"{key}x", str(key).upper(), *TEXTS])
            holder[new] = holder.pop(key)
            return f"{how} {new[:20]!r}"
        case "swapped":
            other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            holder[key], holder[other] = holder[other], value
            return f"{how} with {str(other)[:60]}"
        case "nudged" if isinstance(value, int | float):
            holder[key] = rng.choice([value + 1, value - 1, value * 2, -value, value + 0.5, float(value), value * 1000])
        case "wrapped":
            holder[key] = rng.choice([[value], {"x": value}, [value, copy.deepcopy(value)], str(value)])
        case "raw":
            i = rng.randrange(len(RAW))
            holder[key] = MARK.format(i)
            return f"= {RAW[i][:20]}"
        case _:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return f"= {str(holder[key])[:40]!r}"


def mutated_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes flipped, cut, doubled, inserted or zeroed, most often near the beginning, where a header is."""
    at = int(len(data) * rng.random() ** rng.choice([1, 4, 16]))
    end = min(len(data), at + rng.choice([1, 2, 8, 100, 10_000]))
    how = rng.choice(["cut", "flipped", "removed", "doubled", "inserted", "zeroed"])
    part = {
        "flipped": bytes(b ^ 1 << rng.randrange(8) for b in data[at:end]),
        "doubled": data[at:end] * 2,
        "inserted": rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{", '"🐟'.encode(), rng.randbytes(9)]),
        "zeroed": bytes(end - at),
    }.get(how, b"")
    return data[:at] + part + (b"" if how == "cut" else data[end:]), f"bytes {at} to {end} of {len(data)} {how}"


def in_json(rng: random.Random, path: Path) -> str:
    """One line of a .jsonl file, or the whole of another, is other JSON."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    i = rng.randrange(len(lines))
    lines[i], said = mutated_json(rng, lines[i])
    path.write_bytes("\n".join([*lines, ""]).encode("latin-1" if "\xff" in lines[i] else "utf-8", "replace"))
    return f"line {i + 1}: {said}"


def in_bytes(rng: random.Random, path: Path) -> str:
    data, said = mutated_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return said


def in_encoding(rng: random.Random, path: Path) -> str:
    encoding = rng.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-7"])
    path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding, "replace"))
    return encoding


def in_name(rng: random.Random, path: Path) -> str:
    return path.rename(path.with_suffix(rng.choice([".jsonl", ".json", ".txt", ".bin", ""]))).name


def in_header(rng: random.Random, path: Path) -> str:
    """The header of a safetensors file says something else."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text, said = mutated_json(rng, data[8:end].decode())
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[end:])
    return f"header: {said}"


def in_tensors(rng: random.Random, path: Path) -> str:
    """One tensor of a safetensors file, the JSON in one, or a text of its metadata, is another."""
    with safe_open(path, "np") as file:
        found, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    states = [name for name in sorted(found) if "quant_state" in name]
    name = rng.choice([*sorted(found), *states * 5, *sorted(texts) * 20])
    if name in texts:
        texts[name], said = mutated_json(rng, texts[name])
    elif "quant_state" in name:
        text, said = mutated_json(rng, found[name].tobytes().decode())
        found[name] = np.frombuffer(text.encode(), np.uint8)
    else:
        said = rng.choice(["removed", "renamed", "turned", "cut", "doubled", "empty", "cast", "set"])
        x = np.atleast_1d(found.pop(name))
        y = {"turned": x.T, "cut": x[:-1], "doubled": np.concatenate([x, x]), "empty": x[:0]}.get(said, x.copy())
        if said == "cast":
            y = x.astype(rng.choice(["f2", "f4", "f8", "i1", "u1", "i8", "?"]))
        elif said == "set":
            y.flat[rng.randrange(x.size)] = rng.choice([np.nan, np.inf, -1.0, 0.0]) if x.dtype.kind == "f" else 1
        if said != "removed":
            found[rng.choice([name + "x", name[1:], "x", ""]) if said == "renamed" else name] = np.ascontiguousarray(y)
    save_file(found, path, texts)
    return f"{name} {said}"


LOOPS = "".join(f"{{% for i{i} in range(99) %}}" for i in range(25)) + "x" + "{% endfor %}" * 25
JINJA = [
    LOOPS, "{% for i in range(10**9) %}x{% endfor %}", "{{ 2**(9**9) }}", "{{ 9**9**9 }}", "{{ 'x' * 10**10 }}", "{#",
    "{{ messages | tojson(indent=10**9) }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{" + "-" * 999 + "1}}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{% break %}",
    "{{ messages[99].content }}", "{{ raise_exception('no\nno') }}", "{% generation %}", "{% endgeneration %}",
    "{{ strftime_now('%Y' * 10**8) }}", "{{ strftime_now(5) }}", "{{ lipsum(10**7) }}", "{{ [1] * 10**9 }}",
    "{{ range(10**12) | list }}", "{{ '%999999999d' % 1 }}", "{{ 'a'.center(10**10) }}", "\0generation\1", "{{ 1/0 }}",
    "{% set messages = 5 %}", "{{ messages.append(messages) }}", "{{ undefined.x.y }}", "{{ 'x' | z }}", "{% raw %}",
    "{{ messages | sort(attribute='x.y') }}", "{{ messages | batch(0) | list }}", "{{ 10**5000 }}", "{{ caller() }}",
]  # fmt: skip
TEMPLATES = [text for text in vars(chat_templates).values() if isinstance(text, str) and "{%" in text]


def in_template(rng: random.Random, path: Path) -> str:
    """The chat template of tokenizer_config.json, or a file of its own, is another program."""
    settings, text, said = json.loads(path.read_text()), rng.choice(TEMPLATES), []
    for _ in range(rng.choice([1, 1, 2])):
        new, at = rng.choice(JINJA), rng.choice([i for i in range(len(text)) if text.startswith("{%", i)] or [0])
        if rng.random() < 0.7:
            text, how = text[:at] + new + text[at:], f"{new[:30]!r} at {at}"
        else:
            data, how = mutated_bytes(rng, text.encode())
            text = data.decode(errors="replace")
        said.append(how)
    if rng.random() < 0.2:
        path.with_name("chat_template.jinja").write_text(text)
    else:
        settings["chat_template"] = rng.choice([text, [{"name": "default", "template": text}]])
        path.write_text(json.dumps(settings))
    return "; ".join(said)


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
    names = [str(home), "prompt", "the message's", "held-out"]
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
    names += [name.lstrip("-").replace("-", " ") for name in names] + [str(x)[:99] for x in given.values() if x]
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
