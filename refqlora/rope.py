"""Rotary position embeddings (RoPE): each pair of a head's elements is rotated by the angle position * frequency.

Every pair has a frequency of its own (Su et al. 2021, section 3.4). Models extended to longer texts than they were
first trained on scale the frequencies; kinds and names of scaling are those of transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import Array, array_module
from .checks import check, number, shown

# For each rope_type: the parameters that it requires, and those that it also takes.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
        ("attention_factor",),
    ),
}

_PARAMETER = number(1e-9, 1e9)


def check_scaling(scaling: Mapping[str, Any], pairs: int) -> None:
    """Raise ValueError if this scaling of the frequencies is not supported, or its parameters are not valid.

    pairs: how many pairs of elements are rotated: "longrope" takes a factor for each.
    """
    kind = scaling.get("rope_type") if isinstance(scaling, Mapping) else None
    if not isinstance(kind, str) or kind not in SCALINGS:
        supported = ", ".join(f'"{name}"' for name in ("default", *SCALINGS))
        raise ValueError(f"rope_type: expected one of {supported}, got {shown(kind)}")
    required, optional = SCALINGS[kind]
    for key in required:
        if key not in scaling:
            raise ValueError(f'{key}: expected a value for RoPE of type "{kind}", got none')
    for key in (*required, *optional):
        value = scaling.get(key, 1)
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple) or len(value) != pairs or not all(map(_PARAMETER.fits, value)):
                raise ValueError(f"{key}: expected a list of {pairs}, each {_PARAMETER.expected}, got {shown(value)}")
        elif key != "truncate":
            check(key, value, _PARAMETER)
    if kind == "dynamic" and pairs < 2:
        raise ValueError(f'rope_type: expected at least two pairs of elements for "dynamic", got {pairs}')
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("high_freq_factor: expected a number above low_freq_factor")


def rope_frequencies(
    theta: float,
    dim: int,
    dtype: Any,
    scaling: Mapping[str, Any] | None = None,
    length: int = 1,
    max_positions: int = 1,
) -> tuple[np.ndarray, float]:
    """-> the frequency of each pair (ceil(dim/2),), and the factor by which cos and sin are multiplied.

    Without scaling they are theta^(-2i/dim) (Su et al. 2021, eq. 15) and 1. dim: how many elements of a head are
    rotated. length: how many positions the text has so far, for "dynamic" and "longrope". max_positions: the model's
    context, for "dynamic". Each step is rounded to float32, as in transformers, unless dtype is float64: at position
    100,000 the last bit of a frequency shows in the logits.
    """
    dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    exponents = np.arange(0, dim, 2).astype(dtype) / dim
    s = scaling or {}
    match s.get("rope_type"):
        case "linear":  # positions are divided by the factor (Chen et al. 2023)
            return 1 / theta**exponents / s["factor"], 1.0
        case "dynamic":  # theta grows with the text ("NTK-aware", Peng et al. 2023, section 3.3)
            longer = np.asarray(max(length, max_positions), dtype)
            stretch = s["factor"] * longer / max_positions - (s["factor"] - 1)
            return 1 / (theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
        case "llama3":
            return _llama3(1 / theta**exponents, s), 1.0
        case "yarn":
            return _yarn(theta**exponents, theta, dim, s)
        case "longrope":
            return _longrope(theta**exponents, s, length)
    return 1 / theta**exponents, 1.0


def _llama3(frequencies: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
    """Frequencies of long waves are divided by the factor, those of short waves kept; in between the two are mixed
    (Llama 3.1)."""
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    context = s["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return np.where(
        wavelength > context / low, frequencies / factor, np.where(wavelength < context / high, frequencies, between)
    )


def _yarn(wavelengths: np.ndarray, theta: float, dim: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Like `_llama3`, but the borders are numbers of turns within the context, and attention gets sharper (Peng et al.
    2023, sections 3.2 and 3.4). wavelengths: theta^(2i/dim)."""
    factor, context = s["factor"], s["original_max_position_embeddings"]

    def pair(turns: float) -> float:  # the number i of the pair that makes so many turns within the context
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(s.get("beta_fast", 32)), pair(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2).astype(wavelengths.dtype) - low) / (high - low or 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    frequencies = 1 / (factor * wavelengths) * (1 - keep) + 1 / wavelengths * keep

    def sharper(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    if "attention_factor" in s:
        return frequencies, s["attention_factor"]
    if "mscale" in s and "mscale_all_dim" in s:
        return frequencies, sharper(s["mscale"]) / sharper(s["mscale_all_dim"])
    return frequencies, sharper(1)


def _longrope(wavelengths: np.ndarray, s: Mapping[str, Any], length: int) -> tuple[np.ndarray, float]:
    """Each frequency is divided by a factor found by search, from one set within the original context, from another
    beyond it (Ding et al. 2024)."""
    context, factor = s["original_max_position_embeddings"], s["factor"]
    factors = np.asarray(s["long_factor" if length > context else "short_factor"], wavelengths.dtype)
    sharper = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return 1 / (factors * wavelengths), s.get("attention_factor", sharper)


def rope_tables(positions: Array, frequencies: Array, dtype: Any, factor: float = 1.0) -> tuple[Array, Array]:
    """cos and sin of position * frequency, times `factor`. positions (T,), frequencies (n,) -> two tables (T, n).

    The angle is a float32 product, as in transformers, or a float64 one for a float64 model: at position 100,000 its
    rounding shows in the logits.
    """
    xp = array_module(positions)
    angle_dtype = xp.float64 if dtype == xp.float64 else xp.float32
    angles = positions.astype(angle_dtype)[:, None] * xp.asarray(frequencies, angle_dtype)  # (T, n)
    cos, sin = xp.cos(angles), xp.sin(angles)
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return cos.astype(dtype), sin.astype(dtype)


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x1, x2) = (x[i], x[i + n]), i < n, by their angles; elements from 2n on stay as they are.

    x (B, T, H, h), cos, sin (T, n) -> y (B, T, H, h); n is h/2, or less if only a part of each head is rotated. The
    halves are paired as in transformers; the paper pairs neighbours.
    """
    n = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, n): the same for every head
    x1, x2 = x[..., :n], x[..., n : 2 * n]  # (B, T, H, n)
    xp = array_module(x)
    y = xp.empty_like(x)
    xp.multiply(x1, cos, out=y[..., :n])
    y[..., :n] -= x2 * sin
    xp.multiply(x2, cos, out=y[..., n : 2 * n])
    y[..., n : 2 * n] += x1 * sin
    y[..., 2 * n :] = x[..., 2 * n :]
    return y


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """dy (B, T, H, h) -> dx (B, T, H, h): the transpose of a rotation is the rotation by the negative angle.

    y1 = x1 cos - x2 sin        dx1 = dy1 cos + dy2 sin
    y2 = x2 cos + x1 sin        dx2 = dy2 cos - dy1 sin
    """
    return rope_forward(dy, cos, -sin)
