"""Which linears an adapter sits on, with which rank and scale, and what a config refuses."""

import numpy as np
import pytest
from gradcheck import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from refqlora.lora_config import LoraConfig


def test_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, rslora=True).scale == 8
    assert LoraConfig(rank=np.int64(3), alpha=np.float32(1)).scale == pytest.approx(1 / 3)
    assert type(LoraConfig(rank=4, alpha=np.float32(1)).scale) is float  # a NumPy scalar would widen float32


LINEARS = tiny_config().linears()
KINDS = [name.rsplit(".", 1)[1] for name in LINEARS[:7]]


def in_every_layer(*kinds):
    return [name for name in LINEARS if name.rsplit(".", 1)[1] in kinds]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEARS),
        (("q_proj", "v_proj"), in_every_layer("q_proj", "v_proj")),
        (["v_proj", "q_proj"], in_every_layer("q_proj", "v_proj")),
        (("self_attn.k_proj",), in_every_layer("k_proj")),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (("1.mlp.up_proj", "o_proj"), [*in_every_layer("o_proj"), "model.layers.1.mlp.up_proj"]),
        (r".*\.(q|down)_proj", in_every_layer("q_proj", "down_proj")),
        (r"model\.layers\.0\..*", LINEARS[:7]),
    ],
)
def test_targets(targets, expected):
    assert sorted(LoraConfig(targets=targets).matches(LINEARS)) == sorted(expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "query"), f"target query matches no linear; there are: {', '.join(sorted(KINDS))}"),
        (("_proj",), "target _proj matches no linear"),  # a suffix begins after a dot
        (("proj",), "target proj matches no linear"),
        (("lm_head",), "target lm_head matches no linear"),
        ((), r"target \(\) matches no linear"),
        (r".*\.q", "a regular expression for the whole name, matches no linear"),
        ("q_proj", "target 'q_proj', a regular expression for the whole name, matches no linear"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(targets=targets).matches(LINEARS)


@given(st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
def test_a_list_is_the_regular_expression_of_its_alternatives(kinds):
    pattern = rf".*\.({'|'.join(kinds)})"
    assert LoraConfig(targets=tuple(kinds)).matches(LINEARS) == LoraConfig(targets=pattern).matches(LINEARS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of 1 or more, not 0"),
        ({"rank": 2.0}, "rank .* not 2.0"),
        ({"rank": True}, "rank .* not True"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": float("nan")}, "alpha .* not nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout .* not -0.1"),
        ({"dropout": float("nan")}, "dropout .* not nan"),
        ({"rslora": "yes"}, "rslora must be true or false, not 'yes'"),
        ({"targets": "*_proj"}, r"target '\*_proj' is no regular expression"),
        ({"targets": ("q_proj", 3)}, "targets must be a string or names"),
    ],
)
def test_unusable_configs(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


# ---- what PEFT calls exclude_modules, layers_to_transform, rank_pattern, alpha_pattern -------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ("q_proj", "1.mlp.up_proj")}, [n for n in LINEARS if "q_proj" not in n and "1.mlp.up" not in n]),
        ({"exclude": r".*mlp.*"}, [name for name in LINEARS if "mlp" not in name]),
        ({"exclude": ("lm_head",)}, LINEARS),
        ({"layers": 1}, LINEARS[7:]),
        ({"layers": (0, 1), "targets": ("k_proj",)}, in_every_layer("k_proj")),
        ({"layers": [1], "layers_pattern": "layers"}, LINEARS[7:]),
        ({"layers": [0], "layers_pattern": ("h", "layers"), "targets": ("k_proj",)}, in_every_layer("k_proj")[:1]),
        ({"layers": [0], "exclude": r".*_proj", "targets": ("k_proj",)}, None),
        ({"layers": [0], "layers_pattern": "h"}, None),
        ({"layers": [2]}, None),
    ],
)
def test_exclusions_and_layers(options, expected):
    config = LoraConfig(**options)
    if expected is None:
        with pytest.raises(ValueError, match=r"no linear is left|there is no layer"):
            config.matches(LINEARS)
    else:
        assert config.matches(LINEARS) == expected


def test_patterns_take_the_first_key_that_fits():
    """PEFT's rule: a regular expression for the end of the name, from its start or from a dot on."""
    config = LoraConfig(
        rank=8,
        alpha=16,
        rank_pattern={"1.self_attn.q_proj": 2, "q_proj": 4, "^mlp.up_proj": 32},
        alpha_pattern={r"layers\.\d\.mlp\..*": 3, "_proj": 99},
    )
    layer = "model.layers.{}.{}".format
    ranks = {name: config.rank_of(name) for name in LINEARS}
    assert ranks[layer(1, "self_attn.q_proj")] == 2
    assert ranks[layer(0, "self_attn.q_proj")] == 4
    assert ranks[layer(0, "mlp.up_proj")] == 8  # ^ is the start of the whole name
    assert config.scale_of(layer(1, "self_attn.q_proj")) == 16 / 2
    assert config.scale_of(layer(1, "mlp.down_proj")) == 3 / 8
    assert config.scale == 2
    rslora = LoraConfig(rank=8, alpha=16, rslora=True, rank_pattern={"q_proj": 4})
    assert rslora.scale_of(layer(0, "self_attn.q_proj")) == 8
    with pytest.raises(ValueError, match=r'rank_pattern: "\^mlp\.up_proj" matches no linear that has an adapter'):
        config.matches(LINEARS)
    with pytest.raises(ValueError, match='alpha_pattern: "k_proj" matches no linear'):
        LoraConfig(targets=("q_proj",), alpha_pattern={"k_proj": 2}).matches(LINEARS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dora": 1}, "dora must be true or false, not 1"),
        ({"init": "svd"}, "init must be one of default, gaussian, pissa, olora or pissa_niter_N, not 'svd'"),
        ({"init": "pissa_niter_"}, "init must be"),
        ({"init": None}, "init must be"),
        ({"exclude": "*"}, r"exclude '\*' is no regular expression"),
        ({"exclude": [1]}, "excludes must be a string or names"),
        ({"layers": "1"}, "layers must be numbers of layers, not '1'"),
        ({"layers": ()}, "layers must be numbers"),
        ({"layers": [-1]}, "layers must be numbers"),
        ({"layers": [0], "targets": ".*"}, "layers do not go with a regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers"),
        ({"rank_pattern": {"q_proj": 0}}, 'rank_pattern of "q_proj" must be a whole number of 1 or more, not 0'),
        ({"rank_pattern": {"q_proj": 2.5}}, 'rank_pattern of "q_proj"'),
        ({"alpha_pattern": {"q_proj": -1}}, 'alpha_pattern of "q_proj" must be a positive number'),
        ({"alpha_pattern": {"q_proj(": 1}}, r"alpha_pattern 'q_proj\(' is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_an_exclusion_that_excludes_nothing_is_a_mistake():
    with pytest.raises(ValueError, match="exclude o_prj matches no linear; there are: down_proj"):
        LoraConfig(exclude=("o_prj",)).matches(LINEARS)


def test_all_linear_is_read_in_any_case():
    assert LoraConfig(targets="All-Linear").matches(LINEARS) == LINEARS
