"""Regular expressions matched without backtracking: patterns come from files, and none may hang the program.

Python's `re` tries one way to match after another, and (((.*)*)*)*! has exponentially many. Here all ways are followed
at once (Thompson 1968): each part of a pattern leads from the place where it begins to the set of places where it may
end, computed once for each place. The time is polynomial in the lengths of the pattern and of the text.

`re` parses the pattern. Back references are refused, as it is not recorded what a group has matched; so are flags, and
possessive and atomic groups, which exist to limit backtracking.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

Ends = Callable[[str, int], set[int]]  # (text, where a part begins) -> where it may end

MAX_LENGTH, MAX_DEPTH = 1000, 50
_CHARACTERS = (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN)
_AT = {
    c.AT_BEGINNING: "^", c.AT_BEGINNING_STRING: r"\A", c.AT_END: "$", c.AT_END_STRING: r"\Z", c.AT_BOUNDARY: r"\b",
    c.AT_NON_BOUNDARY: r"\B",
}  # fmt: skip
_CATEGORIES = {
    c.CATEGORY_DIGIT: r"\d", c.CATEGORY_NOT_DIGIT: r"\D", c.CATEGORY_SPACE: r"\s", c.CATEGORY_NOT_SPACE: r"\S",
    c.CATEGORY_WORD: r"\w", c.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


@lru_cache(maxsize=1 << 16)
def full_match(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text, as `re.fullmatch` does."""
    return len(text) in _compiled(pattern)(text, 0)


@lru_cache(maxsize=1 << 16)
def name_match(pattern: str, name: str) -> bool:
    """Whether the pattern matches a dotted name to its end, from its start or from behind one of its dots."""
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
    return any(len(name) in _compiled(pattern)(name, start) for start in starts)


def check_pattern(pattern: str) -> None:
    """Raise ValueError, which says why, if the pattern is not valid or not supported."""
    _compiled(pattern)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Ends:
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, more than {MAX_LENGTH}")
    try:
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if parsed.state.flags & ~re.UNICODE:
        raise ValueError("flags are not supported")
    return _sequence(parsed, 0)


def _sequence(parts: Iterable[tuple[Any, Any]], depth: int) -> Ends:
    """One part after the other: each begins wherever the one before it may end."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    steps = [lru_cache(_part(kind, value, depth + 1)) for kind, value in parts]

    def ends(text: str, start: int) -> set[int]:
        places = {start}
        for step in steps:
            places = _union(step, text, places)
        return places

    return lru_cache(ends)


def _union(ends: Ends, text: str, starts: set[int]) -> set[int]:
    return set().union(*(ends(text, start) for start in starts))


def _part(kind: Any, value: Any, depth: int) -> Ends:
    """One part of a parsed pattern; `kind` and `value` are what `re` calls them."""
    if kind in _CHARACTERS:
        return lambda text, i: {i + 1} if i < len(text) and _takes(kind, value, text[i]) else set()
    if kind is c.AT:
        anchor = re.compile(_AT[value])
        return lambda text, i: {i} if anchor.match(text, i) else set()
    if kind is c.BRANCH:
        branches = [_sequence(branch, depth) for branch in value[1]]
        return lambda text, i: set().union(*(branch(text, i) for branch in branches))
    if kind is c.SUBPATTERN and not value[1] and not value[2]:
        return _sequence(value[3], depth)
    if kind in (c.MAX_REPEAT, c.MIN_REPEAT):
        low, high, body = value
        if len(body) == 1 and body[0][0] in _CHARACTERS:
            return _run(low, high, *body[0])
        return _repeat(low, high, _sequence(body, depth))
    if kind in (c.ASSERT, c.ASSERT_NOT):
        inner = _sequence(value[1], depth)
        back = 0 if value[0] > 0 else value[1].getwidth()[0]  # what a lookbehind looks for has one width
        return lambda text, i: {i} if (i >= back and bool(inner(text, i - back))) == (kind is c.ASSERT) else set()
    raise ValueError(f"{str(kind).lower()} is not supported")


def _repeat(low: int, high: int, body: Ends) -> Ends:
    """The body, `low` to `high` times."""

    def ends(text: str, start: int) -> set[int]:
        places, found = {start}, set[int]()
        for count in range(high + 1):
            if count >= low:
                places = places - found  # the others have been followed already
                found |= places
            following = _union(body, text, places)
            if not following or (count < low and following == places):  # nothing more, or the same for ever
                return found | following
            places = following
        return found

    return ends


def _run(low: int, high: int, kind: Any, value: Any) -> Ends:
    """`_repeat` for a part that matches one character, such as .* or [a-z]+: one scan of the text."""

    def ends(text: str, start: int) -> set[int]:
        stop = start
        while stop < min(len(text), start + high) and _takes(kind, value, text[stop]):
            stop += 1
        return set(range(start + low, stop + 1))

    return ends


def _takes(kind: Any, value: Any, letter: str) -> bool:
    """Whether a part that matches one character matches this one."""
    if kind is c.IN:
        negated = value[0][0] is c.NEGATE
        return any(_takes(part, wanted, letter) for part, wanted in value[negated:]) != negated
    if kind is c.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind is c.CATEGORY:
        return re.match(_CATEGORIES[value], letter) is not None
    return letter != "\n" if kind is c.ANY else (ord(letter) == value) == (kind is c.LITERAL)
