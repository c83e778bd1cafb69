"""Generation: greedy is the argmax of full forwards, with or without a cache, and no character is broken."""

import json

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import refqlora as rq
from refqlora.text import generation
from refqlora.text.generation import complete, generate, generation_options, stream, until
from refqlora.text.sampling import Sampling
from refqlora.text.tokenizer import END_OF_TEXT

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
PROMPT = [5, 9, 250, 31, 7]


@pytest.fixture(scope="module")
def model():
    """Random, with a head so large that the next token is nearly certain, and varied."""
    model = rq.Model.from_config(tiny.config(), 2)
    for p in model.params.values():
        if p.ndim == 2:
            p *= 12
    return model


@pytest.fixture
def unsure():
    return tiny.unsure()


def tokens(model, prompt=PROMPT, **options):
    return list(generate(model, prompt, **options))


# ---- the definition ----


@pytest.mark.parametrize("quantize", [False, True])
def test_greedy_is_the_argmax_of_whole_forwards(model, quantize):
    if quantize:
        model = rq.Model(model.config, dict(model.params))
        model.quantize()
    expected = list(PROMPT)
    for _ in range(40):
        expected.append(int(model.forward(np.array([expected]))[0][0, -1].argmax()))
    found = tokens(model, max_new_tokens=40)
    assert found == expected[len(PROMPT) :]
    assert len(set(found)) > 20  # a model that says one thing over and over would hide a stale cache
    assert all(type(token) is int for token in found)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"top_k": 1, "temperature": 50.0}]
)
def test_what_leaves_one_choice_is_greedy(model, options):
    options = {"temperature": 1.0, "seed": 3, **options}
    assert tokens(model, max_new_tokens=30, **options) == tokens(model, max_new_tokens=30)


def test_the_seed_decides(unsure):
    options = {"temperature": 1.0, "max_new_tokens": 30}
    runs = [tokens(unsure, seed=seed, **options) for seed in (0, 1, 2)]
    assert len({tuple(run) for run in runs}) == 3
    assert tokens(unsure, seed=1, **options) == runs[1]
    assert tokens(unsure, seed=1, max_new_tokens=30) == tokens(
        unsure, seed=2, max_new_tokens=30
    )  # greedy draws nothing


def test_the_adapter_speaks_until_it_is_off(model):
    model = rq.Model(model.config, model.params)
    base = tokens(model)
    model.add_adapter(rank=4)
    assert tokens(model) == base
    for p in model.trainable().values():
        p += 0.1
    assert tokens(model) != base
    model.set_adapter(None)
    assert tokens(model) == base


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 20}, {"repetition_penalty": 1.5}])
def test_each_token_is_drawn_given_all_before_it(unsure, options):
    """The definition: a whole forward, the distribution given the whole text, one draw."""
    rng, how, expected = np.random.default_rng(5), Sampling(**options), list(PROMPT)
    for _ in range(30):
        logits, _ = unsure.forward(np.array([expected]))
        expected.append(how.draw(logits[0, -1], rng, expected))
    assert tokens(unsure, max_new_tokens=30, seed=5, **options) == expected[len(PROMPT) :]


# ---- where it ends ----


def test_a_stop_token_ends_it_and_is_not_given(model):
    free = tokens(model, max_new_tokens=30)
    for stop in (free[4], free[0]):
        assert tokens(model, max_new_tokens=30, stop=(999, stop)) == free[: free.index(stop)]
    assert tokens(model, max_new_tokens=30, stop=()) == free
    assert tokens(model, max_new_tokens=0) == []


def test_it_ends_where_the_context_ends(model):
    room = tiny.MAX_POSITIONS - len(PROMPT)
    free = tokens(model, max_new_tokens=room)
    assert len(free) == room
    assert tokens(model, max_new_tokens=10**12) == free
    assert len(tokens(model, prompt=[1] * (tiny.MAX_POSITIONS - 1))) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt: expected at least one token, got none"),
        ([1] * 64, {}, "the prompt's 64 tokens fill the model's context of 64"),
        ([300], {}, "300 is outside the vocabulary of 300"),
        ([-1], {}, "prompt: expected a whole number of 0 or more, got -1"),
        ([1.5], {}, "prompt: expected a whole number of 0 or more, got 1.5"),
        ("sacks", {}, "prompt: expected token ids, got 'sacks'"),
        (5, {}, "prompt: expected token ids, got 5"),
        (PROMPT, {"stop": 5}, "stop: expected token ids, got 5"),
        (PROMPT, {"stop": (None,)}, "stop: expected a whole number of 0 or more, got None"),
        (PROMPT, {"cache": 1}, "cache: expected a PrefixCache of this model, got 1"),
        (PROMPT, {"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number of 0 or more, got 1.5"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens: expected a whole number of 0 or more, got -1"),
        (PROMPT, {"seed": 1.5}, "seed: expected a whole number of 0 or more, got 1.5"),
        (PROMPT, {"seed": "x" * 1000}, "seed: expected a whole number of 0 or more, got 'x{56}\\.\\.\\.$"),
        (PROMPT, {"temperature": "x"}, "temperature: expected a number of 0 or more, got 'x'"),
        (PROMPT, {"temperature": -0.1}, "temperature: expected a number of 0 or more, got -0.1"),
        (PROMPT, {"temperature": float("nan")}, "temperature: expected a number of 0 or more, got nan"),
        (PROMPT, {"top_k": -1}, "top_k: expected a whole number of 0 or more, got -1"),
    ],
)
def test_what_cannot_be_generated_from_is_refused(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        tokens(model, prompt, **options)


# ---- text ----


def speak(monkeypatch, ids):
    """Make generation yield these tokens, whatever the model."""
    monkeypatch.setattr("refqlora.text.generation.generate", lambda model, prompt, **options: iter(ids))


def bytes_as_tokens(tokenizer, content):
    """One token for each byte: characters are broken over tokens wherever they can be."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes: themselves,
    others = [byte for byte in range(256) if byte not in printable]  # or for these the letters from 256 on
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [tokenizer.token_to_id(letters[byte]) for byte in content]


@pytest.mark.parametrize("text", ["Zoë naïve", "→🐟é", "日本語の文", "🏳️‍🌈!", "plain", "", f"a{UNKNOWN}b{UNKNOWN}"])
def test_pieces_are_whole_characters(text, monkeypatch):
    tokenizer = tiny.tokenizer()
    ids = bytes_as_tokens(tokenizer, text.encode())
    assert len(ids) == len(text.encode())
    speak(monkeypatch, ids)
    pieces = list(stream(None, "The mill ë", tokenizer=tokenizer))
    assert "".join(pieces) == complete(None, "The mill ë", tokenizer=tokenizer) == text
    if UNKNOWN not in text:
        assert [piece for piece in pieces if piece] == list(text)


BROKEN = [b"\xf0\x9f\x90", b"a\xe2\x86", b"\xff\xfeb", b"\xe2\x28\xa1", b"\x80", b"\xc3\xc3\xa9\xf0"]


@pytest.mark.parametrize("cut", BROKEN)
def test_broken_characters_come_out_as_they_are_decoded(cut, monkeypatch):
    """Cut off by the end, or never meant to be text: nothing of it is held back for good."""
    tokenizer = tiny.tokenizer()
    speak(monkeypatch, bytes_as_tokens(tokenizer, cut))
    pieces = list(stream(None, "The mill", tokenizer=tokenizer))
    assert "".join(pieces) == complete(None, "The mill", tokenizer=tokenizer) == cut.decode(errors="replace")


@pytest.mark.parametrize("seed", range(8))
def test_stream_is_complete_in_pieces(unsure, seed):
    """A random model speaks random tokens, bytes of broken characters among them."""
    tokenizer = tiny.tokenizer()
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": seed}
    ids = tokens(unsure, tokenizer.encode("The mill").ids, **options)
    expected = tokenizer.decode(ids)
    assert UNKNOWN in expected
    pieces = list(stream(unsure, "The mill", tokenizer=tokenizer, **options))
    assert "".join(pieces) == complete(unsure, "The mill", tokenizer=tokenizer, **options) == expected
    assert len(pieces) > 20


def test_special_tokens_are_not_text(monkeypatch):
    tokenizer = tiny.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    speak(monkeypatch, [end, *tokenizer.encode("sacks").ids, end])
    assert complete(None, END_OF_TEXT + "two", tokenizer=tokenizer) == "sacks"


def test_a_sentencepiece_word_keeps_its_space(monkeypatch):
    """Llama's first tokenizer writes a space as a word's first letter; its decoder strips the first one of a text."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁two", "▁sacks", "s", "<0xC3>", "<0xAB>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert tokenizer.encode("two").ids == [1]
    speak(monkeypatch, [2, 4, 5, 1, 3])
    assert tokenizer.decode([2, 4, 5, 1, 3]) == "sacksë twos"  # by itself it has lost its space
    assert list(stream(None, "two", tokenizer=tokenizer)) == [" sacks", "ë", " two", "s", ""]
    assert complete(None, "two", tokenizer=tokenizer) == " sacksë twos"


def test_a_prompt_may_be_tokens():
    tokenizer, model = tiny.tokenizer(), rq.Model.from_config(tiny.config(), 2)
    ids = tokenizer.encode("The mill").ids
    assert complete(model, ids, tokenizer=tokenizer, max_new_tokens=9) == complete(
        model, "The mill", tokenizer=tokenizer, max_new_tokens=9
    )


# ---- stop strings ----


def pieces_of(text, n):
    """Every way to cut a text into pieces, for a short one; else pieces of up to n characters."""
    if not text:
        return [[]]
    return [[text[:i], *rest] for i in range(1, min(n, len(text)) + 1) for rest in pieces_of(text[i:], n)]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("abcdef", ["cd", "abcdef"], "ab"),  # the first that is complete
        ("xabcd", ["bcd", "abcd"], "x"),  # of two at once the longer
        ("abab", ["abc"], "abab"),  # begun only
        ("abc", ["abc"], ""),
        ("user:\n", ["\n\n", "r:\n\n"], "user:\n"),
        ("a🐟🐟b", ["🐟b"], "a🐟"),
        ("abc", [], "abc"),
    ],
)
def test_nothing_of_a_stop_string_is_given_however_the_text_is_cut(text, stops, expected):
    for pieces in pieces_of(text, 6):
        given = ""
        for piece in until(iter(pieces), stops):
            given += piece
            assert expected.startswith(given)
        assert given == expected


def test_text_is_given_as_soon_as_it_can_be():
    for text in ("abcd", "x\n\ny"):
        for n in range(1, len(text)):
            stops = [text[:n] + "?"]
            given = list(until(iter(text), stops))
            assert "".join(given) == text
            assert given[n:] == [text[: n + 1], *text[n + 1 :]]  # held back while it was the stop string's begin


@pytest.mark.parametrize("stop", ["🐟 of", "e", " sacks", "ë w", "🐟", "\n", "→"])
def test_stop_strings_across_tokens(stop, monkeypatch):
    """A token for each byte, so that both characters and stop strings are broken over tokens."""
    tokenizer = tiny.tokenizer()
    text = "Zoë went → the 🐟 of two sacks\nand"
    ids = bytes_as_tokens(tokenizer, text.encode())
    taken = []
    monkeypatch.setattr(generation, "generate", lambda m, p, **options: (taken.append(t) or t for t in ids))
    pieces = list(stream(None, "The mill", tokenizer=tokenizer, stop_strings=["nothing", stop]))
    assert "".join(pieces) == text[: text.index(stop)]
    assert UNKNOWN not in "".join(pieces)
    assert len(taken) == len((text[: text.index(stop)] + stop).encode())  # and it stops at once


def test_a_stop_string_in_the_prompt_stops_nothing(model):
    tokenizer = tiny.tokenizer()
    free = complete(model, "The mill", tokenizer=tokenizer, max_new_tokens=20)
    assert complete(model, "The mill", tokenizer=tokenizer, max_new_tokens=20, stop_strings=["The mill"]) == free
    assert (
        complete(model, "The mill", tokenizer=tokenizer, max_new_tokens=20, stop_strings=[free[8:10]])
        == free[: free.index(free[8:10])]
    )


def test_a_stop_string_of_nothing_is_refused(model):
    for stops in (["a", ""], "a", [5], 5, None):
        with pytest.raises(ValueError, match="stop_strings: expected a list of texts that are not empty"):
            stream(model, "The mill", tokenizer=tiny.tokenizer(), stop_strings=stops)


# ---- generation_config.json ----


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, {"temperature": 0.0}),
        ({}, {"temperature": 0.0}),
        ({"eos_token_id": 3, "temperature": 0.6, "top_k": None}, {"temperature": 0.0}),
        ({"eos_token_id": [3, 0], "do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "max_length": 4096},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1},
        ),
        ({"repetition_penalty": 1.1, "pad_token_id": 0}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)
def test_the_model_s_own_options(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert generation_options(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON object, got list"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token or a list of tokens, got '</s>'"),
        ({"eos_token_id": [1, None]}, r"eos_token_id: expected a token or a list of tokens, got \[1, None\]"),
        ({"do_sample": "yes"}, "do_sample: expected true or false, got 'yes'"),
        ({"temperature": True}, r"temperature: expected a number from 0 to 1e\+30, got True"),
        ({"do_sample": True, "temperature": -1}, r"temperature: expected a number from 0 to 1e\+30, got -1"),
        ({"top_k": 1.5}, "top_k: expected a whole number from 0 to .*, got 1.5"),
        ({"top_p": "0.9"}, "top_p: expected a number above 0 and at most 1, got '0.9'"),
        ({"top_p": 9}, "top_p: expected a number above 0 and at most 1, got 9"),
    ],
)
def test_a_bad_value_is_named_with_the_file(content, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        generation_options(tmp_path)


# ---- from text to text ----


def test_a_model_knows_its_tokenizer(tmp_path):
    model = rq.Model.from_pretrained(tiny.save(tmp_path))
    tokenizer = tiny.tokenizer()
    assert model.tokenizer.to_str() == tokenizer.to_str()
    expected = rq.complete(model, "The mill", tokenizer=tokenizer, max_new_tokens=9)
    assert rq.complete(model, "The mill", max_new_tokens=9) == expected
    with pytest.raises(ValueError, match="the model has no tokenizer, as it was not read from a directory"):
        rq.complete(rq.Model.from_config(tiny.config()), "The mill")


def test_options_are_checked_before_the_first_token(unsure):
    with pytest.raises(ValueError, match="seed: expected"):
        generate(unsure, PROMPT, seed=-1)
