"""A tiny model whose files are spoilt: changed or cut short, and refused by name."""

import json

import numpy as np
import pytest

import refqlora as rq
from refqlora.files.reading import read_tensors
from refqlora.files.writing import write_tensors

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "layers": 2,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 8,
}
TOKENS = np.arange(22).reshape(2, 11)


def new_model(seed=0, **changes):
    """Every parameter random, the norms and biases too."""
    model = rq.Model.from_config(rq.Config(**{**SIZES, **changes}))
    rng = np.random.default_rng(seed)
    for p in model.params.values():
        p[...] = rng.standard_normal(p.shape)
    return model


def with_adapter(model, **options):
    """Every A, B and magnitude random."""
    model.add_adapter(**{"rank": 5, "alpha": 7, **options})
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    return model


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


def change_json(path, **changes):
    """Set keys of a JSON file; ... removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not ...}))


def change_tensors(path, changes):
    """Set tensors of a safetensors file; ... removes one."""
    tensors = dict(read_tensors(path)) | changes
    write_tensors(path, {name: x for name, x in tensors.items() if x is not ...})


def cut_short(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def complaint(load, path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(path)
    assert type(error.value) in (ValueError, FileNotFoundError)  # and none of their kin by accident
    return str(error.value)
