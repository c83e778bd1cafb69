"""The papers' numbers: what agrees does, to the digits that were published, and what does not says why."""

import numpy as np
import pytest

import refqlora as rq
from refqlora.memory.models import adapter_size, base_bytes, model_config
from refqlora.memory.papers import claims

CLAIMS = claims()


def claim(what, where=""):
    found = [one for one in CLAIMS if one.what == what and where in one.where]
    assert len(found) == 1, what
    return found[0]


def test_no_claim_stands_twice():
    assert len({(one.what, one.where) for one in CLAIMS}) == len(CLAIMS) > 40


@pytest.mark.parametrize("one", CLAIMS, ids=lambda one: f"{one.where}: {one.what}")
def test_a_claim_agrees_or_says_why_not(one):
    """Within 2.5 %, which is less than what the papers round; a bound is on its side."""
    assert one.formula
    bounds = {"QLoRA of 65B: less than": (0.5, 1), "16-bit fine-tuning of 65B: more than": (1, 1.05)}
    low, high = bounds.get(one.what, (0.975, 1.025))
    assert (low <= one.ratio <= high) or one.note, one


def test_the_slips_are_found():
    slips = {one.what for one in CLAIMS if one.note.startswith("A slip")}
    assert slips == {
        "r 2 on q, k, v and o",
        "r 4 on q and v of gpt2-medium",
        "r 4 on q and v of gpt2-large",
        *(f"moments, llama-{size}b: its three matrices" for size in (7, 13, 33, 65)),
        "of 1M parameters",
        "its value",
    }
    assert claim("r 2 on q, k, v and o").ratio == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(("size", "mib"), [(7, 1152), (13, 1800), (33, 3510), (65, 5760)])
def test_figure_6_has_an_mlp_of_two_matrices(size, mib):
    assert claim(f"moments, llama-{size}b: two matrices of 4 D in the MLP").ours == mib
    three = claim(f"moments, llama-{size}b: its three matrices")
    assert 1.05 < three.ratio < 1.07
    assert three.ours == pytest.approx({7: 1220, 13: 1910, 33: 3720, 65: 6100}[size], abs=5)


def test_exact_counts_are_exact():
    for what in ("trainable", "parameters in all", "r 2 on them", "weights of 512 x 512", "constants of 1M parameters"):
        assert claim(what).ours == claim(what).theirs, what
    assert 36_715_216 - 1e6 * claim("the adapter's file").ours == pytest.approx(15_056)
    assert claim("of 1M parameters").ours == 126_953.125
    assert claim("double quantisation saves").ours == 0.373046875


def test_gpt_3_in_lora():
    assert claim("r 1 on q and v").ours == 4.718592
    assert claim("a checkpoint of r 4 on q and v").ours * 1e6 == 36 * 2**20
    assert claim("the checkpoint is so many times smaller").ours == pytest.approx(9251, abs=1)


def test_the_nearest_value_is_not_the_introductions():
    assert claim("the position nearest to 0.2121").ours == 10
    assert claim("its value").ours == pytest.approx(0.2461, abs=5e-5)


def test_sizes_are_those_of_a_real_model():
    """What is counted from a config's shapes is what the arrays of a model have."""
    small = rq.Config(50, 64, 96, 2, 2, 1, 32)
    model = rq.Model.from_config(small, 0)
    model.quantize()
    model.add_adapter(rank=3, targets=["q_proj", "down_proj"])
    assert adapter_size(small, rq.LoraConfig(rank=3, targets=("q_proj", "down_proj"))) == sum(
        p.size for p in model.trainable().values()
    )
    held = sum(w.nbytes for w in model.params.values())
    assert base_bytes(small, itemsize=4) == held
    assert isinstance(held, int | np.integer)


def test_65b_saves_three_gigabytes():
    c = model_config("llama-65b")
    assert base_bytes(c, double_quant=False) - base_bytes(c) == pytest.approx(3.02e9, rel=0.005)
