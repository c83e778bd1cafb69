"""Generation: one token after another, and text as soon as its characters are complete."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check, shown
from ..files.config_json import read_generation_config
from .prefix_cache import PrefixCache
from .sampling import WHOLE, Sampling
from .tokenizer import decode, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..backend import Array
    from ..model import Model


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    stop: Collection[int] = (),
    seed: int = 0,
    cache: PrefixCache | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` (token ids, at least one), each as it is drawn.

    Generation ends before one of the tokens `stop`, after `max_new_tokens`, or at the end of the model's context.
    sampling: the fields of `Sampling`; greedy unless temperature is given. Keys and values are cached, so that each
    token costs one position; a `cache` passed again also saves the beginning that the prompt shares with the last text.

    Raises ValueError for a prompt that is empty or leaves no room in the context, and for an option out of its range.

        tokens = list(rq.generate(model, [5, 9, 2], max_new_tokens=20, temperature=0.8))
    """
    tokens, ends = _token_ids("prompt", prompt), frozenset(_token_ids("stop", stop))
    if not tokens:
        raise ValueError("prompt: expected at least one token, got none")
    room = model.config.max_positions - len(tokens)
    if room < 1:
        raise ValueError(f"the prompt's {len(tokens)} tokens fill the model's context of {model.config.max_positions}")
    check("max_new_tokens", max_new_tokens, WHOLE)
    check("seed", seed, WHOLE)
    cache = PrefixCache(model) if cache is None else cache
    if not isinstance(cache, PrefixCache) or cache.model is not model:
        raise ValueError(f"cache: expected a PrefixCache of this model, got {shown(cache)}")
    rng = np.random.default_rng(int(seed))
    return _drawn(cache, tokens, min(int(max_new_tokens), room), ends, Sampling(**sampling), rng)


def _drawn(
    cache: PrefixCache, tokens: list[int], n: int, ends: Collection[int], how: Sampling, rng: np.random.Generator
) -> Iterator[int]:
    for _ in range(n):
        token = how.draw(_on_cpu(cache.logits(tokens)), rng, tokens)
        if token in ends:
            return
        yield token
        tokens.append(token)


def _token_ids(name: str, tokens: Any) -> list[int]:
    try:
        listed = list(tokens)
    except TypeError:
        listed = None
    if listed is None or isinstance(tokens, str):
        raise ValueError(f"{name}: expected token ids, got {shown(tokens)}")
    for token in listed:
        check(name, token, WHOLE)
    return [int(token) for token in listed]


def _on_cpu(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def complete(model: Model, prompt: str | Sequence[int], *, tokenizer: Tokenizer | None = None, **options: Any) -> str:
    """`generate` from text to text: the continuation of `prompt`, without the prompt.

    tokenizer: by default the model's own. options: those of `generate`, and `stop_strings`: the text ends before the
    first of these. Raises ValueError as `generate` does, and for a model without a tokenizer.

        rq.complete(model, "def area(", max_new_tokens=40)
    """
    return "".join(stream(model, prompt, tokenizer=tokenizer, **options))


def stream(
    model: Model,
    prompt: str | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    stop_strings: Collection[str] = (),
    **options: Any,
) -> Iterator[str]:
    """`complete` in pieces of text, each as soon as its characters are complete: one may take several tokens.

    No part of a stop string is yielded. Special tokens are not text: to end at one, put it in `stop`.
    """
    tokenizer = tokenizer or model.tokenizer
    listed = isinstance(stop_strings, list | tuple | set | frozenset)
    if not listed or not all(isinstance(text, str) and text for text in stop_strings):
        raise ValueError(f"stop_strings: expected a list of texts that are not empty, got {shown(stop_strings)}")
    tokens = encode(tokenizer, prompt).ids if isinstance(prompt, str) else prompt
    return until(_whole_characters(tokenizer, tokens, generate(model, tokens, **options)), stop_strings)


def _whole_characters(tokenizer: Tokenizer, prompt: Sequence[int], generated: Iterable[int]) -> Iterator[str]:
    """The text of each token, held back until its last character is complete.

    The prompt is decoded too and cut off: decoded alone, a continuation may lose the space that it begins with.
    """
    tokens = list(prompt)
    text = decode(tokenizer, tokens)
    shown = len(text)
    for token in generated:
        tokens.append(token)
        text = decode(tokenizer, tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]  # perhaps a character that is not complete


def until(pieces: Iterable[str], stops: Collection[str]) -> Iterator[str]:
    """The pieces of a text up to the first of `stops` that is complete, without any part of it.

    The end of a piece is held back if it may begin a stop string. The result does not depend on how the text is cut.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)[1]]  # the first that is complete; of two at once, the longer
            return
        waits = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - waits]
        held = held[len(held) - waits :]
    if held:
        yield held


def generation_options(directory: str | Path) -> dict[str, Any]:
    """The fields of `Sampling` in a model's generation_config.json (its end tokens are in `Config.ends`).

    As in transformers, greedy unless do_sample is true; then the defaults are temperature 1 and top_k 50. Raises
    ValueError naming the file for an invalid value.
    """
    given = read_generation_config(directory)
    options = {field.name: given[field.name] for field in fields(Sampling) if field.name in given}
    if given.get("do_sample"):
        return {"temperature": 1.0, "top_k": 50, **options}
    return {**options, "temperature": 0.0}
