"""Sampling: greedy is the argmax of whole forwards, draws follow the softmax, and text comes out whole."""

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import refqlora as rq
from refqlora.data import END_OF_TEXT
from refqlora.generation import complete, generate, sample, stream
from refqlora.kv_cache import KVCache

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
    """Random, with logits of order one."""
    model = rq.Model.from_config(tiny.config(), 2, np.float64)
    model.params["lm_head.weight"] *= 12
    return model


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


def kept_by_definition(p, top_k, top_p):
    """The distribution that is sampled from, a token at a time from the most probable."""
    kept, total, expected = 0, 0.0, np.zeros_like(p)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    mass = sum(p[i] for i in ranked)
    for i in ranked:
        if kept and total >= top_p:
            break
        expected[i], total, kept = p[i], total + p[i] / mass, kept + 1
    return expected / expected.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.6), (1000, 1.0), (0, 0.999)])
def test_draws_follow_the_softmax(temperature, top_k, top_p):
    """4000 draws: chi-square within 6 standard deviations of its mean, and nothing that was cut off."""
    draws, rng = 4000, np.random.default_rng(0)
    logits = np.random.default_rng(1).normal(0, 1.5, 20).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / temperature)
    expected = kept_by_definition(p / p.sum(), top_k, top_p)
    counts = np.bincount([sample(logits, temperature, top_k, top_p, rng) for _ in range(draws)], minlength=20)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    wanted = draws * expected[possible]
    freedom = possible.sum() - 1
    assert ((counts[possible] - wanted) ** 2 / wanted).sum() < freedom + 6 * (2 * freedom) ** 0.5
    if (top_k, top_p) == (0, 1.0):  # the test can fail: at another temperature it does
        other = p**0.5 / (p**0.5).sum()
        assert ((counts - draws * other) ** 2 / (draws * other)).sum() > freedom + 6 * (2 * freedom) ** 0.5


def test_the_fewest_that_reach_top_p():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    for top_p, expected in [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 2}), (1.0, {0, 1, 2, 3})]:
        rng = np.random.default_rng(0)
        assert {sample(logits, 1.0, 0, top_p, rng) for _ in range(300)} == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_huge_logits_overflow_nothing(temperature):
    logits = np.array([-3e38, 3e38, 0.0], np.float32)
    assert sample(logits.astype(np.float64), temperature, 0, 1.0, np.random.default_rng(0)) == 1


# ---- where it ends ----


def test_a_stop_token_ends_it_and_is_not_given(model):
    free = tokens(model, max_new_tokens=30)
    for stop in (free[4], free[0]):
        assert tokens(model, max_new_tokens=30, stop=(999, stop)) == free[: free.index(stop)]
    assert tokens(model, max_new_tokens=30, stop=(None,)) == free
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
        ([], {}, "the prompt holds no token"),
        ([1] * 64, {}, "the prompt's 64 tokens fill the model's context of 64"),
        ([300], {}, "token 300 is outside the vocabulary of 300"),
        ([-1], {}, "token -1 is outside"),
        (PROMPT, {"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        (PROMPT, {"temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        (PROMPT, {"top_k": -1}, "top_k must be 0 or more .*-1"),
        (PROMPT, {"top_p": 0.0}, r"top_p in \(0, 1\]"),
        (PROMPT, {"top_p": 1.1}, r"top_p in \(0, 1\]"),
        (PROMPT, {"top_p": float("nan")}, r"top_p in \(0, 1\]"),
    ],
)
def test_what_cannot_be_generated_from_is_refused(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        tokens(model, prompt, **options)


def test_the_cache_says_when_it_is_full():
    kv = KVCache(tiny.config(), 1, 3)
    k = np.ones((1, 2, 3, 8), np.float32)
    keys, values = kv.extend(0, k, 2 * k)
    assert keys.shape == values.shape == (1, 2, 3, 8)
    kv.length = 2
    with pytest.raises(ValueError, match="the cache holds 3 positions, 4 were asked for"):
        kv.extend(0, k, k)


# ---- text ----


def speak(monkeypatch, ids):
    """Make generation yield these tokens, whatever the model."""
    monkeypatch.setattr("refqlora.generation.generate", lambda model, prompt, **options: iter(ids))


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
    pieces = list(stream(None, tokenizer, "The mill ë"))
    assert "".join(pieces) == complete(None, tokenizer, "The mill ë") == text
    if UNKNOWN not in text:
        assert [piece for piece in pieces if piece] == list(text)


BROKEN = [b"\xf0\x9f\x90", b"a\xe2\x86", b"\xff\xfeb", b"\xe2\x28\xa1", b"\x80", b"\xc3\xc3\xa9\xf0"]


@pytest.mark.parametrize("cut", BROKEN)
def test_broken_characters_come_out_as_they_are_decoded(cut, monkeypatch):
    """Cut off by the end, or never meant to be text: nothing of it is held back for good."""
    tokenizer = tiny.tokenizer()
    speak(monkeypatch, bytes_as_tokens(tokenizer, cut))
    pieces = list(stream(None, tokenizer, "The mill"))
    assert "".join(pieces) == complete(None, tokenizer, "The mill") == cut.decode(errors="replace")


@pytest.mark.parametrize("seed", range(8))
def test_stream_is_complete_in_pieces(unsure, seed):
    """A random model speaks random tokens, bytes of broken characters among them."""
    tokenizer = tiny.tokenizer()
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": seed}
    ids = tokens(unsure, tokenizer.encode("The mill").ids, **options)
    expected = tokenizer.decode(ids)
    assert UNKNOWN in expected
    pieces = list(stream(unsure, tokenizer, "The mill", **options))
    assert "".join(pieces) == complete(unsure, tokenizer, "The mill", **options) == expected
    assert len(pieces) > 20


def test_special_tokens_are_no_text(monkeypatch):
    tokenizer = tiny.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    speak(monkeypatch, [end, *tokenizer.encode("sacks").ids, end])
    assert complete(None, tokenizer, END_OF_TEXT + "two") == "sacks"


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
    assert list(stream(None, tokenizer, "two")) == [" sacks", "ë", " two", "s", ""]
    assert complete(None, tokenizer, "two") == " sacksë twos"
