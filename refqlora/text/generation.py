"""Generation: one token after the other, and text as soon as it is whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..backend import Array
from ..files.config_json import read_generation_config
from ..kv_cache import KVCache
from ..model import Model
from .sampling import Sampling

AT_ONCE = 256  # positions of a prompt that are read in one forward: it bounds the logits, (AT_ONCE, V), that are held


class PrefixCache:
    """A model, and the keys and values of the tokens it read last: what a text shares with them is not read again.

    They are the keys and values of one adapter. Whenever another one (or none, or one loaded anew) has become the
    model's active adapter, the text is read from its beginning; an adapter changed in place is not noticed. So it is
    where the text's length changes RoPE's frequencies (`Config.rope_regime`), up or down.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kv = KVCache(model.config, 1, model.config.max_positions, model.dtype)
        self.tokens: list[int] = []  # whose keys and values `kv` holds
        self.made_for: tuple[Any, int] | None = None  # the adapter and the regime of RoPE that they belong to

    def logits(self, tokens: Sequence[int]) -> Array:
        """tokens (at least one) -> the logits (V,) of what follows them."""
        n, regime = len(tokens), self.model.config.rope_regime
        adapter = self.model.adapters[self.model.active] if self.model.active is not None else None
        same = self.made_for is not None and self.made_for[0] is adapter and self.made_for[1] == regime(n)
        shared = shared_prefix(self.tokens, tokens[:-1]) if same else 0
        self.tokens, self.made_for = self.tokens[:shared], (adapter, regime(n))
        self.kv.truncate(shared)
        at_once = AT_ONCE if regime(min(n, shared + AT_ONCE)) == regime(n) else n  # all pieces are of one regime
        for start in range(shared, n, at_once):
            piece = tokens[start : start + at_once]
            logits, _ = self.model.forward(np.array([piece]), kv=self.kv)  # (1, T, V)
            self.tokens += piece
        return logits[0, -1]


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def generate(
    model: Model,
    prompt: Collection[int],
    *,
    max_new_tokens: int = 128,
    stop: Collection[int] = (),
    seed: int = 0,
    cache: PrefixCache | None = None,
    **sampling: float,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` (token ids, at least one), until one of `stop` or `max_new_tokens`.

    sampling: the fields of `Sampling`; greedy unless temperature is given. Each token costs one position, the keys
    and values of those before it being cached; a `cache` that is given again also saves what the prompt shares with
    the text before. It also ends where the model's context does. Raises ValueError for a prompt that leaves no room
    in it, or is empty, and for an option out of its range.
    """
    tokens = list(prompt)
    if not tokens:
        raise ValueError("the prompt holds no token")
    room = model.config.max_positions - len(tokens)
    if room < 1:
        raise ValueError(f"the prompt's {len(tokens)} tokens fill the model's context of {model.config.max_positions}")
    how = Sampling(**sampling)
    rng = np.random.default_rng(seed)
    cache = cache or PrefixCache(model)
    for _ in range(min(max_new_tokens, room)):
        token = how.draw(_on_cpu(cache.logits(tokens)), rng, tokens)
        if token in stop:
            return
        yield token
        tokens.append(token)


def _on_cpu(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def complete(model: Model, tokenizer: Tokenizer, prompt: str | Sequence[int], **options: Any) -> str:
    """`generate` from text to text: the continuation of `prompt`, which is not repeated."""
    return "".join(stream(model, tokenizer, prompt, **options))


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    stop_strings: Collection[str] = (),
    **options: Any,
) -> Iterator[str]:
    """`generate` from text, or from its tokens, to pieces of text, each as soon as it is whole.

    A character may take several tokens. The text ends before the first of `stop_strings`, of which no part is given;
    special tokens are no text, and only `stop` ends at one. `options` are those of `generate`.
    """
    tokens = tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)
    if any(not text for text in stop_strings):
        raise ValueError("a stop string must hold a character")
    return until(_whole_characters(tokenizer, tokens, generate(model, tokens, **options)), stop_strings)


def _whole_characters(tokenizer: Tokenizer, prompt: Sequence[int], generated: Iterable[int]) -> Iterator[str]:
    """The text of each token, held back until its last character is whole.

    The prompt is decoded along and cut off: by itself, a continuation may lose the space that it begins with.
    """
    tokens = list(prompt)
    text = tokenizer.decode(tokens)
    shown = len(text)
    for token in generated:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]  # a character that the end has cut


def until(pieces: Iterable[str], stops: Collection[str]) -> Iterator[str]:
    """The pieces of a text up to where one of `stops` is first complete, without any part of it.

    The end of a piece that may begin a stop string waits for the next. How the text is cut changes nothing.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)[1]]  # the first to be complete; of two at once, the longer
            return
        waits = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - waits]
        held = held[len(held) - waits :]
    if held:
        yield held


def generation_options(directory: str | Path) -> dict[str, Any]:
    """What the model's generation_config.json asks for: `stop`, its end tokens, and fields of `Sampling`.

    As transformers takes it: greedy unless do_sample is true; where it is, a temperature of 1 and a top_k of 50 stand
    for those that are not given. Raises ValueError naming the file for a value that cannot be.
    """
    given = read_generation_config(directory)
    options = {field.name: given[field.name] for field in fields(Sampling) if field.name in given}
    if "eos_token_id" in given:
        options["stop"] = given["eos_token_id"]
    if given.get("do_sample"):
        return {"temperature": 1.0, "top_k": 50, **options}
    return {**options, "temperature": 0.0}
