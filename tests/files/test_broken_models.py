"""Faults in a model's files. Each gives one line that names the file and the tensor or field at fault, from
`Model.from_pretrained` and `load_tokenizer`, and from the commands, which exit with code 2 and write nothing.

    python tests/files/test_broken_models.py     prints every fault and its line
"""

import json
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import refqlora as rq
from refqlora.commands import main
from refqlora.text.tokenizer import load_tokenizer

Q = "model.layers.1.self_attn.q_proj.weight"  # (48, 40)
EMBEDDING = "model.embed_tokens.weight"  # (300, 40)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


# ---- how each is made: a function of the directory -------------------------------------------------------------


def each(*steps):
    return lambda d: [step(d) for step in steps]


def remove(name):
    return lambda d: (d / name).unlink()


def write(name, content):
    return lambda d: (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def fields(name="config.json", **changes):
    """Set fields of a JSON file; ... removes one."""

    def spoil(d):
        value = {**json.loads((d / name).read_text() if (d / name).exists() else "{}"), **changes}
        (d / name).write_text(json.dumps({key: x for key, x in value.items() if x is not ...}))

    return spoil


def tensors(changes, name=WEIGHTS):
    """Set tensors of a file; ... removes one."""
    return lambda d: save_file({k: x for k, x in (load_file(d / name) | changes).items() if x is not ...}, d / name)


def tensor(change, name=Q):
    """Change one tensor, in float32."""

    def spoil(d):
        found = load_file(d / WEIGHTS)
        save_file(found | {name: change(found[name].copy())}, d / WEIGHTS)

    return spoil


def put(value, at=(7, 3)):
    def change(x):
        x[at] = value
        return x

    return change


def cut(name, keep):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:keep])


def header(change, name=WEIGHTS):
    """Change the header's JSON text, or its dict."""

    def spoil(d):
        data = (d / name).read_bytes()
        length = 8 + struct.unpack("<Q", data[:8])[0]
        text = change(data[8:length])
        (d / name).write_bytes(struct.pack("<Q", len(text)) + text + data[length:])

    return spoil


def entry(**changes):
    """Change what the header says of Q."""

    def change(text):
        value = json.loads(text)
        value[Q] |= changes
        return json.dumps(value).encode()

    return header(change)


def shards(d):
    found = load_file(d / WEIGHTS)
    weight_map = {name: SHARDS[i % 3] for i, name in enumerate(sorted(found))}
    for shard in SHARDS:
        save_file({name: x for name, x in found.items() if weight_map[name] == shard}, d / shard)
    (d / WEIGHTS).unlink()
    (d / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def holder(d, name=Q):
    return d / json.loads((d / INDEX).read_text())["weight_map"][name]


def entries(**changes):
    """Change the index's weight_map; ... removes an entry."""

    def spoil(d):
        value = json.loads((d / INDEX).read_text())["weight_map"] | changes
        (d / INDEX).write_text(json.dumps({"weight_map": {k: x for k, x in value.items() if x is not ...}}))

    return spoil


def both_shards(d):
    """A tensor of one shard in another, too, under the same name."""
    other = next(shard for shard in SHARDS if d / shard != holder(d))
    save_file(load_file(d / other) | {Q: load_file(holder(d))[Q]}, d / other)


def another_shard(d):
    """The index says that Q is in another shard than it is."""
    entries(**{Q: next(shard for shard in SHARDS if d / shard != holder(d))})(d)


def more_tokens(d):
    value = load_tokenizer(d)  # not the one that the tests share
    value.add_tokens(["<|one too many|>"])
    value.save(str(d / "tokenizer.json"))


GEMMA = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}

FAULTS = {
    # what is wrong: how it is made, what the line names and says
    "an empty directory": (lambda d: [f.unlink() for f in d.iterdir()], ["model/config.json: no such file"]),
    "no config.json": (remove("config.json"), ["model/config.json: no such file"]),
    "an adapter's directory": (each(remove("config.json"), write("adapter_config.json", "{}")), ["model: expected a model, got an adapter"]),
    "llama.cpp's file alone": (each(remove("config.json"), write("model-q4.gguf", "GGUF")), ["model/model-q4.gguf: expected config.json and *.safetensors, got llama.cpp's format"]),
    "config.json a directory": (each(remove("config.json"), lambda d: (d / "config.json").mkdir()), ["config.json"]),
    "config.json empty": (write("config.json", ""), ["model/config.json: not valid JSON"]),
    "config.json cut short": (cut("config.json", 99), ["model/config.json: not valid JSON"]),
    "config.json not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), ["model/config.json: not valid JSON: 'utf-8'"]),
    "config.json in UTF-16": (write("config.json", "{}".encode("utf-16")), ["model/config.json: not valid JSON"]),
    "config.json a list": (write("config.json", "[]"), ["model/config.json: expected a JSON object, got list"]),
    "config.json nested without end": (write("config.json", "[" * 10**5), ["model/config.json", "nested too deeply"]),
    "a key of config.json twice": (write("config.json", '{"vocab_size": 1, "vocab_size": 2}'), ["model/config.json: not valid JSON: the key 'vocab_size' appears twice"]),
    **{
        f"{field} not there": (fields(**{field: ...}), [f'model/config.json: "{field}" is missing'])
        for field in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    },
    "an unknown architecture": (fields(model_type="mamba"), ["model/config.json: model_type: 'mamba' is not supported; supported: \"llama\""]),
    "model_type a number": (fields(model_type=3), ["model/config.json: model_type: expected text, got 3"]),
    "an unknown activation": (fields(hidden_act="relu"), ["model/config.json: hidden_act: 'relu' is not supported; supported: \"silu\""]),
    "an unknown RoPE": (fields(rope_parameters={"rope_type": "spiral"}), ["model/config.json: ", "spiral"]),
    "RoPE parameters a list": (fields(rope_parameters=[1]), ["model/config.json: rope_parameters: expected an object, got [1]"]),
    "quantised already, gptq": (fields(quantization_config={"quant_method": "gptq", "bits": 4}), ["model/config.json: ", "quanti"]),
    "quantised already, awq": (fields(quantization_config={"quant_method": "awq", "bits": 4}), ["model/config.json: ", "quanti"]),
    "vocab_size text": (fields(vocab_size="300"), ["model/config.json: vocab_size: expected a whole number from 1 to 2147483647, got '300'"]),
    "vocab_size negative": (fields(vocab_size=-300), ["model/config.json: vocab_size: expected a whole number from 1 to"]),
    "vocab_size huge": (fields(vocab_size=10**30), ["model/config.json: vocab_size: expected a whole number from 1 to"]),
    "hidden_size a fraction": (fields(hidden_size=40.0), ["model/config.json: hidden_size: expected a whole number from 1 to"]),
    "intermediate_size true": (fields(intermediate_size=True), ["model/config.json: intermediate_size: expected a whole"]),
    "num_hidden_layers huge": (fields(num_hidden_layers=10**9), ["model/config.json: num_hidden_layers: expected a whole number from 1 to 9999"]),
    "num_hidden_layers many": (fields(num_hidden_layers=9999), ["model: model.layers.2.self_attn.q_proj.weight (48, 40) is missing"]),
    "num_attention_heads zero": (fields(num_attention_heads=0), ["model/config.json: num_attention_heads: expected a whole"]),
    "num_attention_heads a list": (fields(num_attention_heads=[6]), ["model/config.json: num_attention_heads: expected a whole"]),
    "num_key_value_heads uneven": (fields(num_key_value_heads=4), ["model/config.json: 6 query heads cannot share 4"]),
    "head_dim odd": (fields(head_dim=7), ["model/config.json: head_dim: expected an even number for RoPE, got 7"]),
    "max_position_embeddings negative": (fields(max_position_embeddings=-1), ["model/config.json: max_position_embeddings: expected"]),
    "rms_norm_eps zero": (fields(rms_norm_eps=0), ["model/config.json: rms_norm_eps: expected a number from 1e-30 to 1e+30, got 0"]),
    "rms_norm_eps NaN": (fields(rms_norm_eps=float("nan")), ["model/config.json: rms_norm_eps: expected a number from 1e-30 to 1e+30, got nan"]),
    "rope_theta huge": (fields(rope_theta=10**400), ["model/config.json: rope_theta: expected a number from 1e-30 to 1e+30, got 1000"]),
    **{
        f"{field} an integer of 400 digits": (fields(**{field: 10**400}), [f"model/config.json: {field}: expected a number from", ", got 1000"])
        for field in ("rms_norm_eps", "rope_theta")
    },
    **{
        f"RoPE's {field} {name}": (
            fields(rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, field: value}),
            [f"model/config.json: {field}: expected a "],
        )
        for field in ("factor", "attention_factor", "rope_theta", "original_max_position_embeddings")
        for name, value in {"huge": 10**400, "tiny": 1e-320, "text": "x", "a list": [1]}.items()
    },
    "RoPE's type a list": (fields(rope_parameters={"rope_type": [1]}), ["model/config.json: rope_type: expected text, got [1]"]),
    "RoPE of infinite frequencies": (fields(rope_theta=1e-30, max_position_embeddings=2**31 - 1, rope_scaling={"rope_type": "linear", "factor": 1e-9}, rope_parameters=...), ["model/config.json: rope_scaling: expected numbers that give finite frequencies, got {'rope_theta': 1e-30, 'rope_type'"]),
    "YaRN of theta 1": (fields(rope_theta=1, rope_scaling={"rope_type": "yarn", "factor": 2.0}, rope_parameters=...), ["model/config.json: rope_scaling: expected numbers that give finite"]),
    "a softcap huge": (fields(**GEMMA, final_logit_softcapping=10**400), ["model/config.json: final_logit_softcapping: expected a number from 1e-30 to 1e+30, got 1000"]),
    "head_dim huge": (fields(head_dim=2**40), ["model/config.json: head_dim: expected a whole number from 1 to 65536, got 1099511627776"]),
    "hidden_size huge": (fields(hidden_size=2**31 - 1, num_attention_heads=1, head_dim=...), ["model/config.json: head_dim: expected a whole number from 1 to 65536"]),
    "layer_types a list of lists": (fields(**GEMMA, layer_types=[[], {}]), ["model/config.json: layer_types: expected 2 times"]),
    "pad_token_id text": (fields(pad_token_id="x"), ["model/config.json: pad_token_id: expected a whole number from"]),
    "a long value": (fields(vocab_size="x" * 10**5), ["model/config.json: vocab_size: expected a whole number from 1 to 2147483647, got 'xxx", "xxx..."]),
    "tie_word_embeddings text": (fields(tie_word_embeddings="false"), ["model/config.json: tie_word_embeddings: expected true or false, got 'false'"]),
    "attention_bias a number": (fields(attention_bias=1), ["model/config.json: attention_bias: expected true or false, got 1"]),
    "eos_token_id text": (fields(eos_token_id="</s>"), ["model/config.json: eos_token_id: expected a token or a list of tokens, got"]),
    "generation_config.json broken": (write("generation_config.json", "{"), ["model/generation_config.json: not valid JSON"]),
    "generation_config.json, eos_token_id": (fields("generation_config.json", eos_token_id=[1, "2"]), ["model/generation_config.json: eos_token_id: expected a token or a list of tokens, got"]),
    "no weights": (remove(WEIGHTS), ["model/model.safetensors: no such file"]),
    "weights pickled, .bin": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), ["model/pytorch_model.bin: pickled files are never opened", "save_pretrained(OUT)"]),
    "weights pickled, .pth": (lambda d: (d / WEIGHTS).rename(d / "consolidated.00.pth"), ["model/consolidated.00.pth: pickled files are never opened"]),
    "weights empty": (cut(WEIGHTS, 0), ["model/model.safetensors: not a valid safetensors file: 0 bytes cannot"]),
    "weights cut in the header": (cut(WEIGHTS, 300), ["model/model.safetensors: not a valid safetensors file: 300 bytes cannot hold a header"]),
    "weights cut in the data": (cut(WEIGHTS, -1), ["model/model.safetensors: not a valid safetensors file: its tensors end at byte"]),
    "weights something else": (write(WEIGHTS, b"PK\x03\x04" + bytes(99)), ["model/model.safetensors: not a valid safetensors file"]),
    "weights a page of HTML": (write(WEIGHTS, "<!DOCTYPE html>" * 9), ["model/model.safetensors: not a valid safetensors file"]),
    "weights a Git LFS pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), ["model/model.safetensors: not a valid safetensors file"]),
    "a header of 2^63 bytes": (write(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), ["model/model.safetensors: not a valid"]),
    "a header not JSON": (header(lambda text: text[:-9]), ["model/model.safetensors: not a valid safetensors file"]),
    "a header not UTF-8": (header(lambda text: text.replace(b"q_proj", b"q\xff\xffroj")), ["model/model.safetensors: not a valid", "utf-8"]),
    "a name twice in a header": (header(lambda text: text.replace(b"layers.0.self_attn.q", b"layers.1.self_attn.q")), [WEIGHTS, f"the key '{Q}' appears twice"]),
    "a shape that is a lie": (entry(shape=[48, 41]), ["model/model.safetensors", f"{Q}, float32 of shape (48, 41), takes the bytes"]),
    "a shape that is huge": (entry(shape=[10**9, 10**9]), ["model/model.safetensors", f"{Q} has shape [1000000000, 1000000000]"]),
    "a shape that is negative": (entry(shape=[-48, -40]), ["model/model.safetensors", f"{Q} has shape [-48, -40]"]),
    "offsets past the end": (entry(data_offsets=[0, 10**12]), ["model/model.safetensors", "float32"]),
    "offsets backwards": (entry(data_offsets=[9, 3]), ["model/model.safetensors", "float32"]),
    "a dtype that is a lie": (entry(dtype="BF16"), ["model/model.safetensors", f"{Q}, bfloat16 of shape (48, 40), takes the bytes"]),
    "a tensor in fp8": (tensor(lambda x: x.astype(ml_dtypes.float8_e4m3fn)), [f"model/model.safetensors: {Q} is float8_e4m3fn, expected one of float16, bfloat16"]),
    "a tensor in fp4": (entry(dtype="F4"), [f"model/model.safetensors: {Q} is 'F4', expected one of F64"]),
    "a tensor in complex": (entry(dtype="C64"), [f"model/model.safetensors: {Q} is 'C64', expected one of F64"]),
    "a tensor in int8": (tensor(lambda x: x.astype(np.int8)), [f"model/model.safetensors: {Q} is int8, expected one of float16, bfloat16"]),
    "a tensor in bool": (tensor(lambda x: x > 0), [f"model/model.safetensors: {Q} is bool, expected one of float16"]),
    "a tensor missing": (tensors({Q: ...}), [f"model: {Q} (48, 40) is missing"]),
    "a tensor unexpected": (tensors({"model.layers.0.extra.weight": np.zeros(3, np.float32)}), ["model: model.layers.0.extra.weight is not expected"]),
    "a tensor of another name": (header(lambda text: text.replace(b"layers.1.self_attn.q", b"layers.1.self_attn.x")), [f"model: {Q} (48, 40) is missing"]),
    "a name of two lines": (tensors({"two\nlines": np.zeros(3, np.float32)}), ["is not expected in this model"]),
    "a tensor transposed": (tensor(lambda x: np.ascontiguousarray(x.T)), [f"model: {Q} has shape (40, 48), expected (48, 40)"]),
    "a tensor flat": (tensor(lambda x: x.reshape(-1)), [f"model: {Q} has shape (1920,), expected (48, 40)"]),
    "no head": (tensors({"lm_head.weight": ...}), ["model: lm_head.weight (300, 40) is missing"]),
    "a head that is not tied": (fields(tie_word_embeddings=True), ["model: lm_head.weight differs from the embedding"]),
    "a NaN to quantise": (tensor(put(np.nan)), [f"model: {Q}: expected finite numbers, got nan at (7, 3)"]),
    "an inf to quantise": (tensor(put(-np.inf)), [f"model: {Q}: expected finite numbers, got -inf at (7, 3)"]),
    "a NaN in a norm": (tensor(put(np.nan, 3), "model.norm.weight"), ["model: model.norm.weight: expected finite numbers, got nan at (3,)"]),
    "an inf in an embedding": (tensor(put(np.inf), EMBEDDING), [f"model: {EMBEDDING}: expected finite numbers, got inf at (7, 3)"]),
    "a NaN in bfloat16": (tensor(lambda x: put(np.nan)(x).astype(ml_dtypes.bfloat16)), [f"model: {Q}: expected finite numbers, got nan at (7, 3)"]),
    "shards without an index": (each(shards, remove(INDEX)), [f"model/{INDEX}: no such file"]),
    "index broken": (each(shards, cut(INDEX, 50)), [f"model/{INDEX}: not valid JSON"]),
    "index without a map": (each(shards, write(INDEX, "{}")), [f'model/{INDEX}: expected a "weight_map"']),
    "index with an empty map": (each(shards, write(INDEX, '{"weight_map": {}}')), [f'model/{INDEX}: expected a "weight_map"']),
    "index to numbers": (each(shards, entries(**{Q: 3})), [f'model/{INDEX}: expected a "weight_map"']),
    "index with a name twice": (each(shards, write(INDEX, f'{{"weight_map": {{"{Q}": "a", "{Q}": "b"}}}}')), [f"model/{INDEX}: not valid JSON: the key '{Q}' appears twice"]),
    "index to elsewhere": (each(shards, entries(**{Q: "../model/" + SHARDS[0]})), [f"model/{INDEX}: weight_map: expected safetensors files beside it, got '../model/{SHARDS[0]}'"]),
    "index to a pickle": (each(shards, entries(**{Q: "pytorch_model.bin"})), ["model/pytorch_model.bin: pickled files are never opened"]),
    "index to a missing shard": (each(shards, lambda d: holder(d).unlink()), ["-of-00003.safetensors: no such file"]),
    "index to another shard": (each(shards, another_shard), ["-of-00003.safetensors: ", Q, INDEX]),
    "index without a tensor": (each(shards, entries(**{Q: ...})), [f"contains {Q}, which {INDEX} does not name"]),
    "index with a tensor too many": (each(shards, entries(phantom=SHARDS[1])), [f"model/{SHARDS[1]}: phantom is missing, although {INDEX} names it"]),
    "a tensor in two shards": (each(shards, both_shards), [f"contains {Q}, which"]),
    "a shard cut short": (each(shards, cut(SHARDS[1], -1)), [f"model/{SHARDS[1]}: not a valid safetensors file"]),
}  # fmt: skip
TOKENIZER_FAULTS = {
    "no tokenizer.json": (remove("tokenizer.json"), ["model/tokenizer.json"]),
    "tokenizer.json empty": (write("tokenizer.json", ""), ["model/tokenizer.json: the tokenizers library cannot read it"]),
    "tokenizer.json broken": (write("tokenizer.json", '{"model": {}}'), ["model/tokenizer.json: the tokenizers library cannot read it"]),
    "tokenizer.json not UTF-8": (write("tokenizer.json", b'{"\xff": 1}'), ["model/tokenizer.json: the tokenizers library cannot read it"]),
    "more tokens than the embedding": (more_tokens, ["model/tokenizer.json: '<|one too many|>' is token 300, but the model has only 300 tokens"]),
}  # fmt: skip
COMMANDS = {
    "generate": ["generate", "--model", "model", "--prompt", "sacks"],
    "finetune": [
        "finetune",
        "--model",
        "model",
        "--data",
        "text.txt",
        "--max-length",
        "16",
        "--steps",
        "1",
        "--out",
        "out",
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a good model and a text; nothing downloads."""
    tiny.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(place):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(place.rglob("*"))}


def call(argv):
    try:
        return main(argv)
    except SystemExit as end:
        return end.code


def lines(command, capsys):
    """What the command says where it must fail: one line, and no trace."""
    assert call(COMMANDS[command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"refqlora {command}: [^\n]+\n", err), err
    assert "Traceback" not in err
    return err


def test_the_good_model_is_good(place, capsys):
    """Without a fault, the same commands go through."""
    for argv in COMMANDS.values():
        assert call(argv) == 0
    shards(place / "model")
    assert call(COMMANDS["generate"]) == 0


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_a_broken_model_is_refused(spoil, said, place, capsys):
    spoil(place / "model")
    before = tree(place)
    with pytest.raises((ValueError, OSError)) as error:
        rq.Model.from_pretrained(place / "model", quantize="nf4")
    for message in (str(error.value), *(lines(command, capsys) for command in COMMANDS)):
        assert "model" in message
        for part in said:
            assert part in message
    assert tree(place) == before


@pytest.mark.parametrize(("spoil", "said"), TOKENIZER_FAULTS.values(), ids=TOKENIZER_FAULTS)
def test_a_broken_tokenizer_is_refused(spoil, said, place, capsys):
    spoil(place / "model")
    before = tree(place)
    with pytest.raises((ValueError, OSError)) as error:
        load_tokenizer(place / "model", vocab_size=300)
    for message in (str(error.value), *(lines(command, capsys) for command in COMMANDS)):
        for part in said:
            assert part in message
    assert tree(place) == before


@pytest.mark.parametrize("name", ["text.txt", "model/model.safetensors", "model/config.json"])
def test_a_file_for_a_directory(name, place, capsys):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a directory with config\.json"):
        rq.Model.from_pretrained(place / name)
    for command, argv in COMMANDS.items():
        assert call([name if word == "model" else word for word in argv]) == 2
        assert re.fullmatch(
            rf"refqlora {command}: {re.escape(name)}: expected a directory with [^\n]+\n", capsys.readouterr().err
        )


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_a_file_that_may_not_be_read(name, monkeypatch, capsys):
    """As an ordinary user, whom root becomes for as long as it takes."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is for its user alone
        os.chmod(directory, 0o755)
        model = tiny.save(Path(directory) / "model")
        (model / name).chmod(0)
        monkeypatch.chdir(directory)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=re.escape(name)):
                (load_tokenizer if name == "tokenizer.json" else rq.Model.from_pretrained)(model)
            message = lines("generate", capsys)
        finally:
            os.seteuid(user)
    assert f"model/{name}: Permission denied" in message


def print_all():
    """Each fault and its line from `refqlora generate`."""
    for name, (spoil, _) in {**FAULTS, **TOKENIZER_FAULTS}.items():
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            tiny.save(Path("model"))
            spoil(Path("model"))
            print(f"{name}\n    ", end="", flush=True)
            sys.stderr = sys.stdout
            main(COMMANDS["generate"])
            os.chdir("/")


if __name__ == "__main__":
    print_all()
