"""The reprs of a model, a quantised tensor and an adapter: short, true, and without arrays."""

import html
import re

import numpy as np
import pytest
import tiny

import refqlora as rq
from refqlora.reprs import facts_html


def rows(table):
    """{name: text} of an HTML table."""
    return {html.unescape(a): html.unescape(b) for a, b in re.findall(r"<th[^>]*>(.*?)</th><td>(.*?)</td>", table)}


def test_a_table_escapes_what_it_shows():
    assert facts_html("<i>", {"a < b": "<b>", "n": 12345, "x": 1 / 3}).count("<i>") == 0
    assert rows(facts_html("t", {"a < b": "<b>", "n": 12345, "x": 1 / 3})) == {
        "a < b": "<b>",
        "n": "12,345",
        "x": "0.333333",
    }


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantised_tensor(double_quant):
    q = rq.quantize(np.ones((96, 40), np.float32), "fp4", 128, double_quant)
    found = rows(q._repr_html_())
    assert found["shape"] == "(96, 40)"
    assert (found["codebook"], found["block size"], found["bytes"]) == ("fp4", "128", f"{q.nbytes:,}")
    assert ("8 bits" in found["constants"]) == double_quant
    assert "own codebook" in repr(rq.quantize(np.ones(64, np.float32), rq.NF4[::-1].copy()))


def test_a_model_and_its_adapters():
    model = rq.Model.from_config(tiny.config())
    assert rows(model._repr_html_())["linears"] == "14, of which 0 in 4 bits"
    model.quantize()
    model.add_adapter(rank=3)
    model.add_adapter("other", rank=5)
    size = sum(p.size for p in model.params.values())
    found = rows(model._repr_html_())
    assert (found["linears"], found["parameters"]) == ("14, of which 14 in nf4", f"{size:,}")
    assert "rank 5" in found["adapter 'other', active"]
    first, *adapters = repr(model).splitlines()
    assert f"parameters {size:,}" in first
    assert [line.split(":")[0] for line in adapters] == ["    'default'", "  * 'other'"]
    assert len(repr(model)) < 1000
