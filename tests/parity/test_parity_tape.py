"""What the tape says that autograd keeps, held against what torch keeps, byte for byte: transformers' own layers, with
PEFT's adapters, on dense weights and on bitsandbytes' 4-bit ones."""

import dataclasses
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import refqlora as rq
from refqlora.files.config_json import config_to_dict
from refqlora.memory.tape import Run, model_keeps

BATCH, SEQ, RANK = 2, 48, 8
SIZES = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "layers": 3, "heads": 4, "head_dim": 64}
LLAMA = rq.Config(**SIZES, kv_heads=2)
GEMMA = rq.Config(**SIZES, kv_heads=2, model_type="gemma2", activation="gelu_tanh", query_pre_attn_scalar=64)
QV = ["q_proj", "v_proj"]


def fused(module, query, key, value, mask, scaling=None, **ignored):
    """Attention as flash-attn computes it for Gemma 2, but for the cap of its scores, of which it keeps nothing."""
    y = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("fused", fused)


def their_model(config, run, targets, recompute):
    d = config_to_dict(config) | {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    theirs = transformers.AutoConfig.for_model(**d)
    theirs._attn_implementation = "fused" if config.model_type == "gemma2" else "sdpa"
    dtype = {2: torch.bfloat16, 4: torch.float32}[run.weight]
    model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    if run.four_bit:
        in_four_bits(model)
    if run.ranks:
        lora = peft.LoraConfig(r=RANK, target_modules=targets)
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=run.adapter == 4)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def in_four_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
                    new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(block, name, new.to("cpu"))
    model.is_loaded_in_4bit = True


def bytes_kept(model, config, autocast):
    """The bytes of all storages that torch keeps for the backward, but for weights, tokens and what the loss keeps."""
    tokens, kept = torch.randint(0, config.vocab_size, (BATCH, SEQ)), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    four_bit = [getattr(p, "quant_state", None) for p in model.parameters()]
    states = [t for s in four_bit if s is not None for t in (s.absmax, s.code, s.state2 and s.state2.absmax)]
    weights |= {t.untyped_storage().data_ptr() for t in states if t is not None}

    def pack(x):
        storage, frame = x.untyped_storage(), sys._getframe()
        while frame is not None and frame.f_code.co_name not in ("ForCausalLMLoss", "bytes_kept"):
            frame = frame.f_back
        in_loss = frame.f_code.co_name == "ForCausalLMLoss"
        if storage.data_ptr() not in weights and x.is_floating_point() and x.ndim and not in_loss:
            kept[storage.data_ptr()] = storage
        return x

    with (
        warnings.catch_warnings(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        warnings.simplefilter("ignore")
        model(input_ids=tokens, labels=tokens)
    return sum(storage.nbytes() for storage in kept.values())


CASES = {
    "LoRA on all linears": (LLAMA, {}),
    "on q and v": (LLAMA, {"targets": QV}),
    "on down alone": (LLAMA, {"targets": ["down_proj"]}),
    "on gate alone": (LLAMA, {"targets": ["gate_proj"]}),
    "adapters in 16 bits": (LLAMA, {"adapter": 2}),
    "under autocast": (LLAMA, {"autocast": True}),
    "q and v under autocast": (LLAMA, {"autocast": True, "targets": QV}),
    "full": (LLAMA, {"trained": True}),
    "full in float32": (LLAMA, {"trained": True, "weight": 4}),
    "full, float32 weights under autocast": (LLAMA, {"trained": True, "weight": 4, "autocast": True}),
    "LoRA, float32 weights under autocast": (LLAMA, {"weight": 4, "autocast": True}),
    "4 bits": (LLAMA, {"four_bit": True}),
    "4 bits under autocast": (LLAMA, {"four_bit": True, "autocast": True}),
    "4 bits, norms in float32": (LLAMA, {"four_bit": True, "weight": 4}),
    "4 bits, norms in float32, autocast": (LLAMA, {"four_bit": True, "weight": 4, "autocast": True}),
    "Mistral": (dataclasses.replace(LLAMA, model_type="mistral"), {}),
    "Qwen2": (rq.Config(**SIZES, kv_heads=2, model_type="qwen2", attention_bias=True), {}),
    "Qwen3": (rq.Config(**SIZES, kv_heads=2, model_type="qwen3"), {}),
    "Qwen3, full": (rq.Config(**SIZES, kv_heads=2, model_type="qwen3"), {"trained": True}),
    "Qwen3, autocast": (rq.Config(**SIZES, kv_heads=2, model_type="qwen3"), {"autocast": True}),
    "Phi-3": (rq.Config(**SIZES, kv_heads=2, model_type="phi3"), {}),
    "Phi-3, full": (rq.Config(**SIZES, kv_heads=2, model_type="phi3"), {"trained": True}),
    "Gemma 2": (GEMMA, {}),
    "Gemma 2, full": (GEMMA, {"trained": True}),
    "recomputed": (LLAMA, {"recompute": True}),
    "full, recomputed": (LLAMA, {"recompute": True, "trained": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_autograd_keeps_is_what_the_tape_says(case, monkeypatch):
    config, options = CASES[case]
    # PEFT asks it without a device, which means CUDA
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: options.get("autocast", False))
    recompute = options.get("recompute", False)
    given = {key: value for key, value in options.items() if key not in ("targets", "recompute")}
    names = options.get("targets") or sorted({name.rpartition(".")[2] for name in config.linears()})
    ranks = {} if options.get("trained") else dict.fromkeys(names, RANK)
    run = Run(BATCH * SEQ, given.pop("trained", False), ranks, **given)
    model = their_model(config, run, names, recompute)
    kept, _ = model_keeps(config, run, SEQ, recompute)
    if recompute:  # they are arguments of what is computed again, which hold them without keeping them
        kept.pop("RoPE: cos and sin")
    assert sum(one.nbytes for one in kept.values()) == bytes_kept(model, config, run.autocast)
