"""The errata: every computation on the page runs as pasted, in order, and its asserts hold."""

import re

import pytest
import walkthroughs

PAGE = (walkthroughs.NOTEBOOKS / "errata.md").read_text(encoding="utf-8")
SETUP, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def page():
    """The names that the page has defined so far."""
    names = {}
    exec(compile(SETUP, "errata.md", "exec"), names)
    return names


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_computation_holds(number, page):
    assert "assert " in BLOCKS[number]
    exec(compile(BLOCKS[number], "errata.md", "exec"), page)


def test_each_slip_is_computed_but_one():
    """Guanaco's 5 or 6 GB are two tables of the paper that do not agree: there is nothing to compute."""
    assert len(BLOCKS) == PAGE.count("\n### ") - 1
