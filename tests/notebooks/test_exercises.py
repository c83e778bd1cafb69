"""An answer is right or wrong by its values, not by how it was computed."""

import numpy as np
import pytest

from refqlora.notebooks import check

RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((300, 7)).astype(np.float32), RNG.standard_normal((300, 5)).astype(np.float32)


def product(dy, x):
    return dy.T @ x


def summed_backwards(dy, x):
    """The same gradient, its terms added one by one from the last to the first."""
    total = np.zeros((dy.shape[1], x.shape[1]), np.float32)
    for row, other in zip(dy[::-1], x[::-1], strict=True):
        total += np.outer(row, other)
    return total


def test_another_order_of_summation_is_right():
    assert not np.array_equal(product(DY, X), summed_backwards(DY, X))
    assert check(summed_backwards, product, DY, X).right


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda dy, x: None, "Not answered yet"),
        (lambda dy, x: x.T @ dy, "the shape is (7, 5), expected (5, 7)"),
        (lambda dy, x: -product(dy, x), "the sign is wrong"),
        (lambda dy, x: product(dy, x) / len(x), "every value is 0.00333333 times what it should be"),
        (lambda dy, x: product(dy, x) + 1e-2, "the largest difference is 0.01"),
        (lambda dy, x: product(dy, x) * np.nan, "not every value is finite"),
        (lambda dy, x: dy @ x, "it raises ValueError: matmul"),
        (lambda dy, x: "a gradient", "the shape is ()"),
        (lambda dy, x: product(dy, x) + 1j, "expected numbers, got complex64"),
        (lambda dy, x: print(end=""), "make it return a value"),
        (lambda dy, x: [[1, 2], [3]], "expected numbers, got list"),
    ],
)
def test_a_wrong_answer_hears_what_is_wrong(answer, said):
    verdict = check(answer, product, DY, X)
    assert not verdict.right
    assert said in repr(verdict)


def test_an_answer_may_change_its_arguments():
    x = np.ones(3)

    def answer(x):
        x *= 2
        return x

    assert check(answer, lambda x: 2 * x, x).right
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        (7, 7, "Right."),
        (None, 7, "Not answered yet: fill it in, and run the cell and this one again."),
        (8, 7, "Not yet: it is not 8."),
        (0.12, 0.126953125, "Not yet: it is not 0.12."),
        ("b", "a", "Not yet: got 'b'."),
        (0.125, 0.126953125, "Not yet: it is not 0.125."),
        (0.127, 0.126953125, "Not yet: it is not 0.127, though that is near: give it without rounding."),
        ([1, 2, 3], np.array([1, 2, 4]), "Not yet: 1 of 3 values differ, first at 2: got 3, expected 4."),
        (
            np.eye(2, dtype=int),
            np.ones((2, 2), int),
            "Not yet: 2 of 4 values differ, first at (0, 1): got 0, expected 1.",
        ),
        ([0.5, 2], np.array([1, 2]), "Not yet: expected whole numbers, got 0.5."),
        ((1, 2), (1, 2), "Right."),
        ((1, 3), (1, 2), "Not yet: value 2: it is not 3."),
        ([1, 2], (1, 2), "Right."),
        ((1,), (1, 2), "Not yet: expected 2 values, got 1."),
        (1, (1, 2), "Not yet: expected 2 values, got one int."),
        ({"dA": X}, {"dA": X}, "Right."),
        ({"dA": -X}, {"dA": X}, "Not yet: dA: the sign is wrong."),
        ({"A": X}, {"dA": X}, "Not yet: expected a dict with the keys dA, got A."),
        (X, {"dA": X}, "Not yet: expected a dict with the keys dA."),
        (np.zeros(2), np.zeros(2), "Right."),
        (np.ones(2), np.zeros(2), "Not yet: the largest difference is 1, where the largest value is 0."),
    ],
)
def test_values_tuples_and_dicts(given, wanted, said):
    assert repr(check(given, wanted)) == said
