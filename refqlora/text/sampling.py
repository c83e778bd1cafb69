"""From logits to the next token: the distribution, narrowed as transformers narrows it, and a draw from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import Rule, check


def _number(expected: str, fits: Callable[[Any], bool]) -> Rule:
    return Rule(expected, lambda x: isinstance(x, int | float | np.integer | np.floating) and bool(fits(x)))


WHOLE = Rule("a whole number of 0 or more", lambda x: isinstance(x, int | np.integer) and bool(x >= 0))
_RULES = {
    "temperature": _number("a number of 0 or more", lambda x: 0 <= x <= sys.float_info.max),
    "top_k": WHOLE,
    "top_p": _number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": _number("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": _number("a number above 0", lambda x: 0 < x <= sys.float_info.max),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The fields mean what they mean in transformers' `generate`, and act in this order.

    repetition_penalty: the logits of tokens in the text so far, including the prompt, are divided by it if positive
    and multiplied by it if negative (Keskar et al. 2019, section 4.1); 1 does nothing.
    temperature: logits are divided by it; 0 takes the most probable token (greedy), and the fields below do nothing.
    top_k: keep the k most probable tokens and those tied with the last of them; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities add up to it (Holtzman et al. 2020); of tied ones, the later.
    min_p: keep tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024).

    Raises ValueError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            check(name, getattr(self, name), rule)

    def probabilities(self, logits: np.ndarray, seen: Collection[int] = ()) -> np.ndarray:
        """logits (V,) and the tokens of the text so far -> the next token's distribution, (V,) float64.

        Equal to the softmax after transformers' logits processors, except for which of several tied tokens top_p
        removes: torch's sort leaves that open. With temperature 0 one token has probability 1. Raises ValueError if a
        logit is NaN, or the greatest is infinite.
        """
        scores = np.array(logits, np.float64)  # (V,), a copy
        if seen and self.repetition_penalty != 1:
            at = np.unique(np.fromiter(seen, np.int64, len(seen)))
            scores[at] = np.where(
                scores[at] < 0, scores[at] * self.repetition_penalty, scores[at] / self.repetition_penalty
            )
        top = scores.max()
        if not np.isfinite(top):
            raise ValueError(f"the model's logits are not finite: the greatest is {top}")
        if self.temperature == 0:
            p = np.zeros_like(scores)
            p[scores.argmax()] = 1
            return p
        with np.errstate(over="ignore"):  # -inf is right
            scores = (scores - top) / self.temperature  # the shift does not change the softmax
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            rising = np.argsort(scores, kind="stable")
            below = np.cumsum(_softmax(scores[rising])) <= 1 - self.top_p  # the least probable tokens
            below[-1] = False  # keep at least one
            scores[rising[below]] = -np.inf
        p = _softmax(scores)
        if self.min_p > 0:
            p[p < self.min_p * p.max()] = 0
            p /= p.sum()
        return p

    def draw(self, logits: np.ndarray, rng: np.random.Generator, seen: Collection[int] = ()) -> int:
        """One token, drawn from `probabilities`. With temperature 0, `rng` is not used."""
        p = self.probabilities(logits, seen)
        return int(p.argmax() if self.temperature == 0 else rng.choice(len(p), p=p))


def _softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()
