"""Tensors on which quantisation goes wrong first: ties, zeros, odd sizes, outliers, subnormals, the largest floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..blockwise import BLOCK_SIZES
from ..codebooks import DYNAMIC, FP4, NF4

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
WEIGHT_DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))


class Case(NamedTuple):
    """One tensor to quantise: its name in the file of vectors, the codebook and the block size."""

    tensor: str
    kind: str
    block_size: int

    @property
    def key(self) -> str:
        return f"4bit/{self.tensor}/{self.kind}/{self.block_size}"


def unpacked(packed: np.ndarray) -> np.ndarray:
    """uint8 (n,) -> the codes (2n,), that in the high nibble first."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def awkward_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{name: tensor}, float32 unless the name says otherwise."""
    normal = rng.standard_normal((300, 32)).astype(np.float32)
    tensors = {
        "ties nf4": ties(NF4),
        "ties fp4": ties(FP4),
        "ordinary": normal[:31, :31].copy(),  # odd, rows across blocks, a last block that is not full
        "one": np.array([0.3], np.float32),
        "odd": normal.reshape(-1)[:65].copy(),
        "full blocks": normal[:8].copy(),
        "three dimensions": normal.reshape(-1)[: 3 * 5 * 7].reshape(3, 5, 7).copy(),
        "float16": normal[:9, :23].astype(np.float16),
        "bfloat16": normal[:9, :23].astype(ml_dtypes.bfloat16),
        "rounding": np.concatenate([reciprocal_matters(rng, n) for n in (64, 64, 64, 64, 63)]),
        "zeros": np.zeros((3, 40), np.float32),
    }
    block = normal.reshape(-1, 64)
    singular: dict[str, tuple[Any, float]] = {
        "zero block": (0, 0.0),
        "outlier": (slice(7, 8), 1e4),
        "minus zero": (slice(0, None, 2), -0.0),
        "one value only": (slice(1, None), 0.0),
    }
    for i, (name, (where, value)) in enumerate(singular.items()):
        tensors[name] = block[2 * i : 2 * i + 2].copy()  # and an ordinary block after it
        tensors[name][0, slice(None) if where == 0 else where] = value
    tensors["subnormal"] = np.concatenate([block[9] * np.float32(3e-39), np.full(64, 1e-45, np.float32), block[10]])
    tensors["largest"] = np.concatenate([rng.uniform(-3.4e38, 3.4e38, 64).astype(np.float32), block[11]])
    tensors["largest"][5] = np.finfo(np.float32).max
    return tensors


def awkward_cases() -> list[Case]:
    """The cases of `awkward_tensors` in the file of vectors."""
    names = awkward_tensors(np.random.default_rng(0))
    return [Case(name, kind, 64) for name in names for kind in CODEBOOKS]


def large_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A tensor for all block sizes, and one with two blocks of constants."""
    return {
        "block sizes": rng.standard_normal((37, 117)).astype(np.float32),  # 4096 + 233
        "many blocks": rng.standard_normal((300, 30)).astype(np.float16),  # 282 blocks of 32
    }


def large_cases() -> list[Case]:
    return [*(Case("block sizes", "nf4", size) for size in BLOCK_SIZES), Case("many blocks", "nf4", 32)]


def random_cases(rng: np.random.Generator, size: int) -> Iterator[tuple[Case, np.ndarray]]:
    """Random shapes, dtypes, block sizes, distributions and scales, with `size` weights in total."""
    done = number = 0
    while done < size:
        n = int(min(size - done, 10 ** rng.uniform(2, 6), size / 5)) + 1
        shape = [(n,), (int(n**0.5), int(n**0.5)), (-(-n // 96), 96)][rng.integers(3)]
        dtype = WEIGHT_DTYPES[rng.integers(3)]
        scale = 10 ** rng.uniform(-4, 1) if dtype == np.float16 else 10 ** rng.uniform(-12, 12)
        draw: list[Callable[..., Any]] = [
            rng.standard_normal,
            lambda s: rng.standard_t(3, s),
            lambda s: rng.uniform(-1, 1, s),
        ]
        w = (draw[rng.integers(3)](shape) * scale).astype(np.float32)
        w = np.clip(w, -6e4, 6e4).astype(dtype) if dtype == np.float16 else w.astype(dtype)
        kind = ("nf4", "fp4")[rng.integers(2)]
        yield Case(f"random {number}", kind, int(rng.choice(BLOCK_SIZES))), w
        done, number = done + w.size, number + 1


def constants(rng: np.random.Generator, blocks: int = 1000) -> dict[str, np.ndarray]:
    """Vectors for double quantisation, float32 (blocks,): like weights' absmax, and awkward ones, some negative."""
    ordinary = np.abs(rng.standard_normal((blocks, 64)) * 0.02).max(axis=1).astype(np.float32)
    middle = (DYNAMIC[128:] + DYNAMIC[127:-1]) / 2  # (128,): of 0 and the positive values
    ties = np.stack([middle[:127], -middle[:127]], axis=1).reshape(-1)  # their mean is 0
    ties = np.concatenate([[1, -1], ties]).astype(np.float32)  # one block
    one = ordinary[:3].copy()
    one[0] = 40.0
    mean = np.full(300, 2, np.float32)  # the mean is exactly 2, as is all of the second block
    mean[:256:2] += np.tile([0.5, -0.5, 0.3, -0.3], 32).astype(np.float32)
    return {
        "ordinary": ordinary,
        "one block": ordinary[:1].copy(),
        "zeros": np.zeros(5, np.float32),
        "outlier": one,
        "equal to the mean": mean,
        "ties": np.concatenate([ties, ties * np.float32(0.7), ties[:-2]]),
    }


def ties(codebook: np.ndarray) -> np.ndarray:
    """Every midpoint of neighbouring values and the floats next to it, in blocks with several absmax and both signs;
    the last block is not full. Float32 (n,)."""
    values = np.sort(codebook)
    middle = (values[1:] + values[:-1]) / 2
    both = [np.nextafter(middle, np.float32(s), dtype=np.float32) for s in (-2, 2)]
    block = np.zeros(64, np.float32)
    block[: 3 * middle.size] = np.concatenate([middle, *both])
    block[-1] = 1
    negative = block.copy()
    negative[-1] = -1
    scales = np.array([0.25, 0.7, 1.3, 1e-3, 1e3], np.float32)
    return np.concatenate([block, negative, *(block * s for s in scales), block[1:]])


def reciprocal_matters(rng: np.random.Generator, size: int, codebook: np.ndarray = NF4) -> np.ndarray:
    """A block in which x * (1 / absmax) and x / absmax fall on different sides of thresholds. Float32 (size,), of which
    the last is absmax."""
    middle = (codebook[1:] + codebook[:-1]) / 2
    while True:
        absmax = np.float32(rng.uniform(0.5, 1))
        near = (middle * absmax).view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)
        x = near.view(np.float32).reshape(-1)
        times, over = (np.searchsorted(middle, y) for y in (x * (1 / absmax), x / absmax))
        x = x[times != over]
        if x.size >= 3:
            return np.append(np.resize(x, size - 1), absmax).astype(np.float32)
