"""Hollow arrays have the shapes, dtypes and bytes that NumPy's arrays would have, as long as they would be held."""

import tracemalloc

import numpy as np
import pytest

from refqlora.backend import array_module, pieces
from refqlora.memory.hollow import HOLLOW, Hollow, hollow, recording

N, M = 300, 500  # of 8 bytes: over the size from which NumPy reuses temporaries


OPERATIONS = {
    "sum of two": lambda x, y: x + y,
    "a float and a whole number": lambda x, y: x * 2 + 1,
    "another dtype": lambda x, y: x.astype(np.float32) * np.float32(2),
    "product": lambda x, y: x @ y.T,
    "batched product": lambda x, y: x.reshape(3, 100, M) @ y.reshape(3, 100, M).swapaxes(1, 2),
    "comparison": lambda x, y: x != y,
    "view": lambda x, y: x.reshape(-1, 10)[:5].T,
    "copy by reshape": lambda x, y: x.T.reshape(-1),
    "slice": lambda x, y: x[10:20, ::2],
    "new axis": lambda x, y: x[:, None] * y[None, :10, :, None][..., 0],
    "gather": lambda x, y: x[np.arange(7)],
    "gather pairs": lambda x, y: x[np.arange(7), np.arange(7)],
    "row maxima": lambda x, y: x.max(axis=-1, keepdims=True),
    "column sums": lambda x, y: x.sum(axis=0),
    "exponential": lambda x, y: np.exp(x),
    "in place": lambda x, y: np.add(x, y, out=x),
    "einsum": lambda x, y: np.einsum("nd,nd->d", x, y),
    "einsum with rows": lambda x, y: np.einsum("...d,...d->...", x, y),
    "concatenate": lambda x, y: np.concatenate([x, y], axis=-1),
    "split": lambda x, y: np.split(x, [100, 250], axis=-1)[1],
    "like": lambda x, y: np.zeros_like(x),
    "transpose": lambda x, y: x.reshape(3, 100, M).transpose(1, 0, 2).reshape(100, -1),
    "negative": lambda x, y: -x,
    "broadcast": lambda x, y: x * y[0],
    "triangle": lambda x, y: np.triu(x[:N, :N], 1),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_shape_dtype_and_bytes_are_numpy_s(operation):
    real = [np.ones((N, M)), np.ones((N, M))]
    operation(*real)  # what is made once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        expected = operation(*real)
        peak = tracemalloc.get_traced_memory()[1] - before
        domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        held = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)
    finally:
        tracemalloc.stop()
    with recording() as record:
        x, y = hollow((N, M), np.float64), hollow((N, M), np.float64)
        start = record.peak = record.live
        found = operation(x, y)
        assert isinstance(found, Hollow)
        assert (found.shape, found.dtype, found.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
        assert found.flags.c_contiguous == expected.flags.c_contiguous
        assert record.live - start == held
        assert record.peak - start >= peak - 100_000  # a buffer of NumPy's; and it may reuse a temporary
        del found, x, y
        assert record.live == 0


def test_views_keep_the_memory_alive():
    with recording() as record:
        x = hollow((N, M), np.float32)
        row = x[3]
        del x
        assert record.live == 4 * N * M
        del row
        assert record.live == 0
    assert record.peak == 4 * N * M


def test_nothing_is_allocated():
    tracemalloc.start()
    try:
        x = hollow((1 << 20, 1 << 20), np.float32)  # 4 TiB
        assert (x @ x).nbytes == 1 << 42
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_one_value_for_all():
    labels = hollow((3, 4), np.int64, 0)
    counted = labels != -100
    assert bool(counted.all())
    assert counted.sum() == 12
    assert np.flatnonzero(counted).shape == (12,)
    assert np.flatnonzero(labels == -100).shape == (0,)
    assert int((labels + 2).max()) == 2
    assert np.isfinite(hollow((3,), np.float32)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        hollow((2, 3), np.float32) @ hollow((4, 5), np.float32)
    with pytest.raises(ValueError, match="reshape"):
        hollow((2, 3), np.float32).reshape(4, 2)
    with pytest.raises(TypeError, match="no numbers"):
        np.asarray(hollow((2,), np.float32))
    with pytest.raises(NotImplementedError, match=r"numpy\.linalg\.svd|svd"):
        np.linalg.svd(hollow((2, 2), np.float32))


def test_the_engine_takes_it_for_numpy():
    x = hollow((2, 3), np.float32)
    assert array_module(x) is HOLLOW
    assert HOLLOW.exp is np.exp
    assert isinstance(HOLLOW.empty((2, 3), np.float32), Hollow)
    assert list(pieces(10, 4, np)) == [(0, 4), (4, 8), (8, 10)]
    assert list(pieces(10, 4, HOLLOW)) == [(0, 4), (4, 8)]
