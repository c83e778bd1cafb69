"""Values are checked in one dialect; numbers that are not finite are found and named."""

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refqlora import checks


@pytest.mark.parametrize(
    ("rule", "good", "bad", "said"),
    [
        (checks.whole(1, 9), (1, 9), (0, 10, 2.0, True, "2", None, 10**400), "a whole number from 1 to 9"),
        (
            checks.number(0, 1),
            (0, 1, 0.5, np.float64(0.5)),
            (-0.1, 2, True, np.nan, "1", 10**400),
            "a number from 0 to 1",
        ),
        (checks.SWITCH, (True, False), (1, 0, None, "true"), "true or false"),
        (checks.TOKENS, (0, [1, 2], (3,)), ([], (), -1, [1, None], {"a": 1}, True), "a token or a list of tokens"),
    ],
)
def test_a_rule(rule, good, bad, said):
    for value in good:
        checks.check("x", value, rule)
    for value in bad:
        with pytest.raises(ValueError, match="expected") as error:
            checks.check("x", value, rule)
        assert str(error.value) == f"x: expected {said}, got {checks.shown(value)}"


@pytest.mark.parametrize(
    ("door", "bad", "said"),
    [
        (checks.as_path, 5, "expected a path, got 5"),
        (checks.as_path, "a\0b", r"expected a path, got 'a\x00b'"),
        (partial(checks.as_dtype, dtypes=(np.float32, "f8")), "x", "expected one of float32, float64, got 'x'"),
        (partial(checks.as_dtype, dtypes=(np.float32, "f8")), None, "expected one of float32, float64, got None"),
        (partial(checks.check_array, kinds="f"), [1.0], "expected floats, got [1.0]"),
        (partial(checks.check_array, kinds="f"), np.float16, "expected floats, got <class 'numpy.float16'>"),
        (
            partial(checks.check_array, kinds="f"),
            np.ma.ones(3),
            "expected floats, got MaskedArray of float64 of shape (3,)",
        ),
        (partial(checks.check_array, kinds="iu"), np.ones(3), "expected integers, got float64 of shape (3,)"),
        (
            partial(checks.check_array, kinds="f", shape=(3,)),
            np.ones((1, 3)),
            "expected floats of shape (3,), got float64 of shape (1, 3)",
        ),
        (checks.check_mapping, [1], "expected a mapping by names, got [1]"),
        (checks.check_mapping, {1: 2}, "expected a mapping by names, got {1: 2}"),
    ],
)
def test_what_a_door_refuses(door, bad, said):
    with pytest.raises(ValueError, match="expected") as error:
        door("x", bad)
    assert str(error.value) == f"x: {said}"


def test_what_a_door_lets_through():
    assert checks.as_path("x", "a/b") == checks.as_path("x", Path("a/b")) == Path("a/b")
    assert checks.as_dtype("x", "float64", [np.float32, np.float64]) == np.float64
    checks.check_array("x", np.ones((2, 3), np.float16), "f", (2, 3))
    checks.check_array("x", np.ones(0, np.uint8), "iu")
    checks.check_mapping("x", {"a": 1})


def test_a_value_is_shown_on_one_line_and_cut():
    assert checks.shown("a\nb") == r"'a\nb'"
    assert checks.shown([1, 2]) == "[1, 2]"
    assert checks.shown(np.zeros((2, 2))) == "float64 of shape (2, 2)"
    assert len(checks.shown("x" * 10**6)) == len(checks.shown(list(range(999)))) == 60
    assert checks.shown(10**9999) == "int too large to show"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert checks.shown(deep) == "list too large to show"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_place(dtype, order, bad, monkeypatch):
    monkeypatch.setattr(checks, "CHUNK", 4)
    x = np.asarray(np.arange(30).reshape(5, 6), dtype, order=order)
    assert checks.finite("w", x) is x
    assert checks.finite("w", x[:0]).shape == (0, 6)
    assert checks.finite("w", x[0, 0].reshape(())) == 0
    x[4, 5] = np.nan
    x[3, 2] = bad
    with pytest.raises(ValueError, match="finite") as error:
        checks.finite("w", x)
    assert str(error.value) == f"w: expected finite numbers, got {bad} at (3, 2)"
    with pytest.raises(ValueError, match="finite") as error:
        checks.finite("w", x, np.float64)
    assert str(error.value) == f"w: expected finite numbers, got {bad} at (3, 2)"


def test_what_a_dtype_does_not_hold_is_named():
    x = np.array([1, 65504, 70000, np.nan])
    assert checks.finite("w", x[:2], np.float16).tolist() == [1, 65504]
    with pytest.raises(ValueError, match="holds") as error:
        checks.finite("w", x, np.float16)
    assert str(error.value) == "w: expected a number that float16 holds, got 70000.0 at (2,)"


def test_an_array_of_records_is_not_one_of_floats():
    checks.check_array("x", np.ones(2, ml_dtypes.bfloat16), "fV")  # whose kind is "V", as that of records
    for dtype in ([("a", "<f4"), ("b", "<i4")], "V8"):
        with pytest.raises(ValueError, match="x: expected floats"):
            checks.check_array("x", np.zeros(2, dtype), "fV")
