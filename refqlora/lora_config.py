"""What an adapter is: which linears it sits on, its rank and scale on each, and how it starts; by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import SWITCH, Rule, check, number, shown, whole
from .patterns import check_pattern, full_match, name_match

INITS = ("default", "gaussian", "pissa", "olora")  # and "pissa_niter_N"
MAX_KEYS = 10_000  # far beyond any use
_INIT = re.compile(rf"{'|'.join(INITS)}|pissa_niter_[0-9]{{1,3}}")
_NOT_LINEAR = ("lm_head", "embed_tokens")  # never get an adapter, but `exclude` may name them

_RULES = {
    "rank": whole(1),
    "alpha": number(0, 1e9),
    "dropout": Rule("a number from 0 to below 1", lambda value: number(0, 1).fits(value) and value < 1),
    "rslora": SWITCH,
    "dora": SWITCH,
    "init": Rule(
        f"{', '.join(INITS)} or pissa_niter_0 to 999",
        lambda value: isinstance(value, str) and bool(_INIT.fullmatch(value)),
    ),
}


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is. `adapter_config.json` has these fields under PEFT's names, given here in brackets.

    rank [r], alpha [lora_alpha]: the change is scaled by alpha/r, or by alpha/sqrt(r) with rslora [use_rslora]. alpha
        is at most 1e9, so that float32 holds the scaled values.
    dropout [lora_dropout]: of the adapter's input, in training.
    targets [target_modules]: "all-linear" (every linear but the output head), names such as ("q_proj", "v_proj"), or
        a regular expression for the whole name.
    dora [use_dora]: learn each output's magnitude separately from its direction (Liu et al. 2024).
    init [init_lora_weights]: "default" or "gaussian", where B A is zero at first; "pissa" (Meng et al. 2024),
        "pissa_niter_N" or "olora" (Buyukakyuz 2024), which move a part of the weight into B A: see
        adapters.init_lora.
    exclude [exclude_modules]: names or a regular expression, for linears that get no adapter.
    layers [layers_to_transform]: numbers of the layers that get one; None: all. layers_pattern: what stands before
        the layer's number in a name, such as "layers"; without it the first number counts.
    rank_pattern, alpha_pattern: {name or regular expression: value} for linears with another rank or alpha; the first
        key that matches counts. A key must match a name to its end, from its start or from behind a dot.

        >>> config = rq.LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 4})
        >>> config.scale_of("model.layers.0.self_attn.v_proj")
        4.0

    Raises ValueError that begins with the name of the field at fault.
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
        for name, rule in _RULES.items():
            check(name, getattr(self, name), rule)
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            object.__setattr__(self, "targets", "all-linear")
        for name in ("targets", "exclude"):
            self._check_names(name)
        self._check_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name}: expected regular expressions with a value each, got {shown(pattern)}")
            if len(pattern) > MAX_KEYS:
                raise ValueError(f"{name}: expected at most {MAX_KEYS} keys, got {len(pattern)}")
            for key, value in pattern.items():
                _check_pattern(key, name)
                check(f"{name} of {shown(key)}", value, _RULES[name.removesuffix("_pattern")])

    @property
    def scale(self) -> float:
        """s unless a pattern says otherwise: alpha/r (LoRA, section 4.1), or alpha/sqrt(r) (rsLoRA, Kalajdzievski
        2023)."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def changes_base(self) -> bool:
        """Whether `init` moves a part of the weight into B A, so that the adapter sits on a residual of its own."""
        return self.init not in ("default", "gaussian")

    def rank_of(self, linear: str) -> int:
        """r on the linear of this name."""
        return int(self._value(self.rank_pattern, linear, self.rank))

    def alpha_of(self, linear: str) -> float:
        """alpha on the linear of this name."""
        return float(self._value(self.alpha_pattern, linear, self.alpha))

    def scale_of(self, linear: str) -> float:
        """s on the linear of this name."""
        rank = self.rank_of(linear)
        return self.alpha_of(linear) / (rank**0.5 if self.rslora else rank)

    def rivals(self, pattern: str, linear: str) -> list[str]:
        """The keys of rank_pattern or alpha_pattern that match this linear, if their values differ; otherwise []."""
        matching = {key: value for key, value in getattr(self, pattern).items() if name_match(key, linear)}
        return list(matching) if len(set(matching.values())) > 1 else []

    def matches(self, linears: Iterable[str]) -> list[str]:
        """The names among `linears` (such as model.layers.0.self_attn.q_proj) that get an adapter.

        PEFT's rules: a name in a list matches a linear of that very name or one that ends in `.name`; a string other
        than "all-linear" is a regular expression for the whole name; `exclude` likewise. Raises ValueError if no
        linear gets one.
        """
        linears = list(linears)
        found = self._found(linears)
        if not found:
            raise ValueError((self.idle(linears) or ["targets: exclude and layers leave no linear"])[0])
        return found

    def idle(self, linears: Iterable[str]) -> list[str]:
        """A sentence for each target, exclusion, layer or pattern of this config that matches none of `linears`. PEFT
        ignores them silently; in a new adapter they are mistakes."""
        linears = list(linears)
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        said = []
        for option, wanted, names in (
            ("targets", self.targets, linears),
            ("exclude", self.exclude, [*linears, *_NOT_LINEAR]),
        ):
            if isinstance(wanted, str):
                if wanted not in ("", "all-linear") and not any(full_match(wanted, name) for name in names):
                    found = shown(wanted)
                    if any(_matches(tuple(wanted.split(",")), name) for name in names):
                        found += "; give names as a list"
                    said.append(f"{option}: expected a pattern for names that end in {kinds}, got {found}")
            else:
                idle = [one for one in wanted if not any(_matches((one,), name) for name in names)]
                said += [f"{option}: expected one of {kinds}, got {shown(one)}" for one in idle]
        if not self.targets:
            said.append(f"targets: expected one of {kinds}, got none")
        layers = {layer for name in linears if (layer := self._layer(name)) is not None}
        missing = [i for i in self.layers or () if i not in layers]
        said += [f"layers: expected numbers among {sorted(layers)}, got {shown(i)}" for i in missing]
        chosen = self._found(linears)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                if not any(name_match(key, name) for name in chosen):
                    said.append(f"{option}: expected names of linears that get an adapter, got {shown(key)}")
        return said

    def _found(self, linears: list[str]) -> list[str]:
        found = linears if self.targets == "all-linear" else [name for name in linears if _matches(self.targets, name)]
        found = [name for name in found if not _matches(self.exclude, name)]
        return found if self.layers is None else [name for name in found if self._layer(name) in self.layers]

    def _layer(self, linear: str) -> int | None:
        """The number of the linear's layer: the first number in its name, or the one after layers_pattern if given."""
        names = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names if name]
        for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(expression, linear):
                return int(match.group(1))
        return None

    def _value(self, pattern: Mapping[str, Any], linear: str, default: Any) -> Any:
        """The value of the first key that matches, as in PEFT."""
        return next((value for key, value in pattern.items() if name_match(key, linear)), default)

    def _check_names(self, name: str) -> None:
        """Check that a field is a regular expression or names."""
        value = getattr(self, name)
        if isinstance(value, str):
            _check_pattern(value, name)
        elif not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{name}: expected names, or one regular expression, got {shown(value)}")
        elif len(value) > MAX_KEYS:
            raise ValueError(f"{name}: expected at most {MAX_KEYS} names, got {len(value)}")
        else:
            object.__setattr__(self, name, tuple(value))

    def _check_layers(self) -> None:
        names = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        if not isinstance(names, tuple | list) or not all(
            isinstance(name, str) and re.fullmatch(r"[\w.]*", name) for name in names
        ):
            raise ValueError(f'layers_pattern: expected a name such as "layers", got {shown(self.layers_pattern)}')
        if self.layers is None:
            if self.layers_pattern:
                raise ValueError("layers_pattern: expected only together with layers")
            return
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers
        if not isinstance(layers, tuple | list) or not all(whole(0).fits(i) for i in layers) or not layers:
            raise ValueError(f"layers: expected numbers of layers, got {shown(self.layers)}")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError("layers: expected none with a regular expression as targets: let it name the layers")
        object.__setattr__(self, "layers", tuple(int(i) for i in layers))


def _matches(wanted: str | tuple[str, ...], name: str) -> bool:
    """Whether a regular expression matches the whole name, or one of several names is it or its end."""
    if isinstance(wanted, str):
        return bool(wanted) and full_match(wanted, name)
    return any(name == one or name.endswith("." + one) for one in wanted)


def _check_pattern(text: str, name: str) -> None:
    try:
        check_pattern(text)
    except ValueError as error:
        raise ValueError(f"{name}: {shown(text)} is not a regular expression: {error}") from None
