"""Codebooks: the values that codes stand for, derived from their definitions, and the code nearest to a number.

A codebook of 2^b values serves b-bit codes: code i stands for codebook[i] times the block's absmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from scipy.special import ndtri

from .backend import Array, array_module
from .checks import check, whole


def _derived_once(derive: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Derive a codebook once for each argument, and share it as a read-only float32 array."""

    @functools.cache
    @functools.wraps(derive)
    def derived(*args: object, **kwargs: object) -> np.ndarray:
        return _shared(derive(*args, **kwargs))

    return derived


def _shared(values: np.ndarray) -> np.ndarray:
    """float32, read-only."""
    values = values.astype(np.float32)
    values.flags.writeable = False
    return values


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """n evenly spaced values, rounded as torch.linspace rounds them: (n,) float32.

    The step is rounded to float32, each half is counted from its own end, and step * i is added without a
    rounding in between (float64 holds the product exactly). numpy.linspace differs in the last bits.
    """
    a, b, i = np.float32(start), np.float32(stop), np.arange(n)
    step = np.float64((b - a) / np.float32(n - 1))
    return np.where(i < n // 2, a + step * i, b - step * (n - 1 - i)).astype(np.float32)


def normal_float(bits: int = 4) -> np.ndarray:
    """NormalFloat: quantiles of N(0, 1), scaled to [-1, 1] and sorted. (2^bits,) float32.

    The probabilities run evenly from p = `outermost_probability(bits)` down to 1/2, which is left out. 2^(bits-1)
    of them give the positive values, 2^(bits-1) - 1, more widely spaced, the negative ones, and 0 completes the
    2^bits. For 4 bits the result equals bitsandbytes' create_normal_map bit for bit. Other widths are our
    generalisation. QLoRA (arXiv 2305.14314) describes the type in section 3; its equation 4, taken literally, is
    infinite at the ends.

        >>> rq.normal_float(2)
        array([-1.        ,  0.        ,  0.43581823,  1.        ], dtype=float32)

    Raises ValueError unless bits is 2 to 8.
    """
    check("bits", bits, whole(2, 8))
    return _normal_float(bits)


def outermost_probability(bits: int = 4) -> float:
    """The probability whose quantile NormalFloat scales to 1. For 4 bits it is bitsandbytes' literal 0.9677083.

    The quantile of 1 is infinite, so the probability stops short of 1 by half a step of an even split of [0, 1]: by
    the mean of the half steps for 2^bits and for 2^bits - 1 values. It is rounded to seven decimals, which matters:
    unrounded it is another float32, which moves 12 of NF4's 16 values.
    """
    return round(1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2, 7)


@_derived_once
def _normal_float(bits: int) -> np.ndarray:
    p = outermost_probability(bits)
    above = ndtri(_linspace(p, 0.5, 2 ** (bits - 1) + 1)[:-1].astype(np.float64))  # (2^(bits-1),)
    below = -ndtri(_linspace(p, 0.5, 2 ** (bits - 1))[:-1].astype(np.float64))  # (2^(bits-1) - 1,)
    values = np.sort(np.concatenate([below, [0.0], above])).astype(np.float32)
    return values / values[-1]


@_derived_once
def fp4() -> np.ndarray:
    """The 4-bit float of bitsandbytes, by code: sign, two exponent bits e, one mantissa bit m. (16,) float32.

        e = 0:  m / 16        otherwise:  (1 + m / 2) * 2^(4 - e)        all divided by the largest, 12

    The exponent runs backwards, so the values are not in the order of their codes; code 8 is a second zero.
    This is not E2M1. Equal to bitsandbytes' get_4bit_type("fp4") bit for bit.
    """
    code = np.arange(16)
    sign, e, m = code >> 3, code >> 1 & 3, code & 1
    size = np.where(e == 0, m / 16, (1 + m / 2) * 2.0 ** (4 - e))
    return (1 - 2 * sign) * size / 12 + 0.0  # adding 0.0 turns -0.0 into 0.0


def small_float(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """A float of few bits, without infinities and NaNs, by code: sign, exponent e, mantissa m. (2^bits,) float32.

        e = 0:  2m / 2^mantissa_bits        otherwise:  (1 + m / 2^mantissa_bits) * 2^e

    all divided by the largest. The codes with the sign bit have the negatives, so there is a second zero.
    small_float(2, 1) is E2M1 and small_float(3, 0) is E3M0, with which QLoRA (arXiv 2305.14314, table 2) compares NF4.

        >>> small_float(2, 1)[:8] * 6
        array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ], dtype=float32)

    Raises ValueError unless there is an exponent bit and all bits are 2 to 8.
    """
    check("exponent_bits", exponent_bits, whole(1, 7))
    check("mantissa_bits", mantissa_bits, whole(0, 7 - exponent_bits))
    code = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    sign, e = code >> exponent_bits + mantissa_bits, code >> mantissa_bits & 2**exponent_bits - 1
    m = (code & 2**mantissa_bits - 1) / 2**mantissa_bits
    size = np.where(e == 0, 2 * m, (1 + m) * 2.0**e)
    return _shared((1 - 2 * sign) * size / size.max() + 0.0)  # adding 0.0 turns -0.0 into 0.0


def integers(bits: int = 4) -> np.ndarray:
    """Even spacing: the integers -2^(bits-1) to 2^(bits-1) - 1, divided by the last: (2^bits,) float32.

    Absmax scaling sends the largest weight to the last or its negative, as is usual for symmetric integers, so code 0
    is never chosen. Of 4 bits: -8 to 7, divided by 7.

    Raises ValueError unless bits is 2 to 8.
    """
    check("bits", bits, whole(2, 8))
    last = 2 ** (bits - 1) - 1
    return _shared(np.arange(-last - 1, last + 1) / last)


@_derived_once
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The dynamic 8-bit map: smaller decades have fewer values. (256,) float32, sorted.

    [0.1, 1] is cut into 2^i equal parts (2^(i+1) when unsigned), i = 0..6, and their midpoints are scaled by
    10^(i-6): fine near 1, and down to 5.5e-7. The signed map has their negatives as well. 0 and 1 complete the
    256, so the signed map begins at -0.993, not at -1; its zero is code 127.

    Dettmers (arXiv 1511.04561; 8-bit optimisers, arXiv 2110.02861). Equal to bitsandbytes'
    create_dynamic_map bit for bit.
    """
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        edges = _linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        part = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [part, -part] if signed else [part]
    return np.sort(np.concatenate(values))


NF4 = normal_float(4)
FP4 = fp4()
INT4 = integers(4)
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}  # those of 4 bits, by the names that options take
DYNAMIC = dynamic_map(signed=True)


def nearest(x: Array, codebook: np.ndarray) -> Array:
    """The code (uint8) of the value nearest to each x (float32, no NaN); a tie goes to the lower value.

        order = argsort(codebook);  values = codebook[order]       # a stable sort
        thresholds = (values[:-1] + values[1:]) / 2                # float32
        codes = order[searchsorted(thresholds, x)]                 # how many thresholds are below x

    On a CPU a table replaces the search. The upper 16 bits of a float32 confine it to an interval that contains
    at most one threshold. The table holds that threshold and the code below it; one comparison decides.
    """
    xp = array_module(x)
    if xp is not np:
        order, thresholds = (xp.asarray(a) for a in _thresholds(codebook.tobytes()))
        return order[xp.searchsorted(thresholds, x)]
    below, threshold, order = _nearest_table(codebook.tobytes())
    upper = (x.view(np.uint32) >> 16).astype(np.intp)
    codes = below.take(upper, mode="clip")  # no index is out of range; "clip" saves the check
    codes += x > threshold.take(upper, mode="clip")
    return codes if order is None else order.take(codes, mode="clip")


@functools.lru_cache(maxsize=32)
def _thresholds(codebook: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The codes (uint8) in the order of their values, and the midpoints (float32) of neighbours."""
    book = np.frombuffer(codebook, np.float32)
    order = np.argsort(book, kind="stable")
    values = book[order]
    return order.astype(np.uint8), (values[:-1] + values[1:]) / 2


@functools.lru_cache(maxsize=32)
def _nearest_table(codebook: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Two tables (65536,), indexed by the upper 16 bits of a float32: how many thresholds are below all numbers
    with those bits, and the threshold among them (inf if none). And the codes in the order of their values (None
    if the codebook is sorted)."""
    order, thresholds = _thresholds(codebook)
    upper = np.arange(65536, dtype=np.uint32) << 16
    start, end = upper.view(np.float32), (upper | 0xFFFF).view(np.float32)
    end = np.where(np.isfinite(end), end, start)  # inf has an interval to itself; x is not NaN
    below = np.searchsorted(thresholds, np.minimum(start, end))
    if (np.searchsorted(thresholds, np.maximum(start, end)) - below).max() > 1:
        raise ValueError("codebook: two thresholds differ only in the lower 16 bits of their float32")
    threshold = np.append(thresholds, np.float32(np.inf))[below]
    return below.astype(np.uint8), threshold, order if (np.diff(order.astype(int)) < 0).any() else None
