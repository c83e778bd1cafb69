"""Where the bits of a quantised tensor go, and one block on its way through both levels (QLoRA, section 3).

    one level     b + 32 / B                 b = 4 bits a code, and a float32 constant for each block of B weights
    two levels    b + 8 / B + 32 / (B B2)    the constants in 8 bits, and a float32 one for each B2 of them

The formulas leave out what `bit_budget` counts: partial blocks, and the mean of the constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .backend import Array
from .blockwise import NESTED_BLOCK, TINY, count_blocks, dequantize_blockwise, quantize_blockwise, quantize_constants
from .checks import check, whole
from .codebooks import DYNAMIC
from .quantization import dequantize, quantize


def bits_by_formula(
    block_size: int = 64, nested_block: int | None = NESTED_BLOCK, nested_bits: float = 8, bits: float = 4
) -> float:
    """Bits a parameter, b + 8/B + 32/(B B2); b + 32/B if `nested_block` is None, for one level.

    >>> bits_by_formula(64, None), bits_by_formula(64, 256)
    (4.5, 4.126953125)
    """
    if nested_block is None:
        return bits + 32 / block_size
    return bits + nested_bits / block_size + 32 / (block_size * nested_block)


def bit_budget(size: int, block_size: int = 64, double_quant: bool = True) -> dict[str, float]:
    """{part: bits a parameter} of a tensor of `size` elements, as `quantize` holds it, partial blocks and all.

    codes, constants, and when double-quantised the constants of the second level and the mean of those of the first.
    All but the mean add up to `QuantizedTensor.bits_per_param`.

        >>> bit_budget(4096 * 4096)
        {'codes': 4.0, 'constants': 0.125, 'second-level constants': 0.001953125, 'mean': 1.9073486328125e-06}

    Raises ValueError unless `size` is at least 1, and for a block size that `quantize` does not take.
    """
    check("size", size, whole(1, 2**63 - 1))
    blocks = count_blocks(size, block_size, "bit_budget")
    nbytes = {"codes": -(-size // 2), "constants": blocks if double_quant else 4 * blocks}
    if double_quant:
        nbytes |= {"second-level constants": 4 * count_blocks(blocks, NESTED_BLOCK), "mean": 4}
    return {part: 8 * n / size for part, n in nbytes.items()}


def through_second_level(
    absmax: Array, codebook: np.ndarray = DYNAMIC, block_size: int = NESTED_BLOCK, subtract_mean: bool = True
) -> Array:
    """Constants, float32 (blocks,), as they come back from a second level of quantisation.

    By default it is that of `quantize`, and the result is `QuantizedTensor.constants()`. Other codebooks (2 to 256
    values, as for `quantize_blockwise`), other blocks and no mean show what another second level would cost:

        q = quantize(w, double_quant=False)
        replace(q, absmax=through_second_level(q.absmax, NF4))    # w with its constants in 4 bits; dataclasses.replace
    """
    mean = np.float32(absmax.mean(dtype=np.float64) if subtract_mean else 0)
    codes, nested_absmax = quantize_blockwise(absmax - mean, codebook, block_size, name="absmax")
    return dequantize_blockwise(codes, nested_absmax, codebook, block_size) + mean


@dataclass(frozen=True)
class BlockPath:
    """A block of B weights on its way through both levels and back, as `block_path` follows it.

    weights     float32 (B,)
    absmax      the largest |weight|, before double quantisation
    normalised  float32 (B,), weights / absmax, from -1 to 1
    codes       uint8 (B,), of the values of NF4 nearest to them
    packed      uint8 (B/2,), two codes a byte
    constants   float32 (up to 256,), the absmax of this block and of those that share its nested_absmax
    mean        of the constants of all the tensor's blocks
    nested_absmax   the largest |constant - mean| among `constants`
    absmax_code     of the value of the dynamic map nearest to (absmax - mean) / nested_absmax
    absmax_back     what absmax comes back as: the map's value * nested_absmax + mean
    back        float32 (B,), what the weights come back as
    """

    weights: np.ndarray
    absmax: np.float32
    normalised: np.ndarray
    codes: np.ndarray
    packed: np.ndarray
    constants: np.ndarray
    mean: np.float32
    nested_absmax: np.float32
    absmax_code: int
    absmax_back: np.float32
    back: np.ndarray


def block_path(w: np.ndarray, block: int = 0, block_size: int = 64) -> BlockPath:
    """Follow one full block of w, by its number in row-major order, through `quantize` and `dequantize`.

    Raises ValueError unless w has such a block, and what `quantize` does.
    """
    q = quantize(w, block_size=block_size, double_quant=False)
    check("block", block, whole(0, q.size // block_size - 1))
    absmax8, nested_absmax, mean = quantize_constants(q.absmax)  # (blocks,), (blocks / 256,), a number
    absmax_back = dequantize_blockwise(absmax8, nested_absmax, DYNAMIC, NESTED_BLOCK) + mean  # (blocks,)
    start, stop, absmax = block * block_size, (block + 1) * block_size, q.absmax[block]
    weights = w.reshape(-1)[start:stop].astype(np.float32)  # (B,)
    packed = q.packed[start // 2 : stop // 2]  # (B/2,)
    above = block // NESTED_BLOCK  # the block of the second level that holds absmax
    return BlockPath(
        weights=weights,
        absmax=absmax,
        normalised=weights * (1 / np.maximum(absmax, TINY)),
        codes=np.stack([packed >> 4, packed & 15], axis=1).reshape(-1),  # (B/2, 2) -> (B,)
        packed=packed,
        constants=q.absmax[above * NESTED_BLOCK : (above + 1) * NESTED_BLOCK],
        mean=mean,
        nested_absmax=nested_absmax[above],
        absmax_code=int(absmax8[block]),
        absmax_back=absmax_back[block],
        back=dequantize(replace(q, absmax=absmax_back)).reshape(-1)[start:stop],
    )
