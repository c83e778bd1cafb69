"""Patterns match what `re` matches, and none can hang."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refqlora.patterns import check_pattern, full_match, name_match

NAME = "model.layers.10.self_attn.q_proj"
ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"[\d.]", r"\w", r"\D", "^", "$", r"\b", r"\B", "\n", ""]
REPEATS = ["*", "+", "?", "*?", "??", "{2}", "{1,2}", "{0,3}", "{2,}"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(REPEATS)).map("({0[0]}){0[1]}".format),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?<=", "(?<!"]), inner).map("{0[0]}{0[1]})".format),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("ab.c1\n", max_size=7))
def test_they_match_what_re_matches(pattern, text):
    try:
        expected = re.fullmatch(pattern, text) is not None
    except re.error:  # a lookbehind of no fixed width
        return
    assert full_match(pattern, text) == expected
    if "\n" not in text:  # which .* in PEFT's rule does not cross
        assert name_match(pattern, text) == (re.match(rf"(.*\.)?({pattern})$", text) is not None)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.(self_attn|mlp)\.(q|k|v)_proj", True),
        (r"model\.layers\.\d{1,2}\.self_attn\.[^.]+", True),
        (r"^(?!.*visual).*(?:q_proj|k_proj).*", True),
        (r"^(?!.*self_attn).*", False),
        (r"^(model(?=\.).*\.(down_proj|q_proj))$", True),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
            True,
        ),
        ("q_proj", False),
    ],
)
def test_what_people_write(pattern, expected):
    assert full_match(pattern, NAME) is expected is (re.fullmatch(pattern, NAME) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(((.*)*)*)*!",
        "(a|a|.)*!",
        "(.|.)" * 30 + "!",
        ".*" * 40 + "!",
        ".?" * 60 + "." * 60,
        "(((((((.{1,9})*)*)*)*)*)*)*!",
        "((((.?){9}){9}){9}){9}!",
        "(?:(?:){9}){4294967294}!",
        "(.?){60}" * 100 + "!",
    ],
)
def test_none_hangs(pattern):
    """Every one of these would keep `re` busy for longer than anyone waits."""
    assert not full_match(pattern, NAME)
    assert not name_match(pattern, NAME)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj(", "missing )"),
        ("x{99999999999}", "the repetition number is too large"),
        ("a" * 1001, "it has 1001 characters, more than 1000"),
        ("(" * 490 + ")" * 490, "it is nested more than 50 deep"),
        ("(" * 60 + ")" * 60, "it is nested more than 50 deep"),
        ("(?i)q", "flags are not supported"),
        ("(?i:q)", "subpattern is not supported"),
        (r"(a)\1", "groupref is not supported"),
        ("a*+", "possessive_repeat is not supported"),
        ("(?>a)", "atomic_group is not supported"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pattern(pattern)
