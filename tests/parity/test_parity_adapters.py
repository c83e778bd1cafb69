"""Adapters held live against PEFT: what each writes and the other reads, ten steps of every kind, merging, adding up.

Differences as in test_parity_transformers, whose helpers these are.
"""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import pairs
from closeness import agree_but_for_rounding
from pairs import ADAPTERS, SIZES_4BIT, TOLERANCE, agree, nested_constants, our_llama, run_all

import refqlora as rq
from refqlora.adapters import linear_of
from refqlora.parity.decoders import our_steps
from refqlora.parity.differences import relative_difference as difference
from refqlora.parity.oracles import logits_of, packed_weights, residuals, set_apart, their_adapter, their_steps, trained
from refqlora.parity.settings import batch

ALL = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}
KINDS = ADAPTERS | {
    "DoRA": {**ALL, "use_dora": True},
    "DoRA, rsLoRA, list": {**ALL, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "PiSSA": {**ALL, "init_lora_weights": "pissa"},
    "DoRA, PiSSA": {**ALL, "use_dora": True, "init_lora_weights": "pissa"},
    "OLoRA": {**ALL, "init_lora_weights": "olora"},
    "OLoRA, rsLoRA": {**ALL, "lora_alpha": 3, "init_lora_weights": "olora", "use_rslora": True},
    "gaussian": {**ALL, "init_lora_weights": "gaussian"},
    "orthogonal": {**ALL, "r": 4, "init_lora_weights": "orthogonal"},
    "rank and alpha patterns": {
        **ALL,
        "rank_pattern": {"layers.1.mlp.down_proj": 7, "mlp.*_proj": 2, "q_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 2, r"mlp\..*": 2},
    },
    "patterns, rsLoRA, DoRA": {**ALL, "use_rslora": True, "use_dora": True, "rank_pattern": {"k_proj": 2}},
    "layers": {**ALL, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers of a pattern": {
        **ALL, "target_modules": ["v_proj", "down_proj"], "layers_to_transform": 0, "layers_pattern": "layers",
    },
    "exclusions": {**ALL, "exclude_modules": ["0.self_attn.q_proj", "o_proj"]},
    "excluded by a regex": {**ALL, "target_modules": r".*_proj", "exclude_modules": r".*\.mlp\..*"},
}  # fmt: skip


def their_llama(**changes):
    """Singular values that do not nearly agree: else rounding decides which directions PiSSA takes."""
    return set_apart(pairs.their_llama(**changes), ALL["r"])


def name_here(name):
    """A torch parameter's name -> ours."""
    name = name.removeprefix("base_model.model.").replace(".default.", ".")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def arrays(theirs):
    return {name_here(name): p.detach().numpy().copy() for name, p in trained(theirs)}


def stirred(config, seed=1, base=None):
    """PEFT's model with this adapter, as after some training: every A, B and magnitude moved."""
    theirs = their_adapter(base or their_llama(), config, b_is_zero=True, seed=seed)
    size = (
        0.02 if config.get("init_lora_weights") in ("pissa", "olora") else 0.1
    )  # they are of order one from the start
    with torch.no_grad():
        for name, p in trained(theirs):
            p.mul_(torch.rand_like(p) + 0.5) if "magnitude" in name else p.add_(size * torch.randn_like(p))
    return theirs


def both(config, path, **options):
    """(ours, theirs, exact): the model with PEFT's adapter, loaded from PEFT's files, here also in float64."""
    ours = our_llama(their_llama(), path / "base")
    theirs = stirred(config, **options)
    theirs.save_pretrained(path / "adapter")
    ours.load_adapter(path / "adapter")
    exact = in_float64(path / "base", path / "adapter")
    on_pefts_residual(ours, theirs, exact)
    return ours, theirs, exact


def in_float64(base, adapter):
    exact = rq.Model.from_pretrained(base, dtype=np.float64)
    exact.load_adapter(adapter)
    return exact


def on_pefts_residual(ours, theirs, exact):
    """Check the residuals of PiSSA and OLoRA, and go on from PEFT's own, whose float32 decomposition is less exact."""
    residual, exact_residual = (model.adapters[model.active].residual for model in (ours, exact))
    pefts = {name: w for name, w in residuals(theirs).items() if name in residual}
    if pefts:
        agree_but_for_rounding("residual", residual, pefts, exact_residual)
        residual |= pefts
        exact_residual |= {name: w.astype(np.float64) for name, w in pefts.items()}


# ---- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_what_peft_saves_loads_here(config, tmp_path):
    ours, theirs, _ = both(config, tmp_path)
    expected = arrays(theirs)
    assert ours.trainable().keys() == expected.keys()
    for name, p in expected.items():
        np.testing.assert_array_equal(ours.trainable()[name], p, err_msg=name)
    tokens, _ = batch()
    expected = logits_of(theirs, tokens)
    agree("logits", ours.forward(tokens)[0], expected)
    ours.set_adapter(None)
    assert difference(ours.forward(tokens)[0], expected) > 100 * TOLERANCE
    agree("adapters off", ours.forward(tokens)[0], logits_of(their_llama(), tokens))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_what_we_save_loads_in_peft_without_a_word(config, tmp_path):
    ours, _, exact = both(config, tmp_path)
    ours.save_adapter(tmp_path / "ours", base=str(tmp_path / "base"))
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours", is_trainable=True)
    loaded = arrays(theirs)
    assert loaded.keys() == ours.trainable().keys()
    for name, p in loaded.items():
        np.testing.assert_array_equal(p, ours.trainable()[name], err_msg=name)
    on_pefts_residual(ours, theirs, exact)
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))
    if "init_lora_weights" not in config:
        result = theirs.load_adapter(tmp_path / "ours", "again")
        assert result.unexpected_keys == []
        assert [name for name in result.missing_keys if "lora" in name] == []


FRESH = [
    {"dora": True},
    {"init": "pissa"},
    {"init": "pissa_niter_4"},
    {"init": "olora", "rslora": True},
    {"init": "pissa", "dora": True, "rank_pattern": {"q_proj": 3, ".*_proj": 4}},
    {"alpha_pattern": {"q_proj": 3, ".*": 4, "1.mlp.up_proj": 5}},  # written in another order they mean something else
    {"layers": (1,), "exclude": ("o_proj",), "init": "gaussian"},
]


@pytest.mark.parametrize("plain", [None, True])
@pytest.mark.parametrize("options", FRESH, ids=str)
def test_what_we_made_and_trained_loads_in_peft(options, plain, tmp_path):
    """Written as what it is, and as plain LoRA of twice the rank."""
    ours = our_llama(their_llama(), tmp_path / "base")
    ours.add_adapter(rank=5, alpha=7, **options)
    tokens, labels = batch()
    for _ in our_steps(ours, tokens, labels, 3):
        pass
    ours.save_adapter(tmp_path / "ours", plain=plain)
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    if theirs.peft_config["default"].init_lora_weights is not True:
        on_pefts_residual(ours, theirs, in_float64(tmp_path / "base", tmp_path / "ours"))
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_peft_converts_to_plain_lora_loads_here(init, tmp_path):
    theirs = their_adapter(their_llama(), {**ALL, "init_lora_weights": init}, b_is_zero=True)
    start = str(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(start)
    theirs.peft_config["default"].init_lora_weights = init
    tokens, labels = batch()
    for _ in their_steps(theirs, tokens, labels, 3):
        pass
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    ours = our_llama(their_llama(), tmp_path / "base")
    ours.load_adapter(tmp_path / "plain")
    assert ours.adapters["default"].config.rank == 10
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))


def test_the_residual_of_a_new_pissa_adapter(tmp_path):
    theirs = their_adapter(their_llama(), {**ALL, "init_lora_weights": "pissa"}, b_is_zero=True)
    ours = our_llama(their_llama(), tmp_path)
    exact = rq.Model.from_pretrained(tmp_path, dtype=np.float64)
    for model in (ours, exact):
        model.add_adapter(rank=5, alpha=7, init="pissa")
    on_pefts_residual(ours, theirs, exact)


@pytest.mark.parametrize("kind", ["PiSSA", "DoRA, PiSSA"])
def test_pissa_from_its_files_alone(kind, tmp_path):
    """Each takes the weights apart itself."""
    theirs = stirred(KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = our_llama(their_llama(), tmp_path / "base")
    ours.load_adapter(tmp_path / "adapter")
    exact = in_float64(tmp_path / "base", tmp_path / "adapter")
    tokens, _ = batch()
    agree_but_for_rounding("logits", ours.forward(tokens)[0], logits_of(theirs, tokens), exact.forward(tokens)[0])


# ---- ten steps -----------------------------------------------------------------------------------------------

STEPPED = (
    "DoRA",
    "PiSSA",
    "DoRA, PiSSA",
    "OLoRA",
    "OLoRA, rsLoRA",
    "rank and alpha patterns",
    "patterns, rsLoRA, DoRA",
)


@pytest.mark.parametrize("kind", STEPPED)
def test_ten_steps(kind, tmp_path):
    run_all(*both(KINDS[kind], tmp_path))


@pytest.mark.parametrize(
    ("options", "double_quant"), [({"use_dora": True}, True), ({"init_lora_weights": "olora"}, False)], ids=str
)
def test_ten_steps_on_a_4_bit_base(options, double_quant, tmp_path):
    """QDoRA, and OLoRA on what NF4 says (PEFT dequantises, takes apart, and quantises the rest again)."""
    pytest.importorskip("bitsandbytes")
    config = {**ALL, **options}
    ours = our_llama(their_llama(**SIZES_4BIT), tmp_path / "base")
    ours.quantize(double_quant=double_quant)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double_quant,
    )
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    ours.params |= with_their_constants(ours.params, packed_weights(base))
    theirs = stirred(config, base=base)
    theirs.save_pretrained(tmp_path / "adapter")
    exact = rq.Model.from_pretrained(tmp_path / "base", dtype=np.float64)
    exact.params |= {name: q for name, q in ours.params.items() if isinstance(q, rq.QuantizedTensor)}
    for model in (ours, exact):
        model.load_adapter(tmp_path / "adapter")
        residual = model.adapters["default"].residual
        residual |= with_their_constants(residual, packed_weights(theirs))
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))
    run_all(ours, theirs, exact)


def with_their_constants(weights, packed):
    """Our quantised weights with bitsandbytes' own 8-bit constants, which on a CPU are not the nearest; and its codes,
    where float32's last bit in a residual decided otherwise."""
    changed = {}
    for name in weights.keys() & packed.keys():
        q, state = weights[name], packed[name].quant_state
        if not hasattr(q, "packed"):
            continue
        theirs = packed[name].numpy().ravel()
        assert (q.packed != theirs).mean() < 2e-3, name
        if q.nested_absmax is not None:
            q = replace(q, **nested_constants(state))
        else:
            q = replace(q, absmax=state.absmax.numpy())
        changed[name] = replace(q, packed=theirs.copy())
    return changed


# ---- merging and adding --------------------------------------------------------------------------------------

MERGED = ["rslora", "DoRA", "PiSSA", "OLoRA", "rank and alpha patterns"]


@pytest.mark.parametrize("kind", MERGED)
def test_merging(kind, tmp_path):
    ours, theirs, _ = both(KINDS[kind], tmp_path)
    tokens, _ = batch()
    logits, _ = ours.forward(tokens)
    for linear in ours.config.linears():
        weight, lora = linear_of(ours.params, ours.adapters[ours.active], linear)
        ours.params[linear + ".weight"] = weight if lora is None else rq.merge(weight, lora)
    ours.set_adapter(None)
    merged = theirs.merge_and_unload()
    agree("merged weights", ours.params, {name: p.detach().numpy() for name, p in merged.named_parameters()})
    agree("merged logits and PEFT's", ours.forward(tokens)[0], logits_of(merged, tokens))
    agree("merged logits and unmerged", ours.forward(tokens)[0], logits)


PAIR = (
    {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    {"r": 5, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
)
UNEQUAL = (PAIR[0], {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}})


@pytest.mark.parametrize(
    ("configs", "method", "rank"),
    [
        (PAIR, "cat", None),
        (UNEQUAL, "cat", None),
        (UNEQUAL, "svd", None),
        (UNEQUAL, "svd", 8),
        (UNEQUAL, "svd", 2),
        (PAIR, "linear", None),
    ],
)
def test_adding_adapters(configs, method, rank, tmp_path):
    theirs = their_llama()
    ours = our_llama(theirs, tmp_path / "base")
    theirs = stirred(configs[0], base=theirs)
    theirs.save_pretrained(tmp_path / "a")
    other = stirred(configs[1], seed=2)
    other.save_pretrained(tmp_path / "b")
    for name in "ab":
        ours.load_adapter(tmp_path / name, name)
        theirs.load_adapter(tmp_path / name, name)
    factors = {"a": 0.7, "b": -0.3}
    theirs.add_weighted_adapter(["a", "b"], list(factors.values()), "c", combination_type=method, svd_rank=rank)
    theirs.set_adapter("c")
    ours.combine_adapters(factors, "c", method, rank)
    modules, deltas = dict(theirs.get_base_model().named_modules()), {}
    for linear in ours.adapters["c"].linears:
        a, b, scale, *_ = ours.adapters["c"].lora(linear)
        deltas[linear] = scale * b @ a
        if method != "svd":  # whose factors are free in sign
            agree("A", a, modules[linear].lora_A["c"].weight.detach().numpy())
            agree("B", b, modules[linear].lora_B["c"].weight.detach().numpy())
    theirs_too = {name: m for name, m in modules.items() if "c" in getattr(m, "lora_A", {})}
    agree("deltas", deltas, {name: m.get_delta_weight("c").detach().numpy() for name, m in theirs_too.items()})
    tokens, _ = batch()
    agree("logits", ours.forward(tokens)[0], logits_of(theirs, tokens))


# ---- every key of PEFT's config has been decided -------------------------------------------------------------


def test_every_key_of_pefts_config_is_known(tmp_path):
    from refqlora.files import adapter_files as known

    theirs = stirred(ALL)
    theirs.save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    decided = known.FIELDS.keys() | known.MUST_BE.keys() | known.IGNORED
    assert keys <= decided, keys - decided
