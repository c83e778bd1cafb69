"""The whole decoder: gradients, recomputation, adapters, quantised weights, KV cache, and what it refuses."""

import numpy as np
import pytest
from gradcheck import (
    CAUGHT,
    TOLERANCE,
    B,
    D,
    F,
    H,
    K,
    T,
    V,
    h,
    largest_error,
    model_checks,
    r,
    stir,
    tiny_config,
    tiny_model,
)
from mistakes import MISTAKES

from refqlora import attention, decoder, layer
from refqlora.functional import cross_entropy
from refqlora.model import KVCache, Model
from refqlora.optim import AdamW
from refqlora.quantization import QuantizedTensor, dequantize

TOKENS = np.random.default_rng(0).integers(0, V, (B, T))
LABELS = np.random.default_rng(1).integers(0, V, (B, T))


def adapted(dtype=np.float32, seed=0, dropout=0.0, targets="all-linear", **options):
    """A tiny model with an adapter whose B is not zero."""
    m = tiny_model(dtype, **options)
    m.add_adapter(rank=r, alpha=8, dropout=dropout, targets=targets, seed=seed)
    stir(m.trainable())
    return m


def logits_of(m, tokens=TOKENS, **options):
    return m.forward(tokens, **options)[0]


def grads_of(m, **options):
    logits, cache = m.forward(TOKENS, **options)
    return m.backward(cross_entropy(logits, LABELS)[1], cache)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.name)
def test_gradients_equal_central_differences(check):
    errors = check.errors()
    assert errors.keys() == check.inputs.keys()  # every parameter that is trained, and no other
    assert all(error < TOLERANCE for error in errors.values()), errors
    sizes = {name: np.sqrt(np.mean(values**2)) for name, (_, values) in check.numeric.items()}
    assert min(sizes.values()) > 1e-4, sizes  # far above the noise of the differences


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught_in_the_whole_model(mistake):
    assert largest_error(model_checks(), mistake) > CAUGHT


# ---- the forward, from its definition ----------------------------------------------------------------------


def logits_by_definition(m, tokens):
    """Llama's forward, one sequence and one head at a time, from the parameters' names; no adapter."""
    config, p = m.config, m.params
    frequencies = config.rope_theta ** (-2 * np.arange(config.head_dim // 2) / config.head_dim)
    turn = np.exp(1j * np.outer(np.arange(tokens.shape[1]), frequencies))  # (T, h/2)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * p[name + ".weight"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)

    def head(x, i):
        return x[:, i * config.head_dim : (i + 1) * config.head_dim]

    def rope(x):
        half = config.head_dim // 2
        y = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([y.real, y.imag], axis=1)

    logits = []
    for sequence in tokens:
        x = p["model.embed_tokens.weight"][sequence]  # (T, D)
        for at in (f"model.layers.{i}." for i in range(config.layers)):
            n = norm(x, at + "input_layernorm")
            q, k, v = (linear(n, f"{at}self_attn.{name}_proj") for name in "qkv")
            heads = []
            for i in range(config.heads):
                group = i // (config.heads // config.kv_heads)
                scores = rope(head(q, i)) @ rope(head(k, group)).T / np.sqrt(config.head_dim)
                weights = np.tril(np.exp(scores - scores.max(1, keepdims=True)))
                heads.append(weights / weights.sum(1, keepdims=True) @ head(v, group))
            x = x + linear(np.concatenate(heads, axis=1), at + "self_attn.o_proj")
            n = norm(x, at + "post_attention_layernorm")
            gate, up = linear(n, at + "mlp.gate_proj"), linear(n, at + "mlp.up_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")
        logits.append(norm(x, "model.norm") @ p[config.head].T)
    return np.stack(logits)


@pytest.mark.parametrize("options", [{}, {"tied": True, "attention_bias": True, "mlp_bias": True}])
def test_forward_is_its_definition(options):
    m = tiny_model(np.float64, **options)
    np.testing.assert_allclose(logits_of(m), logits_by_definition(m, TOKENS), rtol=1e-10, atol=1e-11)
    assert np.array_equal(logits_of(m, TOKENS.tolist()), logits_of(m))
    single = tiny_model(np.float32, **options)
    assert logits_of(single).dtype == np.float32
    np.testing.assert_allclose(logits_of(single), logits_of(m), atol=1e-4)


def test_an_adapter_acts_as_the_merged_weights():
    m = adapted(np.float64)
    merged = {name: p.copy() for name, p in m.params.items()}
    for name in m.config.linears():
        a, b = (m.trainable()[f"{name}.lora_{x}.weight"] for x in "AB")
        merged[name + ".weight"] += 8 / r * b @ a
    np.testing.assert_allclose(logits_of(m), logits_of(Model(m.config, merged)), rtol=1e-9, atol=1e-10)


def test_it_learns():
    m = adapted(attention_bias=True)
    m.quantize()
    losses, optimiser = [], AdamW(m.trainable(), lr=0.01)
    for _ in range(80):
        logits, cache = m.forward(TOKENS, recompute=True)
        loss, dlogits = cross_entropy(logits, LABELS)
        losses.append(loss)
        optimiser.step(m.backward(dlogits, cache))
    assert losses[0] > np.log(V)
    assert losses[-1] < 0.5  # of the one batch; the frozen norm and head bound the logits: it ends at 0.37


# ---- recomputation and dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("trained", ["adapter", "adapter on NF4", "all"])
def test_recomputing_gives_the_same_to_the_bit(dtype, trained):
    m = adapted(dtype, dropout=0.3, attention_bias=True)
    if trained == "adapter on NF4":
        m.quantize()
    if trained == "all":
        m.set_adapter(None)

    def run(recompute):
        masks = np.random.default_rng(5)
        return logits_of(m, rng=masks, recompute=recompute), grads_of(m, rng=masks, recompute=recompute)

    (logits, grads), (logits_again, grads_again) = run(False), run(True)
    assert np.array_equal(logits, logits_again)
    assert same(grads, grads_again)


def test_recomputing_keeps_each_layers_input_only():
    _, cache = adapted(dropout=0.3).forward(TOKENS, rng=np.random.default_rng(0), recompute=True)
    assert [(x.shape, type(seed)) for x, seed in cache["layers"]] == [((B, T, D), int)] * 2


def test_dropout_needs_a_generator_and_differs_from_layer_to_layer_and_step_to_step():
    m = adapted(dropout=0.3)
    plain = logits_of(m)
    rng = np.random.default_rng(0)
    first, cache = m.forward(TOKENS, rng=rng)
    masks = [layer["self_attn.q_proj"][4] for layer in cache["layers"]]
    assert all(mask.dtype == bool and mask.shape == (B * T, D) for mask in masks)
    assert not np.array_equal(*masks)
    assert not np.array_equal(first, plain)
    assert not np.array_equal(logits_of(m, rng=rng), first)
    assert np.array_equal(logits_of(m, rng=np.random.default_rng(0)), first)
    assert np.array_equal(logits_of(m), plain)
    m.set_adapter(None)
    assert np.array_equal(logits_of(m, rng=rng), logits_of(m))


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_a_new_adapter_changes_nothing_and_one_switched_off_leaves_the_base(quantized):
    m = tiny_model(np.float32, attention_bias=True)
    if quantized:
        m.quantize()
    base = logits_of(m)
    m.add_adapter(rank=r)
    assert m.active == "default"
    assert np.array_equal(logits_of(m), base)
    for p in m.trainable().values():
        p += np.float32(0.1)
    assert not np.array_equal(logits_of(m), base)
    m.set_adapter(None)
    assert logits_of(m).tobytes() == base.tobytes()


def test_several_adapters_on_one_base():
    m, alone = tiny_model(np.float32), {}
    base = logits_of(m)
    for seed, targets in enumerate([("q_proj",), "all-linear", r".*1\.mlp\..*"]):
        single = adapted(seed=seed, targets=targets)
        alone[str(seed)] = logits_of(single)
        m.add_adapter(str(seed), rank=r, alpha=8, targets=targets, seed=seed)
        stir(m.trainable())
    for name in ("2", "0", None, "1", "0"):
        m.set_adapter(name)
        assert logits_of(m).tobytes() == (base if name is None else alone[name]).tobytes()
    assert len({logits.tobytes() for logits in (base, *alone.values())}) == 4


def test_an_adapter_has_its_matrices_on_its_targets_only():
    m = tiny_model(np.float32)
    m.add_adapter(rank=r, alpha=3, targets=["k_proj", "1.mlp.down_proj"], rslora=True)
    assert {name: (p.shape, p.dtype) for name, p in m.trainable().items()} == {
        "model.layers.0.self_attn.k_proj.lora_A.weight": ((r, D), np.float32),
        "model.layers.0.self_attn.k_proj.lora_B.weight": ((K * h, r), np.float32),
        "model.layers.1.self_attn.k_proj.lora_A.weight": ((r, D), np.float32),
        "model.layers.1.self_attn.k_proj.lora_B.weight": ((K * h, r), np.float32),
        "model.layers.1.mlp.down_proj.lora_A.weight": ((r, F), np.float32),
        "model.layers.1.mlp.down_proj.lora_B.weight": ((D, r), np.float32),
    }
    assert m.adapters["default"].config.scale == 3 / r**0.5


def test_no_gradient_of_a_frozen_weight_is_ever_formed(monkeypatch):
    m, formed = adapted(attention_bias=True), set()

    def recording(backward):
        def recorded(dy, cache, train_weight=False):
            dx, grads = backward(dy, cache, train_weight)
            formed.update(grads)
            return dx, grads

        return recorded

    def never(*_):
        raise AssertionError("the gradient of the embedding was formed")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "head_backward", recording(decoder.head_backward))
        patch.setattr(layer, "linear_backward", recording(layer.linear_backward))
        patch.setattr(decoder, "embedding_backward", never)
        grads = grads_of(m)
    assert formed == {"lora_A.weight", "lora_B.weight"}
    assert list(grads) == list(m.trainable())
    assert {name: g.shape for name, g in grads.items()} == {name: p.shape for name, p in m.trainable().items()}

    m.set_adapter(None)
    full = grads_of(m)
    assert list(full) == list(m.params)
    assert {name: g.shape for name, g in full.items()} == m.config.shapes()


def test_a_pass_changes_neither_base_nor_adapter():
    m = adapted(dropout=0.2)
    before = {name: p.copy() for name, p in (m.params | m.trainable()).items()}
    grads_of(m, rng=np.random.default_rng(0))
    assert same(before, m.params | m.trainable())


# ---- a quantised base --------------------------------------------------------------------------------------


def test_a_quantised_base_acts_as_its_dequantised_values_to_the_bit():
    m = adapted(dropout=0.2, attention_bias=True, tied=True)
    dense = adapted(dropout=0.2, attention_bias=True, tied=True)
    exact = logits_of(m)
    m.quantize()
    for name, p in m.params.items():
        if isinstance(p, QuantizedTensor):
            dense.params[name] = dequantize(p)
    assert np.array_equal(logits_of(m), logits_of(dense))
    assert not np.allclose(logits_of(m), exact, atol=1e-3)
    assert same(*(grads_of(each, rng=np.random.default_rng(0)) for each in (m, dense)))
    for each in (m, dense):
        each.set_adapter(None)
    assert np.array_equal(logits_of(m), logits_of(dense))


def test_quantising_takes_the_linears_and_only_once():
    m = tiny_model(np.float32, attention_bias=True)
    m.quantize(block_size=32, double_quant=False)
    quantized = {name for name, p in m.params.items() if isinstance(p, QuantizedTensor)}
    assert quantized == {name + ".weight" for name in m.config.linears()}
    assert {m.params[name].block_size for name in quantized} == {32}
    assert m.dtype == np.float32
    before = dict(m.params)
    m.quantize()
    assert all(m.params[name] is p for name, p in before.items())


# ---- the KV cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * T, [4, 1, 1, 1], [3, 4], [T]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_decoding_with_the_cache_equals_the_whole_forward(monkeypatch, pieces, dtype, tolerance):
    monkeypatch.setattr(attention, "TILE", 3)
    m = adapted(dtype, attention_bias=True)
    kv = KVCache(m.config, batch=B, capacity=T + 2, dtype=dtype)
    logits, start = [], 0
    for n in pieces:
        logits.append(logits_of(m, TOKENS[:, start : start + n], kv=kv))
        start += n
        assert kv.length == start
    whole = logits_of(m)
    assert abs(np.concatenate(logits, axis=1) - whole).max() < tolerance * abs(whole).max()


def test_a_full_cache_says_so():
    m = tiny_model(np.float32)
    kv = KVCache(m.config, batch=B, capacity=T)
    m.forward(TOKENS[:, :5], kv=kv)
    assert [array.shape for array in kv.arrays] == 2 * [(2, B, 5, K, h)]
    with pytest.raises(ValueError, match=f"kv: expected at most {T} positions, got {T + 1}"):
        m.forward(TOKENS[:, :3], kv=kv)
    assert kv.length == 5  # and can go on
    m.forward(TOKENS[:, :2], kv=kv)


def test_recomputing_does_not_go_with_the_cache():
    """A layer made again without the earlier keys would give wrong gradients, silently."""
    m = tiny_model(np.float32)
    with pytest.raises(ValueError, match="recompute: expected only without kv"):
        m.forward(TOKENS, recompute=True, kv=KVCache(m.config, batch=B, capacity=T))


# ---- new models --------------------------------------------------------------------------------------------


def test_random_weights():
    config = tiny_config(hidden_size=96, intermediate_size=200, vocab_size=300, attention_bias=True, mlp_bias=True)
    m = Model.from_config(config, seed=3)
    for name, p in m.params.items():
        assert p.dtype == np.float32
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.01 if residual else 0.02  # 2 layers: 0.02 / sqrt(4)
            assert p.std() == pytest.approx(std, rel=0.05)
            assert abs(p.mean()) < 5 * std / p.size**0.5
    assert same(m.params, Model.from_config(config, seed=3).params)
    assert not same(m.params, Model.from_config(config, seed=4).params)
    assert Model.from_config(config, dtype=np.float64).dtype == np.float64
    logits = logits_of(m)
    assert cross_entropy(logits, LABELS)[0] == pytest.approx(np.log(300), abs=0.25)  # logits of std 0.2


# ---- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"integers of shape \(B, T\), got int64 of shape \(7,\)"),
        (TOKENS[None], r"integers of shape \(B, T\), got int64 of shape \(1, 3, 7\)"),
        (TOKENS.astype(float), r"integers of shape \(B, T\), got float64 of shape \(3, 7\)"),
        (TOKENS > 3, r"integers of shape \(B, T\), got bool"),
        (TOKENS[:, :0], r"tokens: expected one or more, got shape \(3, 0\)"),
        (TOKENS - V, r"tokens: -\d+ is outside the vocabulary of 11"),
        (np.array([[0, V]]), "tokens: 11 is outside the vocabulary of 11"),
        (np.array([[255, 0]], np.uint8), "tokens: 255 is outside the vocabulary of 11"),
    ],
)
def test_tokens_that_cannot_be(tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().forward(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("model.norm.weight"), r"the model: model\.norm\.weight \(10,\) is missing"),
        (lambda p: p.update(extra=np.ones(1)), "the model: extra is not expected"),
        (
            lambda p: p.update({"model.layers.1.self_attn.k_proj.weight": np.ones((D, K * h))}),
            r"model\.layers\.1\.self_attn\.k_proj\.weight has shape \(10, 12\), expected \(12, 10\)",
        ),
        (
            lambda p: p.update({"model.layers.0.mlp.up_proj.bias": np.ones(F)}),
            "mlp.up_proj.bias is not expected",
        ),
    ],
)
def test_parameters_that_do_not_fit(change, message):
    m = tiny_model()
    params = dict(m.params)
    change(params)
    with pytest.raises(ValueError, match=message):
        Model(m.config, params)


def test_a_head_is_not_expected_in_a_tied_model():
    with pytest.raises(ValueError, match=r"lm_head\.weight is not expected"):
        Model(tiny_config(tied=True), tiny_model().params)


def test_adapters_that_cannot_be():
    m = tiny_model(np.float32)
    with pytest.raises(ValueError, match="no adapter 'a'; there are: none"):
        m.set_adapter("a")
    m.add_adapter("a", rank=r)
    before = m.trainable()
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        m.add_adapter("a", rank=r)
    with pytest.raises(ValueError, match=r"targets: expected one of down_proj, gate_proj, .*, got 'query'"):
        m.add_adapter("b", rank=r, targets=("query",))
    with pytest.raises(ValueError, match="rank: expected a whole number"):
        m.add_adapter("b", rank=0)
    with pytest.raises(ValueError, match="no adapter 'b'; there are: 'a'"):
        m.set_adapter("b")
    assert m.active == "a"  # nothing has changed
    assert m.trainable() is before


def test_a_quantised_base_without_an_adapter_cannot_be_trained():
    m = tiny_model(np.float32)
    m.quantize()
    with pytest.raises(ValueError, match=r"q_proj\.weight is quantised and no adapter is active"):
        m.trainable()
    with pytest.raises(ValueError, match="no adapter is active"):
        grads_of(m)
    assert logits_of(m).shape == (B, T, V)
    assert m.config.heads == H
