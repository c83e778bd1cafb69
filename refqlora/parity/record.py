"""Record the libraries' results for every check of `refqlora parity`, for machines without the libraries.

    python -m refqlora.parity.record

Writes vectors.safetensors and recorded.safetensors beside this file (README.md there explains them), with the
libraries' versions and the seed in their metadata. Needs every library.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from ..blockwise import BLOCK_SIZES, NESTED_BLOCK
from ..codebooks import DYNAMIC
from ..files.writing import write_tensors
from ..minimal import to_codes
from . import lora_vectors, quantization
from .cases import large_cases, large_tensors
from .checks import CHECKS, RECORDED, VECTORS, installed, quiet

SEED, SIZE = 0, 0  # the smallest models


def main() -> None:
    import torch

    libraries = sorted({name for check in CHECKS for name in check.libraries} | {"numpy"})
    about = {name: installed(name) for name in libraries} | {"seed": str(SEED)}
    about["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    with quiet():
        large = large_tensors(np.random.default_rng(SEED))
        tensors = quantization.observe_codebooks(SEED, SIZE) | quantization.observe_4bit(SEED, SIZE)
        tensors |= quantization.quantise_4bit((case, large[case.tensor]) for case in large_cases())
        for name in [f"4bit/block sizes/nf4/{size}/dequantised" for size in BLOCK_SIZES[1:]]:
            del tensors[name]  # packed, absmax and block size 32 suffice
        tensors |= quantization.observe_8bit(SEED, SIZE) | lora_vectors.observe(SEED)
    for name, parts in list(quantization.constants_cases(tensors)):
        codes, _ = to_codes(parts["absmax"] - parts["offset"], DYNAMIC, NESTED_BLOCK)
        tensors[f"8bit/{name}/nearest"] = codes
    write_tensors(VECTORS, tensors, about)
    print(f"{VECTORS.name}: {len(tensors)} tensors, {VECTORS.stat().st_size:,} bytes")

    tensors = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}  # the name under which a content is stored
    for check in CHECKS:
        if check.record != RECORDED:
            continue
        with quiet():
            observed = check.observe(SEED, SIZE)
        for key, x in observed.items():
            name, content = f"{check.name}/{key}", (x.dtype.name, x.shape, x.tobytes())
            if content in first:
                same[name] = first[content]
            else:
                tensors[name] = x
                first[content] = name
    pairs = "\n".join(f"{name} = {stored}" for name, stored in same.items())
    write_tensors(RECORDED, tensors, about | {"same": pairs})
    print(f"{RECORDED.name}: {len(tensors)} tensors, {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
