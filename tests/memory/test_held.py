"""The bytes reported are those of the arrays, and those that the allocator has counted."""

import tracemalloc

import numpy as np
import pytest
import tiny

import refqlora as rq
from refqlora.memory.held import cache_bytes, training_bytes
from refqlora.quantization import QuantizedTensor
from refqlora.training import loss_and_gradients


def allocated():
    """Bytes of array data that are alive now, as NumPy's allocator reports them to tracemalloc."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def step(model):
    """The gradients and the optimiser of one step."""
    _, grads = loss_and_gradients(model, *tiny.examples().batch([0, 1]))
    return grads, rq.AdamW(model.trainable())


def linears(config):
    shapes = config.shapes()
    return [shapes[name + ".weight"] for name in config.linears()]


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_quantised_base_with_an_adapter(rank, dtype):
    model = rq.Model.from_config(tiny.config(), 0, dtype)
    model.quantize()
    model.add_adapter(rank=rank)
    found = training_bytes(model, *step(model))

    size = np.dtype(dtype).itemsize
    config = model.config
    everything = sum(np.prod(shape) for shape in config.shapes().values())
    norms = (2 * config.layers + 1) * config.hidden_size
    tables = everything - norms - sum(a * b for a, b in linears(config))
    blocks = [-(-a * b // 64) for a, b in linears(model.config)]
    adapter = size * sum(rank * (a + b) for a, b in linears(model.config))
    assert found == {
        "codes": sum(-(-a * b // 2) for a, b in linears(model.config)),
        "constants": sum(n + 4 * -(-n // 256) for n in blocks),  # a byte a block, four for each 256 of them
        "embeddings": size * tables // 2,
        "norms": size * norms,
        "head": size * tables // 2,
        "adapter": adapter,
        "optimizer": 2 * adapter,
        "gradients": adapter,
        "total": sum(value for key, value in found.items() if key != "total"),
    }


def test_full_training():
    model = rq.Model.from_config(tiny.config())
    found = training_bytes(model, *step(model))
    weights = sum(p.nbytes for p in model.params.values())
    assert sum(found[part] for part in ("embeddings", "linears", "norms", "head")) == weights
    assert (found["gradients"], found["optimizer"], found["total"]) == (weights, 2 * weights, 4 * weights)
    assert "codes" not in found
    assert "adapter" not in found


@pytest.mark.parametrize("quantize", [False, True])
def test_the_weights_that_pissa_has_in_place_of_the_model_s(quantize):
    model = rq.Model.from_config(tiny.config())
    model.add_adapter(rank=2, init="pissa", targets=("q_proj", "down_proj"))
    if quantize:
        model.quantize()
    found = training_bytes(model, *step(model))
    held = [*model.params.values(), *model.adapters["default"].residual.values()]
    assert len(held) == len(model.params) + 4
    trained = found["adapter"] + found["gradients"] + found["optimizer"]
    assert found["total"] - trained == sum(w.nbytes for w in held)


def test_constants_that_are_not_quantised():
    model = rq.Model.from_config(tiny.config())
    model.quantize(double_quant=False)
    model.add_adapter(rank=2, targets=("q_proj",))
    packed = [p for p in model.params.values() if isinstance(p, QuantizedTensor)]
    assert training_bytes(model, *step(model))["constants"] == sum(p.constants().nbytes for p in packed)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_allocator_has_seen_every_byte(quantize, traced):
    """To the byte, the parts one after the other; the weights and all else that lives before them do not count."""
    step(rq.Model.from_config(tiny.config()))  # whatever is made once and kept
    begin = allocated()
    model = rq.Model.from_config(tiny.config())
    if quantize:
        model.quantize()
    base = allocated()
    model.add_adapter(rank=4)
    adapter = allocated()
    optimizer = rq.AdamW(model.trainable())
    moments = allocated()
    _, grads = loss_and_gradients(model, *tiny.examples().batch([0, 1]))
    end = allocated()

    found = training_bytes(model, grads, optimizer)
    assert adapter - base == found["adapter"]
    assert moments - adapter == found["optimizer"]
    assert end - moments == found["gradients"]
    assert end - begin == found["total"]


BATCH, LENGTH = 3, 7


def forward(model, **options):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (BATCH, LENGTH))
    return model.forward(tokens, **options)[1]


@pytest.mark.parametrize("adapter", [{}, {"rank": 5}, {"rank": 2, "init": "olora"}])
def test_a_layer_s_cache_is_what_its_backward_needs(adapter):
    model = rq.Model.from_config(tiny.config())
    if adapter:
        model.quantize()
        model.add_adapter(**adapter)
    c, rank, n = model.config, adapter.get("rank", 0), BATCH * LENGTH
    q, k, d, f = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    for layer in forward(model)["layers"]:
        parts = cache_bytes(model, layer)
        assert list(parts) == list(layer)
        assert sum(parts.values()) == 4 * n * (4 * d + 2 + 2 * q + 2 * k + c.heads + 3 * f + 7 * rank)
        assert parts["self_attn.q_proj"] == 4 * n * (d + rank)  # the input, which is that of k_proj and v_proj too
        assert parts["self_attn.k_proj"] == parts["self_attn.v_proj"] == 4 * n * rank


def test_recomputation_keeps_the_inputs_of_the_layers():
    model = rq.Model.from_config(tiny.config(), 0, np.float64)
    kept, recomputed = (cache_bytes(model, forward(model, recompute=recompute)) for recompute in (False, True))
    assert recomputed["layers"] == 8 * model.config.layers * BATCH * LENGTH * model.config.hidden_size
    assert kept["layers"] > 5 * recomputed["layers"]
    del kept["layers"], recomputed["layers"]
    assert kept == recomputed


def test_the_cache_is_what_the_allocator_still_holds(traced):
    model = rq.Model.from_config(tiny.config())
    model.add_adapter(rank=3)
    before = allocated()
    cache = forward(model)
    found = cache_bytes(model, cache)
    assert allocated() - before == sum(found.values())
