"""A model on both sides, transformers' and ours, and the comparison of what they compute. Needs the real libraries."""

import numpy as np
from closeness import steps_agree

import refqlora as rq
from refqlora.parity.decoders import our_steps
from refqlora.parity.differences import relative_difference
from refqlora.parity.oracles import their_model, their_steps
from refqlora.parity.settings import MAX_NORM, batch

SIZES = {
    "vocab_size": 37,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,  # not hidden_size / heads
    "rms_norm_eps": 1e-5,
}
TOLERANCE = 1e-5
ADAPTERS = {
    "q and v": {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"},
    "rslora": {"r": 5, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
    "regex": {"r": 2, "lora_alpha": 5, "target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.(gate|down)_proj)"},
}
SIZES_4BIT = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def their_llama(seed=0, **changes):
    return their_model("LlamaConfig", seed, **{**SIZES, **changes})


def our_llama(theirs, path, dtype=np.float32):
    theirs.save_pretrained(path)
    return rq.Model.from_pretrained(path, dtype=dtype)


def agree(what, found, expected, tolerance=TOLERANCE):
    worst = relative_difference(found, expected)
    print(f"{what:<40} {worst:.1e}")
    assert worst < tolerance, what


def run_all(ours, theirs, exact):
    """Ten steps of each, compared -> theirs, by_fact."""
    tokens, labels = batch()
    runs = our_steps(ours, tokens, labels, 10), their_steps(theirs, tokens, labels, 10)
    expected = steps_agree(*runs, our_steps(exact, tokens, labels, 10))
    assert min(expected["norm"].values()) > MAX_NORM  # so that clipping is in it
    return expected


def nested_constants(state):
    """bitsandbytes' own constants of double quantisation, as fields of a QuantizedTensor. On a CPU its 8-bit codes are
    not the nearest ones, and the map is made there, with the last bits of that CPU."""
    second = state.state2
    return {
        "absmax": state.absmax.numpy(),
        "nested_absmax": second.absmax.numpy(),
        "offset": np.float32(state.offset.item()),
        "nested_codebook": second.code.numpy(),
    }
