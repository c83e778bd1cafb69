"""The cache returns what was stored, grows when needed, and can be truncated."""

import numpy as np
import pytest
import tiny

from refqlora.kv_cache import KVCache

LAYERS, B, K, H = 2, 2, 3, 8


def filled(kv, lengths, seed=0):
    """Store random keys and values in pieces of these lengths; -> all that were stored, (layers, 2, B, S, K, h)."""
    rng = np.random.default_rng(seed)
    stored = []
    for n in lengths:
        new = rng.normal(size=(LAYERS, 2, B, n, K, H)).astype(kv.arrays[0].dtype)
        stored.append(new)
        for layer in range(LAYERS):
            keys, values = kv.extend(layer, *new[layer])
            expected = np.concatenate([piece[layer] for piece in stored], axis=2)
            np.testing.assert_array_equal(keys, expected[0])
            np.testing.assert_array_equal(values, expected[1])
        kv.length += n
    return np.concatenate(stored, axis=3)


@pytest.mark.parametrize("lengths", [[1] * 20, [7, 1, 1, 5, 6], [20], [3, 16, 1]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_stored_comes_back(lengths, dtype):
    kv = KVCache(tiny.config(), B, 20, dtype)
    filled(kv, lengths)
    assert kv.length == 20
    assert all(array.dtype == dtype and array.shape == (2, B, 20, K, H) for array in kv.arrays)


def test_it_grows_by_doubling_up_to_its_capacity(monkeypatch):
    """So that a long context costs memory only when it is filled, and each position is copied twice at the most."""
    rooms = []
    grown = KVCache._grown
    monkeypatch.setattr(KVCache, "_grown", lambda *a: rooms.append(grown(*a)) or rooms[-1])
    kv = KVCache(tiny.config(), B, 100)
    assert sum(array.size for array in kv.arrays) == 0
    filled(kv, [5] + [1] * 95)
    assert [room.shape[2] for room in rooms[::LAYERS]] == [5, 10, 20, 40, 80, 100]


def test_what_is_forgotten_is_written_anew():
    kv = KVCache(tiny.config(), B, 12)
    before = filled(kv, [4, 5])
    kv.truncate(3)
    assert kv.length == 3
    new = np.ones((2, B, 9, K, H), np.float32)
    for layer in range(LAYERS):
        keys, values = kv.extend(layer, *new)  # beyond the room that there was
        for found, kept in ((keys, before[layer, 0]), (values, before[layer, 1])):
            np.testing.assert_array_equal(found, np.concatenate([kept[:, :3], np.ones((B, 9, K, H))], axis=1))


def test_what_cannot_be():
    kv = KVCache(tiny.config(), B, 3)
    two = np.ones((B, 2, K, H), np.float32)
    kv.extend(0, two, 2 * two)
    kv.length = 2
    with pytest.raises(ValueError, match="kv: expected at most 3 positions, got 4"):
        kv.extend(0, two, two)
    for length in (-1, 3):
        with pytest.raises(ValueError, match=f"length: expected 0 to 2, got {length}"):
            kv.truncate(length)
    assert kv.length == 2
