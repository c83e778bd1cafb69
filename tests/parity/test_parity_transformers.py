"""The engine held live against transformers, PEFT, torch's autograd and AdamW, and bitsandbytes on a CPU.

A difference is that of a tensor's worst element, relative to the tensor's largest element; of several
tensors, the worst counts. `pytest -rP` prints each. Everything is float32 on both sides.
"""

import logging
import warnings
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from closeness import agree_but_for_rounding
from pairs import ADAPTERS, SIZES_4BIT, TOLERANCE, agree, nested_constants, our_llama, run_all, their_llama

import refqlora as rq
from refqlora.parity.decoders import our_steps
from refqlora.parity.differences import relative_difference as difference
from refqlora.parity.oracles import (
    arrays,
    logits_of,
    packed_weights,
    their_4bit,
    their_adapter,
    their_steps,
    trained,
)
from refqlora.parity.settings import MAX_NORM, B, T, batch, shifted


def share_off(found, expected):
    """The share of all elements that are off by more than TOLERANCE of their tensor's largest."""
    off = [np.abs(found[name] - x) > TOLERANCE * np.abs(x).max() for name, x in expected.items()]
    return np.concatenate([x.ravel() for x in off]).mean()


# ---- model files -------------------------------------------------------------------------------------------

LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention and mlp bias": {"attention_bias": True, "mlp_bias": True},
    "head size from hidden size": {"head_dim": None, "hidden_size": 36},
    "one key head, other rope base": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
SHAPES = {"short": (B, T), "longer than two tiles of attention": (2, 270)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_what_transformers_saves_gives_the_same_logits_and_loss(changes, shape, tmp_path):
    theirs = their_llama(**changes)
    ours = our_llama(theirs, tmp_path)
    tokens, labels = batch(shape=shape)
    logits, _ = ours.forward(tokens)
    assert logits.dtype == np.float32
    agree("logits", logits, logits_of(theirs, tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels)).loss.item()
    agree("loss", rq.cross_entropy(logits, shifted(labels))[0], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_16_bit_and_sharded_files(dtype, shards, tmp_path):
    size = {} if shards == "one file" else {"max_shard_size": "8KB"}
    their_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path, **size)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == bool(size)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = rq.Model.from_pretrained(tmp_path)
    for name, p in arrays(list(theirs.named_parameters())).items():
        np.testing.assert_array_equal(ours.params[name], p, err_msg=name)
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_what_we_save_loads_in_transformers_without_a_word(changes, dtype, tmp_path, caplog):
    ours = our_llama(their_llama(**changes), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", dtype)
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not any(info.values()), info
    assert caplog.records == []
    assert theirs.dtype == (torch.float32 if dtype == np.float32 else torch.bfloat16)
    tokens, _ = batch()
    ours = rq.Model.from_pretrained(tmp_path / "ours")
    agree("logits", ours.forward(tokens)[0], logits_of(theirs.float(), tokens))


def test_greedy_generation_token_for_token(tmp_path):
    theirs = their_llama()
    ours = our_llama(theirs, tmp_path)
    prompt = [5, 9, 2, 31]
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    assert list(rq.generate(ours, prompt, max_new_tokens=40)) == expected[0, len(prompt) :].tolist()


# ---- gradients of every parameter --------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_gradients_of_all_parameters(changes, shape, recompute, tmp_path):
    theirs = their_llama(**changes)
    ours = our_llama(theirs, tmp_path)
    tokens, labels = batch(shape=shape)
    theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels)).loss.backward()
    logits, cache = ours.forward(tokens, recompute=recompute)
    grads = ours.backward(rq.cross_entropy(logits, shifted(labels))[1], cache)
    agree("gradients", grads, {name: p.grad.numpy() for name, p in theirs.named_parameters()})


# ---- LoRA steps --------------------------------------------------------------------------------------------


def our_adapter(ours, theirs, config):
    """The same adapter on our model: A and B as they are in PEFT's."""
    ours.add_adapter(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=config["target_modules"],
        rslora=config.get("use_rslora", False),
    )
    params = ours.trainable()
    expected = arrays(trained(theirs))
    assert params.keys() == expected.keys()
    for name, p in expected.items():
        params[name][...] = p
    return ours


@pytest.mark.parametrize("b_is_zero", [True, False], ids=["B zero", "B not zero"])
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_ten_lora_steps(config, b_is_zero, tmp_path):
    base = their_llama()
    ours, exact = our_llama(base, tmp_path), our_llama(base, tmp_path, np.float64)
    theirs = their_adapter(base, config, b_is_zero)
    our_adapter(ours, theirs, config), our_adapter(exact, theirs, config)
    expected = run_all(ours, theirs, exact)
    for name, g in expected["gradients"].items():
        assert g.any() != (b_is_zero and name.startswith("1 ") and "lora_A" in name)


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_ten_lora_steps_with_the_usual_eps(config, tmp_path):
    base = their_llama()
    ours = our_llama(base, tmp_path)
    theirs = their_adapter(base, config)
    our_adapter(ours, theirs, config)
    tokens, labels = batch()
    usual = {"eps": 1e-8, "lr": 2e-3}
    runs = our_steps(ours, tokens, labels, 10, **usual), their_steps(theirs, tokens, labels, 10, **usual)
    for step, (found, expected) in enumerate(zip(*runs, strict=True), 1):
        agree(f"step {step}: loss", found["loss"], expected["loss"])
        off = share_off(found["adapter"], expected["adapter"])
        print(f"step {step}: adapter, share off {off:.1e}")
        assert off < 0.01


def test_rounding_that_is_only_ours_shows():
    exact = np.linspace(-1, 1, 9)
    theirs = exact.astype(np.float32)
    agree_but_for_rounding("the same", theirs, theirs, exact)
    agree_but_for_rounding("both far", exact + 5e-6, exact - 4e-6, exact)
    for wrong in (exact + 5e-6, exact + 2e-5):
        with pytest.raises(AssertionError):
            agree_but_for_rounding("wrong", wrong, theirs, exact)


@pytest.mark.parametrize("wrong", ["scale", "transposed pair", "no clipping"])
def test_a_planted_error_shows(wrong, tmp_path):
    config = dict(ADAPTERS["q and v"])
    base = their_llama()
    ours = our_llama(base, tmp_path)
    theirs = their_adapter(base, config)
    our_adapter(ours, theirs, {**config, "use_rslora": wrong == "scale"})
    tokens, labels = batch()
    expected = list(their_steps(theirs, tokens, labels, 2))
    if wrong == "transposed pair":
        name = "model.layers.0.self_attn.v_proj.lora_A.weight"
        ours.trainable()[name][...] = ours.trainable()[name][::-1].copy()
    found = list(our_steps(ours, tokens, labels, 2))
    if wrong == "no clipping":
        shrink = MAX_NORM / found[1]["norm"]
        found[1]["gradients"] = {name: g * shrink for name, g in found[1]["gradients"].items()}
    assert difference(found[1]["gradients"], expected[1]["gradients"]) > 100 * TOLERANCE


# ---- QLoRA against bitsandbytes' Linear4bit ----------------------------------------------------------------

# Every in_features is a multiple of 64: with others bitsandbytes may be wrong on a CPU with AVX512. And the
# models stay in train mode: in eval mode it computes in bfloat16.
CONFIG_4BIT = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}


@pytest.mark.parametrize("double_quant", [False, True])
def test_ten_qlora_steps(double_quant, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours = our_llama(their_llama(**SIZES_4BIT), tmp_path)
    ours.quantize(double_quant=double_quant)
    theirs = their_adapter(their_4bit(tmp_path, double_quant), CONFIG_4BIT)
    exact = our_llama(their_llama(**SIZES_4BIT), tmp_path, np.float64)
    packed = packed_weights(theirs)
    assert packed.keys() == {name + ".weight" for name in ours.config.linears()}
    for name, p in packed.items():
        q, state = ours.params[name], p.quant_state
        np.testing.assert_array_equal(q.packed, p.numpy().ravel(), err_msg=name)
        if double_quant:  # bitsandbytes' 8-bit codes on a CPU are not the nearest ones: take its own
            ours.params[name] = q = replace(q, **nested_constants(state))
        exact.params[name] = q
        expected = bitsandbytes.functional.dequantize_4bit(p.data, state).numpy()
        np.testing.assert_array_equal(rq.dequantize(q), expected, err_msg=name)
    our_adapter(ours, theirs, CONFIG_4BIT), our_adapter(exact, theirs, CONFIG_4BIT)
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))
    run_all(ours, theirs, exact)


def test_the_public_face_on_a_4_bit_base(tmp_path):
    """Double quantisation as it comes, to the nearest code: off by as much as bitsandbytes is on a CPU."""
    pytest.importorskip("bitsandbytes")
    their_llama(**SIZES_4BIT).save_pretrained(tmp_path)
    theirs = their_adapter(their_4bit(tmp_path, double_quant=True), CONFIG_4BIT)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = rq.Model.from_pretrained(tmp_path, quantize="nf4")
    ours.load_adapter(tmp_path / "adapter")
    tokens, labels = batch()
    for name, p in packed_weights(theirs).items():
        np.testing.assert_array_equal(ours.params[name].packed, p.numpy().ravel(), err_msg=name)
    logits, cache = ours.forward(tokens)
    loss, dlogits = rq.cross_entropy(logits, shifted(labels))
    grads = ours.backward(dlogits, cache)
    expected = next(their_steps(theirs, tokens, labels, 1))
    agree("loss", loss, expected["loss"], 1e-3)
    agree("gradients", grads, expected["gradients"], 1e-2)
