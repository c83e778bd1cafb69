"""Which linears an adapter sits on, with which rank and scale, and what a config refuses."""

import re

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
        (("query",), f"targets: expected one of {', '.join(sorted(KINDS))}, got 'query'"),
        (("_proj",), "targets: expected one of .*, got '_proj'"),  # a suffix begins after a dot
        (("proj",), "targets: expected one of .*, got 'proj'"),
        (("lm_head",), "targets: expected one of .*, got 'lm_head'"),
        ((), "targets: expected one of .*, got none"),
        (r".*\.q", r"targets: expected a pattern for names that end in .*, got '\.\*\\\\\.q'"),
        ("q_proj", "targets: expected a pattern for names that end in .*, got 'q_proj'"),
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
        ({"rank": 0}, "rank: expected a whole number from 1 to 2147483647, got 0"),
        ({"rank": 2.0}, "rank: .* got 2.0"),
        ({"rank": True}, "rank: .* got True"),
        ({"rank": 10**400}, r"rank: .* got 10+\.\.\.$"),
        ({"alpha": -1}, "alpha: expected a number from 0 to 1e\\+09, got -1"),
        ({"alpha": 1e300}, "alpha: .* got 1e\\+300"),
        ({"alpha": 10**400}, r"alpha: .* got 10+\.\.\.$"),
        ({"alpha": float("nan")}, "alpha: .* got nan"),
        ({"alpha": True}, "alpha: .* got True"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: .* got -0.1"),
        ({"dropout": float("nan")}, "dropout: .* got nan"),
        ({"rslora": "yes"}, "rslora: expected true or false, got 'yes'"),
        ({"targets": "*_proj"}, r"targets: '\*_proj' is not a regular expression"),
        ({"targets": ("q_proj", 3)}, "targets: expected names, or one regular expression, got"),
        ({"targets": ("q_proj",) * 10_001}, "targets: expected at most 10000 names, got 10001"),
        ({"rank_pattern": {str(i): 1 for i in range(10_001)}}, "rank_pattern: expected at most 10000 keys, got 10001"),
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
        with pytest.raises(ValueError, match=r"exclude and layers leave no linear|layers: expected numbers"):
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
    idle = "{}: expected names of linears that get an adapter, got {!r}".format
    assert config.idle(LINEARS) == [idle("rank_pattern", "^mlp.up_proj"), idle("alpha_pattern", "_proj")]
    config = LoraConfig(targets=("q_proj",), alpha_pattern={"k_proj": 2})
    assert config.idle(LINEARS) == [idle("alpha_pattern", "k_proj")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dora": 1}, "dora: expected true or false, got 1"),
        ({"init": "svd"}, "init: expected default, gaussian, pissa, olora or pissa_niter_0 to 999, got 'svd'"),
        ({"init": "pissa_niter_"}, "init: expected"),
        ({"init": None}, "init: expected"),
        ({"init": "pissa_niter_999999999"}, "init: expected"),
        ({"exclude": "*"}, r"exclude: '\*' is not a regular expression"),
        ({"exclude": [1]}, "exclude: expected names, or one regular expression"),
        ({"layers": "1"}, "layers: expected numbers of layers, got '1'"),
        ({"layers": ()}, "layers: expected numbers"),
        ({"layers": [-1]}, "layers: expected numbers"),
        ({"layers": [0], "targets": ".*"}, "layers: expected none with a regular expression as targets"),
        ({"layers_pattern": "layers"}, "layers_pattern: expected only together with layers"),
        ({"layers": [0], "layers_pattern": "(a|a)*"}, 'layers_pattern: expected a name such as "layers"'),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern of 'q_proj': expected a whole number .* got 0",
        ),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern of 'q_proj': "),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern of 'q_proj': expected a number from 0"),
        ({"alpha_pattern": {"q_proj(": 1}}, r"alpha_pattern: 'q_proj\(' is not a regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected regular expressions with a value each"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"exclude": ("lm_head", "embed_tokens")}, []),
        ({"exclude": ("o_prj", "lm_head")}, [f"exclude: expected one of {', '.join(sorted(KINDS))}, got 'o_prj'"]),
        ({"targets": ("q_proj", "query")}, [f"targets: expected one of {', '.join(sorted(KINDS))}, got 'query'"]),
        ({"layers": (0, 7)}, ["layers: expected numbers among [0, 1], got 7"]),
    ],
)
def test_what_matches_nothing_is_named(options, expected):
    config = LoraConfig(**options)
    assert config.idle(LINEARS) == expected
    assert config.matches(LINEARS)


def test_as_many_patterns_as_linears_are_matched_at_once():
    """One key for each linear of a large model, as some writers have it."""
    linears = [f"model.layers.{i}.{name}" for i in range(40) for name in ("self_attn.q_proj", "mlp.up_proj")]
    config = LoraConfig(rank_pattern={f"^{re.escape(name)}": i + 1 for i, name in enumerate(linears)})
    assert [config.rank_of(name) for name in linears] == list(range(1, 81))


def test_all_linear_is_read_in_any_case():
    assert LoraConfig(targets="All-Linear").matches(LINEARS) == LINEARS
