"""Seeded mutations: something valid is changed at random and then used. It must work or be refused in one line.

    python tests/mutations.py --cases 10000 --seed 0 [--kind config] [--jobs 2]
    python tests/mutations.py --only config:17 --seed 0

A refusal names the file, field, tensor, option, line or argument, and is raised on purpose; refusals.py judges that.
Everything else is a fault: another exception, a traceback, a hang, memory without bound, a file changed or left behind.
"""

import argparse
import copy
import json
import random
import reprlib
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from unittest import mock

import chat_templates
import gradcheck
import numpy as np
import tiny
from refusals import OUT, Begun, Case, Result, command, judge_all
from safetensors import safe_open
from safetensors.numpy import save_file

import refqlora as rq
from refqlora import commands as cli
from refqlora.lora import LoRA

# ---- what a value becomes ----------------------------------------------------------------------------------

HUGE = 10**400
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), HUGE, 0.0, -0.0, 0.5, -1.0, 1e-320, 1e-300, 1e300, -1e300]
PATTERNS = ["(((.*)*)*)*!", "(" * 5000 + ")" * 5000, "[", "(?P<x>", "q_proj|(", ".{99999999999999}", "(a|a)*b" * 20]
TEXTS = [
    "",
    " ",
    "x",
    "0",
    "1",
    "nan",
    "true",
    "nf4",
    "llama",
    "float16",
    "\0",
    "é\u202e\n🐟",
    "x" * 20_000,
    "../x",
    *PATTERNS,
]
VALUES = [None, True, False, *NUMBERS, float("nan"), float("inf"), *TEXTS, [], [None], [[]], {}, {"": None}, {"x": 1}]
RAW = [
    "1e400",
    "-1e999",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 100_000,
    '"\\ud800"',
    "01",
    "{",
    "",
    "\xff",
    '0, "a": 1, "a": 2',
]
MARK = "raw text {} of a mutation"


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
        said.append(f"{path[1:41]} {_mutate(rng, root, holder, key)}")
    text = json.dumps(root[""])
    for i, raw in enumerate(RAW):
        text = text.replace(f'"{MARK.format(i)}"', raw)
    return text, "; ".join(said)


def _mutate(rng: random.Random, root: dict, holder: dict | list, key: str | int) -> str:
    """Change holder[key]; -> what was done."""
    value, how = holder[key], rng.choice(["value"] * 4 + ["raw", "remove", "swap", "nudge", "wrap", "text", "rename"])
    if how == "remove" and holder is not root:
        del holder[key]
        return "removed"
    if how == "rename" and isinstance(holder, dict) and holder is not root:
        new = rng.choice([str(key) + "x", str(key).upper(), rng.choice(TEXTS)])
        holder[new] = holder.pop(key)
        return f"renamed {new[:20]!r}"
    if how == "swap":
        other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], value
        return f"swapped with {str(other)[:40]}"
    if how == "nudge" and isinstance(value, int | float):
        holder[key] = rng.choice([value + 1, value - 1, value * 2, -value, value + 0.5, float(value), value * 1000])
    elif how == "wrap":
        holder[key] = rng.choice([[value], {"x": value}, [value, copy.deepcopy(value)]])
    elif how == "text":
        holder[key] = str(value)
    elif how == "raw":
        holder[key] = MARK.format(rng.randrange(len(RAW)))
        return f"= {RAW[int(holder[key].split()[2])][:20]}"
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return f"= {str(holder[key])[:40]!r}"


def mutated_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes flipped, cut, doubled, inserted, zeroed; most often near the beginning, where a header is."""
    at = int(len(data) * rng.random() ** rng.choice([1, 4, 16]))
    end = min(len(data), at + rng.choice([1, 2, 8, 100, 10_000]))
    how = rng.choice(["flip", "cut", "remove", "double", "insert", "zero"])
    part = {
        "flip": bytes(b ^ 1 << rng.randrange(8) for b in data[at:end]),
        "cut": b"",
        "remove": b"",
        "double": data[at:end] * 2,
        "insert": rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{", '"🐟'.encode(), rng.randbytes(9)]),
        "zero": bytes(end - at),
    }[how]
    return data[:at] + part + (b"" if how == "cut" else data[end:]), f"{how} bytes {at} to {end} of {len(data)}"


def json_file(rng: random.Random, path: Path) -> str:
    text, said = mutated_json(rng, path.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("latin-1", "xmlcharrefreplace") if "\xff" in text else text.encode())
    return f"{path.name}: {said}"


def bytes_file(rng: random.Random, path: Path) -> str:
    data, said = mutated_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {said}"


def header(rng: random.Random, path: Path) -> str:
    """A safetensors file whose header says something else."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text, said = mutated_json(rng, data[8:end].decode())
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[end:])
    return f"{path.name}: header: {said}"


def tensors(rng: random.Random, path: Path, part: str = "") -> str:
    """A safetensors file of which one tensor (with `part` in its name) is another."""
    with safe_open(path, "np") as file:
        found, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = rng.choice([name for name in sorted(found) if part in name])
    x = found.pop(name)
    if part:
        text, said = mutated_json(rng, x.tobytes().decode())
        found[name] = np.frombuffer(text.encode(), np.uint8)
    else:
        key, said, value = _tensor(rng, name, x)
        if value is not None:
            found[key] = np.ascontiguousarray(value)
    save_file(found, path, metadata)
    return f"{path.name}: {name} {said}"


def _tensor(rng: random.Random, name: str, x: np.ndarray) -> tuple[str, str, np.ndarray | None]:
    said = rng.choice(["removed", "renamed", "turned", "cut", "doubled", "flat", "empty", "number", "typed", "filled"])
    if said in ("typed", "filled"):
        dtype = rng.choice(["f2", "f4", "f8", "i1", "u1", "i8", "?"])
        value = rng.choice([np.nan, np.inf, -np.inf, 3e38, -1.0, 0.0])
        y = x.astype(dtype) if said == "typed" or x.dtype.kind != "f" else x.copy()
        if said == "filled" and y.size:
            y.reshape(-1)[rng.randrange(y.size)] = value if y.dtype.kind == "f" else 1
        return name, f"{said} {dtype} {value}", y
    y = {"removed": None, "renamed": x, "turned": x.T, "cut": x[:-1], "doubled": np.concatenate([x, x])}.get(said, x)
    y = {"flat": x.reshape(-1), "empty": x[:0], "number": x.reshape(-1)[0]}.get(said, y)
    return rng.choice([name + "x", name[1:], "x", ""]) if said == "renamed" else name, said, y


# ---- valid files -------------------------------------------------------------------------------------------


def build(valid: Path) -> None:
    """Models of every architecture, in several forms, each with all that may lie beside it; adapters, runs, data."""
    sizes = {"vocab_size": 300, "max_positions": 64, "eos_token_id": 0}
    for kind, options in gradcheck.ARCHITECTURES.items():
        model = rq.Model.from_config(gradcheck.tiny_config(model_type=kind, **{**options, **sizes}))
        _save(model, valid / kind)
    model = rq.Model.from_config(tiny.config())
    _save(model, valid / "sharded", max_shard_size="50KB")
    for name, options in {"lora": {}, "dora": {"dora": True, "rank_pattern": {"q_proj": 2}}}.items():
        model.add_adapter(name, rank=3, alpha=6, **options)
        gradcheck.stir(model.trainable())
        model.save_adapter(valid / name)
    model.set_adapter(None)
    _save(model, valid / "plain")
    model.quantize()
    _save(model, valid / "bnb")
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in tiny.EXAMPLES[:5]]
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two sacks."}]
    data = valid / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    (data / "array.json").write_text(json.dumps(rows))
    (data / "text.txt").write_text(tiny.TEXT * 2, encoding="utf-8")

    def stop(row: dict) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    try:
        train(valid / "run", on_step=stop)
    except KeyboardInterrupt:
        return


def _save(model: rq.Model, path: Path, **options) -> None:
    model.save_pretrained(path, **options)
    tiny.tokenizer().save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": chat_templates.CHATML, "extra_special_tokens": {}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    settings = {"eos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "max_new_tokens": 3}
    (path / "generation_config.json").write_text(json.dumps(settings))


def train(out: Path, **options) -> None:
    model = rq.Model.from_config(tiny.config())
    model.add_adapter(rank=2)
    rq.train(model, tiny.examples(), rq.TrainingConfig(steps=3, batch_size=2, checkpoint_every=1), out=out, **options)


# ---- what uses them ----------------------------------------------------------------------------------------


def load(model: Path, adapter: Path | None = None, quantize: str | None = None) -> None:
    found = rq.Model.from_pretrained(model, quantize=quantize)
    if adapter:
        found.load_adapter(adapter)
    logits, _ = found.forward(np.arange(8).reshape(2, 4))
    assert np.isfinite(logits).all(), "logits that are not finite"


def door(rng: random.Random, home: Path, adapter: bool = False) -> tuple[str, partial]:
    """One of the ways in which a model, and an adapter, are used; and its name."""
    model, given = home / "model", home / "adapter" if adapter else None
    with_adapter = ["--adapter", given] if adapter else []
    generate = ["generate", "--model", model, "--prompt", "the mill", "--max-new-tokens", 4, *with_adapter]
    name = rng.choice(["load", "load", "generate", "inspect", "merge" if adapter else "quantize", "inspect headers"])
    what = given or model
    return name, {
        "load": partial(load, model, given, rng.choice([None, None, "nf4"])),
        "generate": partial(command, *generate),
        "inspect": partial(command, "inspect", what),
        "inspect headers": partial(command, "inspect", what, "--no-error", "--json"),
        "quantize": partial(command, "quantize", model, "--out", home / OUT),
        "merge": partial(command, "merge", "--model", model, "--adapter", given, "--out", home / OUT),
    }[name]


ANY = ("/",)
MODELS = (*gradcheck.ARCHITECTURES, "plain", "sharded", "bnb")


def of_model(rng, valid, home, models, mutate, adapter=None) -> Case:
    """A case of one of these models whose files (or the adapter's) are mutated by `mutate`."""
    model = rng.choice(models)
    shutil.copytree(valid / model, home / "model")
    if adapter:
        shutil.copytree(valid / rng.choice(["lora", "dora"]), home / "adapter")
    said = mutate(rng, home)
    way, use = door(rng, home, adapter)
    return Case(f"{model}, {way}: {said}", use, [file.name for file in home.rglob("*")])


def config(rng, valid, home):
    return of_model(rng, valid, home, MODELS, lambda rng, home: json_file(rng, home / "model/config.json"))


def weights(rng, valid, home):
    how = rng.choice([header, tensors, bytes_file])
    return of_model(rng, valid, home, ["plain", "gpt2"], lambda rng, home: how(rng, home / "model/model.safetensors"))


def index(rng, valid, home):
    def mutate(rng, home):
        return rng.choice([json_file, json_file, bytes_file])(rng, home / "model/model.safetensors.index.json")

    return of_model(rng, valid, home, ["sharded"], mutate)


def bnb(rng, valid, home):
    state = partial(tensors, part="quant_state")
    how = rng.choice([state, state, tensors, header, bytes_file])
    return of_model(rng, valid, home, ["bnb"], lambda rng, home: how(rng, home / "model/model.safetensors"))


def adapter(rng, valid, home):
    def mutate(rng, home):
        if rng.random() < 0.5:
            return json_file(rng, home / "adapter/adapter_config.json")
        return rng.choice([header, tensors, bytes_file])(rng, home / "adapter/adapter_model.safetensors")

    return of_model(rng, valid, home, ["plain"], mutate, adapter=True)


def generation(rng, valid, home):
    shutil.copytree(valid / "plain", home / "model")
    said = rng.choice([json_file, json_file, bytes_file])(rng, home / "model/generation_config.json")
    how = rng.choice([["--prompt", "the mill"], ["--chat"]])
    use = partial(command, "generate", "--model", home / "model", *how)
    return Case(said, use, ["generation_config.json"])


def resume(rng, valid, home):
    shutil.copytree(valid / "run", home / OUT)
    if rng.random() < 0.3:
        path = home / OUT / "metrics.jsonl"
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i], said = mutated_json(rng, lines[i])
        path.write_text("\n".join(lines) + "\n")
        said = f"metrics.jsonl: line {i + 1}: {said}"
        if rng.random() < 0.3:
            said += bytes_file(rng, path)
    else:
        said = rng.choice([header, tensors, bytes_file, metadata])(rng, home / OUT / "checkpoint.safetensors")
    way, use = rng.choice(
        [("resume", partial(train, home / OUT, resume=True)), ("inspect", partial(command, "inspect", home / OUT))]
    )
    return Case(f"{way}: {said}", use, ["checkpoint.safetensors", "metrics.jsonl"])


def metadata(rng, path):
    """A checkpoint whose record of its run is another."""
    with safe_open(path, "np") as file:
        found, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = rng.choice(sorted(texts))
    texts[name], said = mutated_json(rng, texts[name])
    save_file(found, path, texts)
    return f"{path.name}: metadata {name}: {said}"


def begin(forwards: int, *argv: object) -> None:
    """A command with all its checks, and no more of its work than this many forwards of a model."""
    forward, left = rq.Model.forward, iter(range(forwards))

    def counted(*args, **options):
        return forward(*args, **options) if next(left, None) is not None else begun()

    def begun(*_, **__):
        raise Begun

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(rq.Model, "forward", counted))
        for long in ("text.corpus.modules", "text.corpus.docstring_examples", "commands.parity.run_check"):
            stack.enter_context(mock.patch(f"refqlora.{long}", begun))
        command(*argv)


def talking(rng, valid, home, data="talk.jsonl"):
    """What uses a tokenizer and its template: a chat, a completion, fine-tuning on `data`; and its name."""
    shutil.copytree(valid / "plain", home / "model")
    shutil.copytree(valid / "data", home / "data")
    name, *argv = rng.choice([("generate", "--chat"), ("generate", "--prompt", "the mill's Zoë 🐟"), ("finetune",)])
    argv = ["--model", home / "model", *argv]
    if name == "generate":
        return name, partial(command, name, *argv, "--max-new-tokens", 3)
    return name, partial(begin, 0, name, *argv, *finetuning(home, data))


def finetuning(home, data):
    return ["--data", home / "data" / data, "--out", home / OUT, "--held-out", 0.3, "--max-length", 8]


def tokenizer(rng, valid, home):
    name, use = talking(rng, valid, home)
    said = rng.choice([json_file, json_file, json_file, bytes_file])(rng, home / "model/tokenizer.json")
    return Case(f"{name}: {said}", use, ["tokenizer.json"])


LOOPS = "".join(f"{{% for i{i} in range(99) %}}" for i in range(25)) + "x" + "{% endfor %}" * 25
JINJA = [
    LOOPS, "{% for i in range(10**9) %}x{% endfor %}", "{{ 2**(9**9) }}", "{{ 9**9**9 }}", "{{ 'x' * 10**10 }}", "{% break %}",
    "{{ messages | tojson(indent=10**9) }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "-" * 9000 + "1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}",
    "{{ messages[99].content }}", "{{ raise_exception('no\nno') }}", "{% generation %}", "{% endgeneration %}", "{% raw %}",
    "{{ strftime_now('%Y' * 10**8) }}", "{{ strftime_now(5) }}", "{{ lipsum(10**7) }}", "{{ [1] * 10**9 }}", "{% if %}",
    "{{ range(10**12) | list }}", "{{ '%999999999d' % 1 }}", "{{ 'a'.center(10**10) }}", "\0generation\1", "{#", "{{ 1 / 0 }}",
    "{% set messages = 5 %}", "{{ messages.append(messages) }}", "{{ undefined.x.y }}", "{{ caller() }}", "{{ 'x' | z }}",
    "{{ 'é' * 3000 }}", "{{ messages | sort(attribute='x.y') }}", "{{ messages | batch(0) | list }}", "{% set x = x %}{{ x }}",
    "{% for i in 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' if i | list | join | wordwrap(0) %}{% endfor %}", "{{ 10**5000 }}",
]  # fmt: skip
TEMPLATES = [text for text in vars(chat_templates).values() if isinstance(text, str) and "{%" in text]


def template(rng, valid, home):
    name, use = talking(rng, valid, home)
    path, said = home / "model/tokenizer_config.json", []
    text, settings = rng.choice(TEMPLATES), json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.7:
            at, new = rng.choice([i for i in range(len(text)) if text.startswith("{%", i)] or [0]), rng.choice(JINJA)
            text = text[:at] + new + text[at:]
            said.append(f"{new[:30]!r} at {at}")
        else:
            data, how = mutated_bytes(rng, text.encode())
            text = data.decode(errors="replace")
            said.append(how)
    how = rng.choice(["text", "text", "named", "file", "settings"])
    if how == "file":
        (home / "model/chat_template.jinja").write_text(text)
    else:
        settings["chat_template"] = text if how == "text" else [{"name": "default", "template": text}]
        path.write_text(json.dumps(settings))
    if how == "settings":
        said = [json_file(rng, path)]
    return Case(f"{name}: {how}: {'; '.join(said)}", use, ["tokenizer_config.json", "chat_template.jinja"])


def data(rng, valid, home):
    shutil.copytree(valid / "plain", home / "model")
    shutil.copytree(valid / "data", home / "data")
    path = rng.choice(sorted((home / "data").iterdir()))
    how = rng.choice(["bytes", "encoding", "json", "json"])
    if how == "encoding":
        encoding = rng.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-7"])
        path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding, "replace"))
        said = f"{path.name}: {encoding}"
    elif how == "bytes" or path.suffix == ".txt":
        said = bytes_file(rng, path)
    else:
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i], said = mutated_json(rng, lines[i])
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        said = f"{path.name}: line {i + 1}: {said}"
    if rng.random() < 0.1:
        path = path.rename(path.with_suffix(rng.choice([".jsonl", ".json", ".txt", ".bin", ""])))
    name = rng.choice([path.name, path.name, path.name, ""])
    use = partial(begin, 0, "finetune", "--model", home / "model", *finetuning(home, name))
    return Case(said, use, [path.name])


# ---- options of the commands -------------------------------------------------------------------------------

WORDS = [
    "", " ", "x", "0", "1", "2", "3", "-1", "0.5", "-0.5", "nan", "inf", "-inf", "1e308", "1e-320", "1e400", "9" * 20,
    "9" * 5000, "2000000000", "1_0", "٣", "é🐟", "\udcff", "x" * 5000, "a/b", "a=b", "q_proj=8", "q_proj=-1", "q_proj=" + "9" * 20,
    "=", "q_proj,v_proj", ",", "1,2", "model", "data", "data/pairs.jsonl", "data/text.txt", "lora", "nowhere/there", "/dev/null",
    "/dev/null/x", "/proc/x", ".", "--", "-h", "<|endoftext|>", *PATTERNS,
]  # fmt: skip
USUAL = {
    "finetune": {"--data": "data/pairs.jsonl", "--model": "model", "--out": OUT, "--held-out": 0.3, "--steps": 1},
    "generate": {"--model": "model", "--prompt": "the mill", "--max-new-tokens": 3},
    "merge": {"--model": "model", "--adapter": "lora", "--out": OUT},
    "quantize": {"PATH": "model", "--out": OUT},
    "inspect": {"PATH": "model"},
}


def options(rng, valid, home):
    for name in ("plain", "data", "lora"):
        shutil.copytree(valid / name, home / ("model" if name == "plain" else name))
    name = rng.choice(list(cli.COMMANDS))
    (known,) = (action.choices[name] for action in cli.parser(name)._actions if action.dest == "command")
    given = dict(USUAL.get(name, {"--out": OUT}))
    for action in rng.sample(known._actions, min(len(known._actions), rng.choice([1, 1, 2, 3]))):
        option = action.option_strings[-1] if action.option_strings else action.metavar
        choices = [*(action.choices or []), *given.values()]
        given[option] = (
            None if action.nargs == 0 else rng.choice(choices) if choices and rng.random() < 0.2 else rng.choice(WORDS)
        )
    if rng.random() < 0.1:
        given.pop(rng.choice(list(given)))
    argv = [str(x) if option[0] != "-" else option if x is None else f"{option}={x}" for option, x in given.items()]
    names = [name for action in known._actions for name in (*action.option_strings, action.dest, action.metavar or "-")]
    names += [name.lstrip("-").replace("-", " ") for name in names]
    use = partial(begin, 3 if name in USUAL else 0, name, *argv)
    return Case(f"{name} {' '.join(word[:40] for word in argv)!r}", use, names)


# ---- calls of the API --------------------------------------------------------------------------------------


W = np.random.default_rng(0).standard_normal((6, 64), np.float32)
SAMPLING = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}


def calls(home: Path) -> dict[str, tuple[Callable, dict]]:
    """Public functions, each with arguments that are right and may be mutated."""
    model, tokens = rq.Model.from_config(tiny.config()), np.arange(10).reshape(2, 5)
    model.add_adapter("a", rank=2)
    model.add_adapter("b", rank=3)
    grads, params = ({name: p.copy() for name, p in model.trainable().items()} for _ in range(2))
    logits, cache = model.forward(tokens)
    sizes = {field.name: getattr(model.config, field.name) for field in fields(rq.Config)}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ("q_proj", "v_proj"), "rslora": False, "dora": False}
    lora |= {"init": "default", "exclude": (), "layers": (0,), "layers_pattern": (), "rank_pattern": {"q_proj": 2}}
    lora |= {"alpha_pattern": {"v_proj": 4}}
    training = {field.name: field.default for field in fields(rq.TrainingConfig)} | {"steps": 9}
    adamw = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decay": list(params)[:2]}
    writing = {"max_new_tokens": 3, "stop": (0,), "seed": 1, **SAMPLING}
    linear = LoRA(W[:2], W[:, :2], 1.0)
    return {
        "quantize": (rq.quantize, {"w": W, "codebook": "nf4", "block_size": 64, "double_quant": True}),
        "dequantize": (rq.dequantize, {"q": rq.quantize(W), "dtype": np.float32, "out": np.empty_like(W)}),
        "normal_float": (rq.normal_float, {"bits": 4}),
        "cross_entropy": (rq.cross_entropy, {"logits": logits, "labels": tokens, "denominator": 3}),
        "merge": (rq.merge, {"weight": W, "lora": linear}),
        "Config": (rq.Config, sizes),
        "LoraConfig": (rq.LoraConfig, lora),
        "TrainingConfig": (rq.TrainingConfig, training),
        "Model": (partial(rq.Model, model.config), {"params": dict(model.params), "dtype": np.float32}),
        "from_config": (partial(rq.Model.from_config, model.config), {"seed": 0, "dtype": np.float32}),
        "from_pretrained": (rq.Model.from_pretrained, {"path": home / "model", "quantize": "nf4", "dtype": np.float32}),
        "save_pretrained": (
            model.save_pretrained, {"path": home / OUT, "dtype": np.float32, "max_shard_size": "20KB"},
        ),
        "Model.quantize": (model.quantize, {"kind": "nf4", "block_size": 64, "double_quant": True}),
        "add_adapter": (model.add_adapter, {"name": "c", "seed": 0, **lora}),
        "add_adapters": (model.add_adapters, {"factors": {"a": 1, "b": 2}, "name": "c", "method": "cat", "rank": None}),
        "load_adapter": (model.load_adapter, {"path": home / "adapter", "name": "c"}),
        "save_adapter": (model.save_adapter, {"path": home / OUT, "name": "a", "base": "", "plain": None}),
        "set_adapter": (model.set_adapter, {"name": "a"}),
        "forward": (model.forward, {"tokens": tokens, "rng": None, "recompute": True, "kv": None}),
        "backward": (partial(model.backward, cache=cache), {"dlogits": logits}),
        "generate": (lambda **a: list(rq.generate(model, **a)), {"prompt": [1, 2, 3], **writing}),
        "complete": (partial(rq.complete, model, tiny.tokenizer()), {"prompt": "mill", "stop_strings": ("x",), **writing}),
        "AdamW": (rq.AdamW, {"params": params, **adamw}),
        "AdamW.step": (rq.AdamW(params, **adamw).step, {"grads": grads, "lr": 0.1}),
        "clip_by_global_norm": (rq.clip_by_global_norm, {"grads": grads, "max_norm": 1.0}),
    }  # fmt: skip


def odd(rng: random.Random, value: object) -> object:
    """Something else in the place of an argument, near it or far."""
    if isinstance(value, dict) and value and rng.random() < 0.6:
        key = rng.choice(list(value))
        changed = {**value, key: odd(rng, value[key])}
        return {"x" if k == key and rng.random() < 0.3 else k: x for k, x in changed.items()}
    if isinstance(value, tuple | list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return type(value)([*value[:i], odd(rng, value[i]), *value[i + 1 :]])
    if isinstance(value, np.ndarray) and rng.random() < 0.7:
        filled = value.astype(value.dtype.type)
        filled.reshape(-1)[rng.randrange(value.size)] = rng.choice([0, -1, 100, 2**20])
        real = value.astype(rng.choice(["f2", "f4", "f8"]))
        real.reshape(-1)[0] = rng.choice([np.nan, np.inf, -np.inf, 1, -2])
        return rng.choice([
            value.astype(rng.choice(["f2", "f8", "c8", "?", "i1", "u1", "i8", "O", "U9", "S3", "M8[s]", "i4,f4"])),
            filled, real, value.T, value[::-1], value[:0], value[:1], value[None], value.reshape(-1), value.tolist(),
            value[0, 0], np.asfortranarray(value), value.view(type("Array", (np.ndarray,), {})), np.ma.array(value),
        ])  # fmt: skip
    return rng.choice([
        *VALUES, b"nf4", (), (1, 2), (1, "x"), 1j, object(), int, np.float32(1), np.int64(2), np.bool_(True), np.float16,
        np.complex64, np.dtype("U3"), np.zeros(0), np.zeros((2, 3)), np.array(None), np.array("x"), np.array(3), len,
        np.broadcast_to(np.float32(0), (2**20, 2**20)), iter([1, 2]), range(10**9), {1, 2}, Path("nowhere"), Exception,
    ])  # fmt: skip


def api(rng: random.Random, valid: Path, home: Path) -> Case:
    shutil.copytree(valid / "plain", home / "model")
    shutil.copytree(valid / "lora", home / "adapter")
    name, (call, arguments) = rng.choice(list(calls(home).items()))
    said = []
    for argument in rng.sample(list(arguments), min(len(arguments), rng.choice([1, 1, 1, 2]))):
        arguments[argument] = odd(rng, arguments[argument])
        said.append(f"{argument}={short(arguments[argument])}")
    return Case(f"{name}({', '.join(said)})", partial(call, **arguments), [*arguments, "adapter", "tensor"])


def short(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {value.shape}"
    return reprlib.repr(value)


KINDS = {kind.__name__: kind for kind in (
    config, generation, weights, index, adapter, bnb, resume, tokenizer, template, data, options, api,
)}  # fmt: skip


# ---- the run -----------------------------------------------------------------------------------------------


def run(cases: list[tuple[str, int]], seed: int, jobs: int = 2) -> list[Result]:
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
    results = run(
        [(kind, int(number))] if a.only else sample(a.cases, a.kind or KINDS), a.seed, 1 if a.only else a.jobs
    )
    for r in results:
        if r.ended == "FAILED" or a.only or (a.refusals and r.ended == "refused"):
            print(f"{r.ended} {r.kind}:{r.number} --seed {a.seed} ({r.seconds:.1f} s)\n  {r.said}\n  {r.message}\n")
    print(f"{'kind':12}{'cases':>7}{'success':>9}{'refused':>9}{'FAILED':>9}{'slowest':>10}")
    for kind in [*dict.fromkeys(r.kind for r in results), "all"]:
        these = [r for r in results if kind in ("all", r.kind)]
        count = Counter(r.ended for r in these)
        ends = "".join(f"{count[end]:>9}" for end in ("success", "refused", "FAILED"))
        print(f"{kind:12}{len(these):>7}{ends}{max(r.seconds for r in these):>8.1f} s")
    return 1 if any(r.ended == "FAILED" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
