"""What an adapter is: which linears it sits on, its rank and scale on each, and how it starts; by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

INITS = ("default", "gaussian", "pissa", "olora")  # and "pissa_niter_N"
_NOT_LINEAR = ("lm_head", "embed_tokens")  # may be excluded, and are anyway


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: `adapter_config.json` holds these fields under PEFT's names, given in brackets.

    rank [r], alpha [lora_alpha]: the change is scaled by alpha/r, or by alpha/sqrt(r) with rslora [use_rslora].
    dropout [lora_dropout]: of the adapter's input, in training.
    targets [target_modules]: "all-linear" (every linear but the output head), names such as ("q_proj", "v_proj"), or
        a regular expression for the whole name.
    dora [use_dora]: learn each output's magnitude apart from its direction (Liu et al. 2024).
    init [init_lora_weights]: "default" or "gaussian", which leave the model as it is; "pissa" (Meng et al. 2024),
        "pissa_niter_N" or "olora" (Buyukakyuz 2024), which move a part of the weight into B A: see lora.init_lora.
    exclude [exclude_modules]: names or a regular expression; these get none.
    layers [layers_to_transform]: numbers of the layers that get one. layers_pattern: what the list of layers is called.
    rank_pattern, alpha_pattern: {name or regular expression: value} for linears whose rank or alpha is another.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank(self.rank, "rank")
        _check_alpha(self.alpha, "alpha")
        if not _is_real(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.init not in INITS and not (isinstance(self.init, str) and re.fullmatch(r"pissa_niter_\d+", self.init)):
            raise ValueError(f"init must be one of {', '.join(INITS)} or pissa_niter_N, not {self.init!r}")
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            object.__setattr__(self, "targets", "all-linear")
        else:
            _check_names(self.targets, "target")
        _check_names(self.exclude, "exclude")
        _check_names(self.layers_pattern, "layers_pattern")
        self._check_layers()
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must map names or regular expressions to values, not {pattern!r}")
            for key, value in pattern.items():
                _check_regex(key, name)
                check(value, f'{name} of "{key}"')

    def _check_layers(self) -> None:
        if self.layers is None:
            if self.layers_pattern:
                raise ValueError("layers_pattern needs layers")
            return
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        if not isinstance(layers, tuple | list) or not all(_is_whole(i) and i >= 0 for i in layers) or not layers:
            raise ValueError(f"layers must be numbers of layers, not {self.layers!r}")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError("layers do not go with a regular expression as target: let it name the layers")
        object.__setattr__(self, "layers", tuple(int(i) for i in layers))

    @property
    def scale(self) -> float:
        """s where no pattern says otherwise: alpha/r (LoRA, section 4.1), or alpha/sqrt(r) (rsLoRA, Kalajdzievski
        2023)."""
        return self.scale_of("")

    @property
    def changes_base(self) -> bool:
        """Whether the start moves a part of the weight into B A, so that the adapter sits on a residual of its own."""
        return self.init not in ("default", "gaussian")

    def rank_of(self, linear: str) -> int:
        """r on the linear of this name."""
        return int(_pattern_value(self.rank_pattern, linear, self.rank))

    def scale_of(self, linear: str) -> float:
        """s on the linear of this name."""
        rank = self.rank_of(linear)
        return float(_pattern_value(self.alpha_pattern, linear, self.alpha) / (rank**0.5 if self.rslora else rank))

    def rivals(self, pattern: str, linear: str) -> list[str]:
        """The keys of rank_pattern or alpha_pattern that fit this linear, where their values differ; otherwise none."""
        fitting = {key: value for key, value in getattr(self, pattern).items() if fits(key, linear)}
        return list(fitting) if len(set(fitting.values())) > 1 else []

    def matches(self, linears: Iterable[str]) -> list[str]:
        """Those of `linears` (names such as model.layers.0.self_attn.q_proj) that get an adapter.

        PEFT's rules: a name in a list matches a linear of that very name or one that ends in `.name`; a string other
        than "all-linear" is a regular expression for the whole name; `exclude` likewise. Stricter than PEFT, which
        goes on in silence: raises ValueError for a target, an exclusion, a layer or a pattern that matches none.
        """
        linears = list(linears)
        if self.targets == "all-linear":
            found = linears
        else:
            found = [name for name in linears if _matches(self.targets, name)]
            self._refuse_idle(self.targets, "target", linears, linears)
        if self.exclude:
            self._refuse_idle(self.exclude, "exclude", [*linears, *_NOT_LINEAR], linears)
            found = [name for name in found if not _matches(self.exclude, name)]
        if self.layers is not None:
            layer = {name: self._layer(name) for name in linears}
            missing = sorted(set(self.layers) - set(layer.values()))
            if missing:
                raise ValueError(f"layers: there is no layer {missing[0]} in {sorted({*layer.values()} - {None})}")
            found = [name for name in found if layer[name] in self.layers]
        if not found:
            raise ValueError("no linear is left to put an adapter on")
        for pattern in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, pattern):
                if not any(fits(key, name) for name in found):
                    raise ValueError(f'{pattern}: "{key}" matches no linear that has an adapter')
        return found

    def _layer(self, linear: str) -> int | None:
        """The number of the layer that the linear is in: the first in its name, after layers_pattern if given."""
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns if pattern]
        for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(expression, linear):
                return int(match.group(1))
        return None

    @staticmethod
    def _refuse_idle(wanted: str | tuple[str, ...], what: str, names: list[str], linears: list[str]) -> None:
        """Raise ValueError for the names in a list, or the regular expression, that match nothing."""
        if isinstance(wanted, str):
            idle = [f"{wanted!r}, a regular expression for the whole name,"]
            idle = [] if any(_matches(wanted, name) for name in names) else idle
        else:
            idle = [one for one in wanted if not any(_matches((one,), name) for name in names)]
        if idle or not wanted:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"{what} {', '.join(idle) or '()'} matches no linear; there are: {', '.join(kinds)}")


def _matches(wanted: str | tuple[str, ...], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith("." + one) for one in wanted)


def fits(key: str, linear: str) -> bool:
    """PEFT's rule for a key of a pattern: a regular expression for the end of the name, from its start or a dot on."""
    return re.match(rf"(.*\.)?({key})$", linear) is not None


def _pattern_value(pattern: Mapping[str, Any], linear: str, default: Any) -> Any:
    """The value of the first key that fits, as in PEFT."""
    return next((value for key, value in pattern.items() if fits(key, linear)), default)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_real(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _check_rank(value: Any, name: str) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")


def _check_alpha(value: Any, name: str) -> None:
    if not _is_real(value) or not 0 < value < np.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def _check_regex(text: str, name: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{name} {text!r} is no regular expression: {error}") from None


def _check_names(value: Any, name: str) -> None:
    """A regular expression, or names."""
    if isinstance(value, str):
        _check_regex(value, name)
    elif not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name}s must be a string or names, not {value!r}")
