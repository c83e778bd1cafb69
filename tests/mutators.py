"""Random changes of a file: of JSON, bytes, encoding, name, a safetensors header or tensor, a chat template.

Each `in_` function changes the file at `path` and tells what it has done.
"""

import copy
import json
import random
from pathlib import Path

import chat_templates
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 0.5, -1.0, 1e-320, 1e-300, 1e300, -1e300]
PATTERNS = ["(((.*)*)*)*!", "(" * 5000 + ")" * 5000, "[", "(?P<x>", "q_proj|(", ".{99999999999999}", "(a|a)*b" * 20]
TEXTS = ["", " ", "x", "0", "nan", "true", "nf4", "llama", "float16", "\0", "é\u202e\n🐟", "x" * 20_000, "../x"]
TEXTS += PATTERNS
VALUES = [None, True, False, *NUMBERS, float("nan"), float("inf"), *TEXTS, [], [None], [[]], {}, {"": None}, {"x": 1}]
RAW = ["1e400", "9" * 5000, "[" * 100_000, '{"a":' * 100_000, '"\\ud800"', "01", "{", "", "\xff", '0, "a": 1, "a": 2']
MARK = "raw text {} of a mutation"


def mutated_json(rng: random.Random, text: str) -> tuple[str, str]:
    """JSON with one to three changes, which may no longer be JSON; and what they are."""
    try:
        root, said = {"": json.loads(text)}, []
    except ValueError:
        root, said = {"": text}, []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key, path = root, "", ""
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < (0.75 if path else 0.95):
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
        case "nudged" if isinstance(value, int | float) and abs(value) < 1e300:
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
