"""A text that begins like the last one is read from where they differ, with the logits of a full forward."""

import numpy as np
import pytest
import tiny

import refqlora as rq
from refqlora.text import prefix_cache
from refqlora.text.generation import generate
from refqlora.text.prefix_cache import PrefixCache

PROMPT = [5, 9, 250, 31, 7]


@pytest.fixture
def unsure():
    return tiny.unsure()


def tokens(model, prompt=PROMPT, **options):
    return list(generate(model, prompt, **options))


class Counted(PrefixCache):
    """A cache that notes how many positions the model read for each logits."""

    def __init__(self, model):
        super().__init__(model)
        self.read = []

    def logits(self, tokens):
        forward, positions = self.model.forward, []
        self.model.forward = lambda t, **kw: positions.append(t.shape[1]) or forward(t, **kw)
        try:
            return super().logits(tokens)
        finally:
            del self.model.forward
            self.read.append(sum(positions))


def whole(model, tokens):
    return model.forward(np.array([tokens]))[0][0, -1]


def test_what_a_text_shares_with_the_last_is_not_read_again(unsure):
    cache = Counted(unsure)
    texts = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 7, 8], [1, 2, 7], [1, 2, 7], [9], [9, 1, 2], [1, 9]]
    for text in texts:
        np.testing.assert_allclose(cache.logits(text), whole(unsure, text), rtol=0, atol=1e-12)
        assert cache.tokens == text
        assert cache.kv.length == len(text)
    assert cache.read == [3, 1, 2, 2, 1, 1, 1, 2, 2]


@pytest.fixture
def adapted(unsure):
    """With two adapters that change the output, none active."""
    for seed, name in enumerate(("a", "b")):
        unsure.add_adapter(name, rank=4, seed=seed)
        for p in unsure.trainable().values():
            p += np.random.default_rng(seed).normal(0, 0.05, p.shape)
    unsure.set_adapter(None)
    return unsure


def test_keys_of_another_adapter_are_not_used(adapted):
    cache, text = Counted(adapted), [1, 2, 3, 4, 5]
    found = {}
    for name in ("a", None, "b", "b", None, "a"):
        adapted.set_adapter(name)
        found[name] = cache.logits(text)
        np.testing.assert_allclose(found[name], whole(adapted, text), rtol=0, atol=1e-12)
    assert cache.read == [5, 5, 5, 1, 5, 5]
    assert all(abs(found[name] - found[None]).max() > 0.1 for name in ("a", "b"))


def test_an_adapter_loaded_anew_under_its_old_name_is_another(adapted):
    cache, text = PrefixCache(adapted), [1, 2, 3, 4, 5]
    adapted.set_adapter("a")
    cache.logits(text)
    del adapted.adapters["a"]
    adapted.add_adapter("a", rank=2)
    np.testing.assert_allclose(cache.logits(text), whole(adapted, text), rtol=0, atol=1e-12)


def test_the_adapter_may_change_while_it_speaks(adapted):
    adapted.set_adapter("a")
    expected = list(PROMPT)
    for name in [*"aaa", None, None, *"bbb"]:
        adapted.set_adapter(name)
        expected.append(int(whole(adapted, expected).argmax()))
    adapted.set_adapter("a")
    found, names = [], iter([*"aa", None, None, *"bbb", None])
    for token in generate(adapted, PROMPT, max_new_tokens=8):
        found.append(token)
        adapted.set_adapter(next(names))
    assert found == expected[len(PROMPT) :]


def test_a_stale_cache_would_be_seen(adapted):
    """The tests above can fail: with the other adapter's keys the logits are far off."""
    cache, text = PrefixCache(adapted), [1, 2, 3, 4, 5]
    adapted.set_adapter("a")
    cache.logits(text)
    adapted.set_adapter("b")
    cache.made_for = adapted.adapters["b"], cache.made_for[1]  # as if it had not changed
    assert abs(cache.logits(text) - whole(adapted, text)).max() > 0.1


def test_an_interrupted_forward_leaves_the_cache_right(unsure, monkeypatch):
    """Ctrl-C may come in any layer, when some have stored new positions and others have not."""
    cache = PrefixCache(unsure)
    cache.logits([1, 2, 3])
    for layer in range(unsure.config.layers):
        for when in ("before", "after"):
            extend = cache.kv.extend

            def interrupted(i, k, v, extend=extend, layer=layer, when=when):
                if when == "after":
                    extend(i, k, v)
                if i == layer:
                    raise KeyboardInterrupt
                return extend(i, k, v)

            monkeypatch.setattr(cache.kv, "extend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.logits([1, 2, 9, 9, 9, 9])
            monkeypatch.undo()
            for text in ([1, 2, 3, 4], [1, 2, 5]):
                np.testing.assert_allclose(cache.logits(text), whole(unsure, text), rtol=0, atol=1e-12)


def test_a_long_prompt_is_read_in_pieces(unsure, monkeypatch):
    text = list(range(1, 50))
    expected = whole(unsure, text)
    monkeypatch.setattr(prefix_cache, "AT_ONCE", 7)
    cache = Counted(unsure)
    seen, forward = [], unsure.forward
    monkeypatch.setattr(unsure, "forward", lambda t, **kw: seen.append(t.shape[1]) or forward(t, **kw), raising=False)
    np.testing.assert_allclose(PrefixCache(unsure).logits(text), expected, rtol=0, atol=1e-12)
    assert seen == [7] * 7
    del cache


WINDOW = {"windows": (4, None)}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 12}
LONGROPE = {"rope_scaling": {"rope_type": "longrope", "factor": 5.0, **FACTORS}}


@pytest.mark.parametrize("changes", [{}, WINDOW, LONGROPE, WINDOW | LONGROPE], ids=["", "window", "longrope", "both"])
@pytest.mark.parametrize("at_once", [3, 5, 256])
def test_windows_and_frequencies_that_change_with_the_length(changes, at_once, monkeypatch):
    """Beyond 12 tokens LongRoPE uses other frequencies: keys made before are useless, in both directions."""
    monkeypatch.setattr(prefix_cache, "AT_ONCE", at_once)
    model = rq.Model.from_config(tiny.config(**changes), 2, np.float64)
    model.params["lm_head.weight"] *= 12
    cache, text = Counted(model), list(range(1, 30))
    for n in (9, 11, 12, 13, 14, 29, 12, 5, 20):
        np.testing.assert_allclose(cache.logits(text[:n]), whole(model, text[:n]), rtol=0, atol=1e-12)
    anew = "rope_scaling" in changes
    assert cache.read == [9, 2, 1, 13 if anew else 1, 1, 15, 12 if anew else 1, 1, 20 if anew else 15]
    expected = list(PROMPT)
    for _ in range(20):
        expected.append(int(whole(model, expected).argmax()))
    assert tokens(model, max_new_tokens=20) == expected[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shared_cache_changes_no_token(unsure, temperature):
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
    cache, prompt = PrefixCache(unsure), list(PROMPT)
    for _ in range(3):  # turns of a conversation, each with the answer before
        answer = tokens(unsure, prompt, **options)
        assert tokens(unsure, prompt, cache=cache, **options) == answer
        prompt += [*answer[:8], 7, 7]
