"""Random training steps, for the memory's prediction to be held against its measurement.

python tests/setups.py --cases 200 --seed 0     how many predictions are equal to the byte, and how far off a peak is
"""

import argparse

from hypothesis import strategies as st

import refqlora as rq
from refqlora.architectures import ARCHITECTURES
from refqlora.lora_config import LoraConfig
from refqlora.memory.ledger import PERSISTENT
from refqlora.memory.measured import measure
from refqlora.memory.predicted import predict
from refqlora.memory.setup import METHODS, Setup


@st.composite
def setups(draw, large=False):
    """A step of any method on a small model of any architecture, with odd sizes; `large`: of 64 MiB and more."""
    model_type = draw(st.sampled_from(sorted(ARCHITECTURES)))
    fixed = dict(ARCHITECTURES[model_type].fixed)
    kv_heads, groups = draw(st.integers(1, 3)), 1 if model_type == "gpt2" else draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(2, 9)) * (4 if large else 1)
    heads = kv_heads * groups
    hidden = heads * head_dim if model_type == "gpt2" else draw(st.integers(3, 60)) * (8 if large else 1)
    soft = draw(st.booleans()) and model_type == "gemma2"
    sizes = {
        "vocab_size": draw(st.integers(50, 900)) * (9 if large else 1),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(5, 120)) * (8 if large else 1),
        "layers": draw(st.integers(1, 4)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "tied": draw(st.booleans()),
        "activation": "gelu_tanh" if model_type in ("gpt2", "gemma2") else "silu",
        "max_positions": 4096,
        **({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if soft else {}),
    }
    config = rq.Config(model_type=model_type, **sizes, **fixed)
    batch, seq = draw(st.integers(1, 5)), draw(st.integers(2, 300))
    if large:
        seq = max(seq, 64)
        per_row = 8 * config.vocab_size + 16 * config.layers * (config.hidden_size + config.intermediate_size)
        batch = max(batch, -(-100_000_000 // (per_row * seq)))
    lora = LoraConfig(
        rank=draw(st.integers(1, 9)),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        dora=draw(st.booleans()),
        targets=draw(st.sampled_from(["all-linear", tuple(name.split(".")[-1] for name in config.architecture.qkv)])),
    )
    return Setup(
        config,
        draw(st.sampled_from(METHODS)),
        batch,
        seq,
        lora,
        double_quant=draw(st.booleans()),
        micro_batch=draw(st.sampled_from([None, 1, 2])) if not large else None,
        recompute=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float64"])),
    )


def compared(setup):
    """The prediction, the measurement, and {category: (predicted, measured)} of what is not equal to the byte."""
    predicted, measured = predict(setup), measure(setup)
    mine, found = predicted.bytes(), measured.categories
    unequal = {key: (mine.get(key, 0), found.get(key, 0)) for key in (*mine, *found)}
    unequal = {key: pair for key, pair in unequal.items() if pair[0] != pair[1]}
    if predicted.persistent != measured.allocated["between steps"]:
        unequal["allocator"] = (predicted.persistent, measured.allocated["between steps"])
    return predicted, measured, unequal


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--cases", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--large", action="store_true", help="steps of 64 MiB and more")
    a = options.parse_args()
    from hypothesis import HealthCheck, Phase, given, seed, settings

    differences, equal, seen = [], 0, 0

    @seed(a.seed)
    @settings(
        max_examples=a.cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(setups(large=a.large))
    def each(setup):
        nonlocal equal, seen
        predicted, measured, unequal = compared(setup)
        seen += 1
        equal += not unequal
        differences.append((predicted.peak / measured.peak - 1, predicted.peak, setup))
        if unequal:
            print(unequal, setup)

    each()
    worst = max(differences, key=lambda one: abs(one[0]))
    kinds = len(PERSISTENT) + 2
    print(f"{seen} random steps: in {equal}, each of up to {kinds} categories equals what is held, to the byte,")
    print("and what is held between steps equals what the allocator says")
    print(f"the peak: {100 * worst[0]:+.3f} % at worst, of {worst[1]:,} bytes")
    print(worst[2])


if __name__ == "__main__":
    main()
