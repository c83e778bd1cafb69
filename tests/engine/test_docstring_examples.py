"""The example in the docstring of each public name of the engine runs as written."""

import doctest

import numpy as np
import pytest

import refqlora as rq

NAMES = [name for file, names in rq._HOME.items() if "." not in file for name in names if callable(getattr(rq, name))]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    example = doctest.DocTestParser().get_doctest(getattr(rq, name).__doc__, {"rq": rq, "np": np}, name, None, None)
    assert example.examples
    said = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert said == []
