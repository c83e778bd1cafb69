"""Sampling: one token after the other, from the model's distribution for the next."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from tokenizers import Tokenizer

from .backend import Array
from .kv_cache import KVCache
from .model import Model


def generate(
    model: Model,
    prompt: Collection[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` (token ids, at least one), until one of `stop` or `max_new_tokens`.

    temperature 0 takes the most probable token (greedy); above 0 it samples from softmax(logits / temperature),
    kept to the `top_k` most probable tokens (0: all) and to the fewest whose probabilities reach `top_p`. Each token
    costs one position, the keys and values of those before it being cached. It also ends where the model's context
    does. Raises ValueError for a prompt that leaves no room in it, or is empty, and for an option out of its range.
    """
    prompt = list(prompt)
    if not prompt:
        raise ValueError("the prompt holds no token")
    room = model.config.max_positions - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt's {len(prompt)} tokens fill the model's context of {model.config.max_positions}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be 0 or more and top_p in (0, 1], not {top_k} and {top_p}")
    rng = np.random.default_rng(seed)
    max_new_tokens = min(max_new_tokens, room)
    kv = KVCache(model.config, 1, len(prompt) + max_new_tokens, model.dtype)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        if model.config.rope_regime(len(tokens)) != model.config.rope_regime(kv.length):
            kv.length = 0  # RoPE's frequencies change at this length: the cached keys do not go with the new ones
        logits, _ = model.forward(np.array([tokens[kv.length :]]), kv=kv)
        token = sample(logits[0, -1], temperature, top_k, top_p, rng)
        if token in stop:
            return
        yield token
        tokens.append(token)


def sample(logits: Array, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """Draw one token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]  # the most probable first
    p = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    p /= p.sum()
    kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1  # the fewest that reach top_p (Holtzman et al. 2020)
    return int(rng.choice(order[:kept], p=p[:kept] / p[:kept].sum()))


def complete(model: Model, tokenizer: Tokenizer, prompt: str, **options: object) -> str:
    """`generate` from text to text: the continuation of `prompt`, which is not repeated."""
    return "".join(stream(model, tokenizer, prompt, **options))


def stream(model: Model, tokenizer: Tokenizer, prompt: str, **options: object) -> Iterator[str]:
    """`generate` from text to pieces of text, each as soon as it is whole (a character may take several tokens).

    The prompt is decoded along and cut off: by itself, a continuation may lose the space that it begins with.
    """
    tokens = tokenizer.encode(prompt).ids
    text = tokenizer.decode(tokens)
    shown = len(text)
    for token in generate(model, tokens, **options):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]  # a character that the end has cut
