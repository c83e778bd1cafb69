"""`refqlora parity`: every recording, every check live if its libraries are installed, planted errors, the command."""

import json
import re

import numpy as np
import pytest

from refqlora.commands import main
from refqlora.files.reading import read_metadata
from refqlora.model import Model
from refqlora.parity import checks, decoders
from refqlora.parity.checks import CHECKS, DIFFERS, FAILED, OK, RECORDED, SKIPPED, VECTORS, Check, read_recorded
from refqlora.parity.differences import Outcome, differing, relative_difference
from refqlora.parity.settings import ADAPTERS, ARCHITECTURES, sizes

BY_NAME = {check.name: check for check in CHECKS}
TRAINED = [name for name in BY_NAME if BY_NAME[name].compare in (decoders.compare_decoder, decoders.compare_training)]


def libraries():
    for name in ("torch", "transformers", "peft", "bitsandbytes", "torchao"):
        pytest.importorskip(name)


# ---- the table ---------------------------------------------------------------------------------------------


def test_every_check_has_a_name_of_its_own_and_all_architectures_and_adapters_are_in():
    assert len(BY_NAME) == len(CHECKS)
    assert {*ARCHITECTURES, *ADAPTERS} <= BY_NAME.keys()


@pytest.mark.parametrize("weights", [0, 10_000, 1_000_000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_two_sizes_of_a_model_are_equal(architecture, weights):
    given = sizes(weights, ARCHITECTURES[architecture][0])
    h, heads, kv = given.get("head_dim", 0), given["num_attention_heads"], given.get("num_key_value_heads", 0)
    found = [given["hidden_size"], given["vocab_size"], given.get("intermediate_size", given.get("n_inner"))]
    found += [heads, decoders.batch()[0].shape[0], decoders.batch()[0].shape[1]]
    found += [h, kv, h * heads, h * kv] if h else []
    assert len(set(found)) == len(found)


# ---- recorded ----------------------------------------------------------------------------------------------


def test_the_recordings_are_small_and_say_where_they_come_from():
    assert VECTORS.stat().st_size + RECORDED.stat().st_size < 1_400_000
    for path in (VECTORS, RECORDED):
        metadata = read_metadata(path)
        assert {"torch", "transformers", "peft", "bitsandbytes", "torchao", "numpy", "seed", "machine"} <= set(metadata)
        assert not re.search(rb"/(tmp|home|root|work)/", path.read_bytes())


@pytest.mark.parametrize("name", BY_NAME)
def test_recorded(name):
    line = checks.run(BY_NAME[name], recorded=True)
    if BY_NAME[name].record is None:
        assert line.status == SKIPPED
        assert "no recording" in line.note
    else:
        assert line.status == OK, str(line)
        assert "against recorded " in str(line)
        assert line.elements > 0


@pytest.mark.parametrize("name", TRAINED)
def test_recorded_in_float64(name):
    """What remains is the rounding of float32 on their side."""
    outcome = BY_NAME[name].compare(read_recorded(BY_NAME[name]), np.float64)
    assert max(outcome.parts.values()) < 1e-5, outcome


@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].record])
def test_one_element_off_shows(name):
    """In each kind of tensor that was observed and is compared."""
    check = BY_NAME[name]
    observed = read_recorded(check)
    given = ("model", "adapter", "tokens", "labels", "start", "w", "4bit/", "8bit/", "lora", "config", "adapter_config")
    kinds = {key.split("/")[0]: key for key in observed if not key.startswith(given)}
    if check.record == VECTORS:
        kinds = {
            "codebooks": {"codebook": "codebook/nf4"},
            "packing": {p: f"4bit/odd/nf4/64/{p}" for p in ("packed", "absmax")},
            "dequantisation": {"back": "4bit/odd/nf4/64/dequantised"},
            "constants-binned": {p: f"8bit/ordinary/{p}" for p in ("binned", "nested_absmax", "back")},
            "constants-nearest": {"nested": "8bit/ordinary/nested_absmax", "offset": "8bit/ordinary/offset"},
        }[name]
    if name == "dequantised-rows":
        kinds = {"packed": "4bit/rows/nf4/64/packed"}
    assert kinds
    for key in kinds.values():
        x = observed[key].copy()
        at = np.unravel_index(np.abs(x.astype(np.float64)).argmax(), x.shape)
        x[at] = x[at] ^ 1 if x.dtype.kind == "u" else x[at] * x.dtype.type(1.001)
        if name == "dequantised-rows":  # theirs is only counted: it is said in the note
            assert f"wrong constant for 1 of {x.size * 2:,}" in check.compare(observed | {key: x}).note
            continue
        outcome = check.compare(observed | {key: x})
        assert max(outcome.parts.values()) > check.bound, key


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
def test_a_planted_error_of_ours_shows(part, monkeypatch):
    """One element of one matrix of the adapter, off by a thousandth, once it is loaded."""
    load_adapter = Model.load_adapter

    def wrong(self, *args):
        load_adapter(self, *args)
        self.trainable()[f"model.layers.0.{part}.lora_A.weight"][1, 2] += 1e-3

    monkeypatch.setattr(Model, "load_adapter", wrong)
    line = checks.run(BY_NAME["llama"], recorded=True)
    assert line.status == DIFFERS
    assert "most in" in line.note


# ---- live --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_live(name):
    libraries()
    line = checks.run(BY_NAME[name], seed=3, size=20_000)
    assert line.status == OK, str(line)
    assert " live ·" in str(line)


def test_another_seed_gives_other_tensors():
    libraries()
    for name in ("packing", "llama"):
        one, same, other = (BY_NAME[name].observe(seed, 1000) for seed in (1, 1, 2))
        assert one.keys() == same.keys()
        assert all(np.array_equal(x, same[key]) for key, x in one.items())
        assert any(key not in other or not np.array_equal(x, other[key]) for key, x in one.items())


def test_the_recording_is_what_the_libraries_say():
    libraries()
    observed, recorded = BY_NAME["llama"].observe(0, 0), read_recorded(BY_NAME["llama"])
    assert observed.keys() == recorded.keys()
    for key, x in recorded.items():
        if x.dtype != np.uint8:  # the bytes of a config, which names versions
            assert relative_difference(observed[key], x) < 1e-5, key


# ---- one check ---------------------------------------------------------------------------------------------


def check(observe=lambda seed, size: {}, compare=lambda observed: Outcome({"x": 0.0}, 5), libraries=(), bound=1e-5):
    return Check("name", "what", libraries, bound, observe, compare, None)


def boom(*_):
    raise RuntimeError("two\nlines")


def test_a_crash_is_a_line():
    pytest.importorskip("torch")
    for broken in (check(observe=boom), check(compare=boom)):
        line = checks.run(broken)
        assert line.status == FAILED
        assert str(line).endswith("RuntimeError: two lines")


def test_a_library_that_is_not_there_is_a_line():
    line = checks.run(check(libraries=("no-such-library",)))
    assert line.status == SKIPPED
    assert line.note == "no-such-library is not installed (pip install 'refqlora[parity]')"


@pytest.mark.parametrize("largest", [2e-5, np.inf, np.nan])
def test_above_the_bound(largest):
    pytest.importorskip("torch")
    line = checks.run(check(compare=lambda observed: Outcome({"a": 0.0, "b": largest}, 5, "and so on")))
    assert line.status == DIFFERS
    assert line.note == "most in b; and so on"


def test_differences():
    zero = np.float32([0, 1, np.nan])
    assert differing(zero, np.float32([-0.0, 1, np.nan])).tolist() == []
    assert differing(zero, np.float32([0, np.nextafter(np.float32(1), np.float32(2)), 0])).tolist() == [1, 2]
    assert relative_difference([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert relative_difference([0.5], [0.0]) == 0.5
    assert relative_difference([np.nan], [1.0]) == np.inf
    for wrong in (np.zeros(3, np.float64), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match=r"expected float32 of shape \(3,\), got"):
            differing(wrong, zero)
    with pytest.raises(ValueError, match="b is missing"):
        relative_difference({"a": [1.0]}, {"a": [1.0], "b": [1.0]})
    with pytest.raises(ValueError, match="c is not expected"):
        relative_difference({"a": [1.0], "c": [1.0]}, {"a": [1.0]})


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command(capsys):
    assert main(["parity", "--recorded", *(f"--only={name}" for name in ("codebooks", "llama", "model-files"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["codebooks", "llama", "model-files"]
    assert re.fullmatch(
        r"codebooks +· .* against recorded bitsandbytes \S+ · 0 of 544 differ · no bit may · OK", lines[0]
    )
    assert re.fullmatch(r"llama +· .* against recorded .* · \d\.\de-\d\d · bound 1.0e-05 · OK", lines[1])
    assert lines[-1] == "OK; 2 of 3 checks agree, 1 skipped"


def test_json(capsys):
    assert main(["parity", "--recorded", "--only", "llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    (line,) = found["lines"]
    assert line["name"] == "llama"
    assert line["parts"].keys() == {"logits", "loss", "28 gradients"}
    assert line["largest"] == max(line["parts"].values()) < line["bound"]


def test_a_difference_is_exit_code_1(capsys, monkeypatch):
    broken = {key: x * 2 if key.endswith("loss") else x for key, x in read_recorded(BY_NAME["llama"]).items()}
    monkeypatch.setattr(checks, "read_recorded", lambda check: broken)
    assert main(["parity", "--recorded", "--only", "llama"]) == 1
    assert "DIFFERS: most in loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "llamas"], "--only: expected one of codebooks, "),
        (["--size", "huge"], "--size: expected small (100,000), medium (1,000,000), large (20,000,000) or a number"),
        (["--size", "0"], "--size"),
        (["--seed", "-1"], "--seed"),
        (["--recorded", "--seed", "1"], "--recorded excludes --against"),
        (["--recorded", "--size", "small"], "--recorded excludes --against"),
        (["--recorded", "--against", "x"], "--recorded excludes --against"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(["parity", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
