"""What notebooks display: as Markdown or a picture, and as plain text."""

import numpy as np
import pytest
from without import run_without

import refqlora.functional as F
from refqlora import quantization
from refqlora.figures.methods import method_bytes, methods_figure
from refqlora.notebooks import picture, slider, source, table


def test_the_source_is_the_package_s():
    shown = source(F.softcap_forward, F.softcap_backward)
    assert shown.forms["text/markdown"] == f"```python\n{shown!r}\n```"
    assert repr(shown).startswith("# refqlora/functional.py\ndef softcap_forward(")
    assert "\n\n\n# refqlora/functional.py\ndef softcap_backward(" in repr(shown)
    assert '"""' in repr(source(F.swiglu_backward))
    assert '"""' not in repr(source(F.swiglu_backward, docstring=False))
    assert repr(source(quantization)).startswith("# refqlora/quantization.py\n")


def test_a_part_of_the_source():
    assert repr(source(F.gelu_backward, first="dx *=")) == "# refqlora/functional.py\n    dx *= dy\n    return dx"
    assert repr(source(F.softcap_forward, last="def ")).count("\n") == 1
    with pytest.raises(ValueError, match="softcap_forward: expected a line with 'no such'"):
        source(F.softcap_forward, first="no such")


def test_a_table_as_markdown_and_as_text():
    shown = table([("NF4", 16, 0.0919512), ("FP4", np.int64(1015), np.float32(0.5))], ("codebook", "values", "error"))
    assert shown.forms["text/markdown"].split("\n") == [
        "| codebook | values | error |",
        "|---|---:|---:|",
        "| NF4 | 16 | 0.09195 |",
        "| FP4 | 1,015 | 0.5 |",
    ]
    assert repr(shown) == "codebook  values    error\nNF4           16  0.09195\nFP4        1,015      0.5"


def test_a_table_without_rows():
    assert repr(table([], ("a", "b"))) == "a  b"


def test_a_picture_has_its_words():
    shown = picture(methods_figure(method_bytes()), "three methods")
    forms, details = shown._repr_mimebundle_()
    assert forms["image/png"].startswith(b"\x89PNG")
    assert details == {"image/png": {"alt": "three methods"}}
    assert repr(shown) == "three methods"


def draw(r=1):
    return methods_figure(method_bytes(rank=r))


def test_a_slider_redraws_the_picture(monkeypatch):
    """In a kernel: the widget's value moves, and the picture that is shown already is replaced."""
    import IPython.display
    from ipywidgets import VBox

    shown, updates = [], []

    class Handle:
        update = staticmethod(updates.append)

    monkeypatch.setattr(IPython.display, "display", lambda one, display_id=False: shown.append(one) or Handle())
    slider(draw, "methods", start={"r": 4}, r=(1, 4, 64))
    first, box = shown
    assert repr(first) == "methods"
    assert isinstance(box, VBox)
    box.children[0].value = 64
    assert [one.forms["image/png"] for one in updates] == [picture(draw(64), "methods").forms["image/png"]]
    assert updates[0].forms["image/png"] != first.forms["image/png"]


def test_without_widgets_the_picture_stays():
    program = """
from refqlora.figures.methods import method_bytes, methods_figure
from refqlora.notebooks import slider
slider(lambda r: methods_figure(method_bytes(rank=r)), "methods", start={"r": 4}, r=(1, 4, 64))
"""
    assert run_without(("ipywidgets",), program, threadless=True) == "methods\n"


def test_a_slider_starts_on_one_of_its_values():
    with pytest.raises(ValueError, match=r"r: expected a start among \(1, 4\), got 3"):
        slider(draw, "methods", start={"r": 3}, r=(1, 4))
    with pytest.raises(ValueError, match="start: expected values for r, got rank"):
        slider(draw, "methods", start={"rank": 1}, r=(1, 4))


def test_what_cannot_be_shown_is_refused():
    for thing in (len, "text", np.exp):
        with pytest.raises(ValueError, match="source: expected Python code, got"):
            source(thing)
    with pytest.raises(ValueError, match="source: expected one or more"):
        source()
    with pytest.raises(ValueError, match="table: row 1: expected 2 cells, got 1"):
        table([(1, 2), (3,)], ("a", "b"))
    with pytest.raises(ValueError, match="table: expected text or a number in a cell, got int64 of shape"):
        table([(np.arange(2), 1)], ("a", "b"))
    assert table([("a|b",)], ("x",)).forms["text/markdown"].endswith("| a\\|b |")


def test_a_class_without_docstrings():
    shown = repr(source(quantization.QuantizedTensor, docstring=False))
    assert '"""' not in shown
    assert "class QuantizedTensor:\n    packed: Array\n" in shown
    assert "def size(self) -> int:\n        return" in shown
