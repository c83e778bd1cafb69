"""Batches, epochs and splits: every sequence once, in an order that only the seed decides."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refqlora.functional import IGNORE
from refqlora.text import dataset as data
from refqlora.text.dataset import Dataset


def dataset_of(*lengths):
    tokens = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return Dataset(tokens, [t + 1 for t in tokens], np.arange(100))


def test_batch_pads_on_the_right_to_the_longest():
    tokens, labels = dataset_of(2, 3, 9).batch(np.array([1, 0]))
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [1, 2, 0]])
    np.testing.assert_array_equal(labels, [[2, 3, 4], [2, 3, IGNORE]])
    assert tokens.dtype == labels.dtype == np.int64


def test_checksum_tells_datasets_apart():
    dataset = dataset_of(2, 3)
    assert dataset_of(2, 3).checksum == dataset.checksum == dataset.subset([0, 1]).checksum
    assert dataset.subset([1, 0]).checksum != dataset.checksum
    assert Dataset(dataset.tokens, dataset.tokens, dataset.token_bytes).checksum != dataset.checksum
    assert dataset_of(5).checksum != dataset.checksum


@given(n=st.integers(1, 20), batch_size=st.integers(1, 30), epochs=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_every_epoch_has_each_sequence_once(n, batch_size, epochs, seed):
    steps = -(-n * epochs // batch_size)
    order = np.concatenate([data.batch_indices(n, batch_size, step, seed) for step in range(steps)])
    assert len(order) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batch_indices_are_a_function_of_seed_and_step():
    batches = [list(data.batch_indices(50, 8, step, seed=3)) for step in range(20)]
    assert [list(data.batch_indices(50, 8, step, seed=3)) for step in reversed(range(20))] == batches[::-1]
    assert list(data.batch_indices(50, 8, 0, seed=4)) != batches[0]
    order = [i for batch in batches for i in batch]
    assert order[:50] != order[50:100]  # another epoch, another order
    # The order does not depend on how it is cut into batches.
    assert [i for step in range(32) for i in data.batch_indices(50, 5, step, seed=3)] == order


# ---- splits ----------------------------------------------------------------------------------------------


@given(n=st.integers(2, 200), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 2**32))
def test_split_divides_and_keeps_the_order(n, fraction, seed):
    training, held_out = data.split(list(range(n)), fraction, seed)
    assert sorted(training + held_out) == list(range(n))
    assert training == sorted(training)
    assert held_out == sorted(held_out)
    assert len(held_out) == max(1, round(n * fraction))
    assert data.split(list(range(n)), fraction, seed) == (training, held_out)


def test_split_of_a_dataset_is_by_sequence():
    dataset = dataset_of(*range(1, 21))
    training, held_out = data.split(dataset, 0.1, seed=0)
    assert sorted(len(t) for t in [*training.tokens, *held_out.tokens]) == list(range(1, 21))
    assert len(held_out) == 2
    assert training.counted_bytes + held_out.counted_bytes == dataset.counted_bytes
    assert data.split(dataset, 0.1, seed=1)[1].checksum != held_out.checksum


def test_split_with_nothing_left_is_an_error():
    for items, fraction in (([1], 0.1), ([1, 2], 0.8), ([], 0.5)):
        with pytest.raises(ValueError, match="nothing is left to train on"):
            data.split(items, fraction, seed=0)
    for fraction in (1, -1, 2, float("nan")):
        with pytest.raises(ValueError, match="held-out fraction: expected at least 0 and less than 1, got"):
            data.split([1, 2, 3], fraction, seed=0)


def test_a_fraction_of_nothing_holds_out_nothing():
    assert data.split([1], 0, seed=0) == ([1], [])
    dataset = dataset_of(3, 2, 5)
    training, held_out = data.split(dataset, 0, seed=0)
    assert training.checksum == dataset.checksum
    assert len(held_out) == 0
    assert held_out.counted_tokens == held_out.counted_bytes == 0


def test_training_needs_neither_tokenizers_nor_jinja2():
    blocked = "import sys; sys.modules |= dict.fromkeys(('tokenizers', 'jinja2')); "
    program = blocked + "import refqlora.text.dataset, refqlora.text.generation, refqlora.training; print('ok')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok\n", done.stderr
