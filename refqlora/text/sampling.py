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
    """How the next token is drawn. The fields mean what they mean to transformers' `generate`, and act in this order.

    repetition_penalty: logits of tokens that are in the text already, the prompt included, are divided by it where
    positive and multiplied where negative (Keskar et al. 2019, section 4.1); 1 does nothing.
    temperature: logits are divided by it; 0 takes the most probable token (greedy), and what follows does nothing.
    top_k: only the k most probable tokens are kept, and those tied with the last of them; 0 keeps all.
    top_p: only the fewest tokens whose probabilities reach it (Holtzman et al. 2020); of tied ones, the later.
    min_p: only tokens at least this times as probable as the most probable one (Nguyen et al. 2024).

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
        """logits (V,), and the tokens of the text so far -> what the next token is drawn from, (V,) float64.

        Equal to the softmax of what transformers' logits processors leave, but for which of several tied tokens top_p
        cuts: torch's sort leaves that open. All on one token where temperature is 0. Raises ValueError if a logit is
        NaN, or the greatest is infinite.
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
        with np.errstate(over="ignore"):  # to -inf, which is right
            scores = (scores - top) / self.temperature  # a softmax does not see the shift
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            rising = np.argsort(scores, kind="stable")
            below = np.cumsum(_softmax(scores[rising])) <= 1 - self.top_p  # the least probable, which sum to no more
            below[-1] = False  # one always stays
            scores[rising[below]] = -np.inf
        p = _softmax(scores)
        if self.min_p > 0:
            p[p < self.min_p * p.max()] = 0
            p /= p.sum()
        return p

    def draw(self, logits: np.ndarray, rng: np.random.Generator, seen: Collection[int] = ()) -> int:
        """One token, drawn from `probabilities`. A greedy one takes nothing from `rng`."""
        p = self.probabilities(logits, seen)
        return int(p.argmax() if self.temperature == 0 else rng.choice(len(p), p=p))


def _softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()
