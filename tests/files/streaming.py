"""How much memory loading to NF4 takes, and how long: models of a billion parameters and more, measured.

    python tests/streaming.py                 every model below (some 8 GB of temporary disk, a few minutes)
    python tests/streaming.py TinyLlama-1.1B  one of them

Random bfloat16 weights are written in shards; a fresh process loads them with `quantize="nf4"`. Predicted is

    held + largest + scratch

held      what the model keeps: NF4 codes and constants, embedding and head in 16 bits, norms in float32
largest   the largest tensor that is quantised, as the file has it: there is one at a time, and no float32 copy
scratch   what `quantize` works with: 4 MiB for its chunks of 512 KiB and for small objects, and the constants of the
          largest tensor, twice in float32 before they go to 8 bits

and measured is the process's peak (ru_maxrss) less what it had once everything was imported.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from refqlora.backend import keep_freed_memory
from refqlora.blockwise import CHUNK
from refqlora.config import Config
from refqlora.files.config_json import config_to_dict
from refqlora.files.writing import write_json, write_tensors
from refqlora.model import Model
from refqlora.quantization import quantize, quantized_nbytes

MIB = 1 << 20
SHARD = 10**9
MODELS = {
    "TinyLlama-1.1B": Config(32000, 2048, 5632, layers=22, heads=32, kv_heads=4, head_dim=64),
    "Llama-3.2-1B": Config(128256, 2048, 8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True),
    "Llama-3.2-1B, untied": Config(128256, 2048, 8192, layers=16, heads=32, kv_heads=8, head_dim=64),
    "Llama-3.2-3B": Config(128256, 3072, 8192, layers=28, heads=24, kv_heads=8, head_dim=128, tied=True),
}


def predicted(config: Config, itemsize: int = 2) -> dict[str, int]:
    """Bytes, by the terms above, of a model whose file has `itemsize` bytes an element."""
    linears = {name + ".weight" for name in config.linears()}
    sizes = {name: (int(np.prod(shape)), len(shape)) for name, shape in config.shapes().items()}
    kept = {True: itemsize, False: 4}  # matrices stay as they are, norms and biases are cast
    held = sum(quantized_nbytes(n) if name in linears else n * kept[d > 1] for name, (n, d) in sizes.items())
    largest = max(sizes[name][0] for name in linears)
    return {"held": held, "largest": largest * itemsize, "scratch": 8 * 4 * CHUNK + 2 * 4 * largest // 64}


def write(config: Config, directory: Path, shard_bytes: int = SHARD) -> None:
    """Random bfloat16 weights, shard by shard: no more than one in memory. What is quantised comes last, and of it the
    largest: when it is read, all the rest is held."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    linears = {name + ".weight" for name in config.linears()}
    shapes = sorted(config.shapes().items(), key=lambda item: (item[0] in linears, np.prod(item[1])))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in shapes:
        if sum(2 * int(np.prod(s)) for _, s in shards[-1]) >= shard_bytes:
            shards.append([])
        shards[-1].append((name, shape))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, {name: np.resize(block, shape) for name, shape in shard})
        weight_map |= {name: file for name, _ in shard}
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(directory / "config.json", config_to_dict(config, ml_dtypes.bfloat16))


def load(directory: str, keep: bool) -> dict[str, float]:
    """Load the model; -> bytes held, the process's peak less what it had before, seconds."""
    if keep:
        keep_freed_memory()  # as `refqlora finetune` does
    quantize(np.ones((64, 64), np.float32))  # its tables are made once
    before, started = peak(), time.perf_counter()
    model = Model.from_pretrained(directory, quantize="nf4")
    seconds = time.perf_counter() - started
    return {"held": sum(p.nbytes for p in model.params.values()), "peak": peak() - before, "seconds": seconds}


def peak() -> int:
    """The most bytes that the process has had. A child's counts from its parent's on, so the parent does nothing."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(names: list[str]) -> int:
    print(f"{'':24}{'tensors':>9}{'held':>9}{'largest':>9}{'scratch':>9}{'predicted':>11}{'measured':>10}{'time':>9}")
    wrong = []
    for name in names or MODELS:
        config = MODELS[name]
        stored = 2 * sum(int(np.prod(shape)) for shape in config.shapes().values())
        terms = predicted(config)
        limit = sum(terms.values())
        with tempfile.TemporaryDirectory() as directory:
            child("--write", name, directory)
            for how in ("", "--keep"):
                found = json.loads(child("--load", directory, how))
                assert found["held"] == terms["held"], (found, terms)
                sizes = [stored, *terms.values(), limit, found["peak"]]
                columns = "".join(f"{n / MIB:{w}.1f}" for n, w in zip(sizes, (9, 9, 9, 9, 11, 10), strict=True))
                title = name if not how else "  freed memory kept"
                print(f"{title:24}{columns}{found['seconds']:7.1f} s", flush=True)
                if found["peak"] > limit:
                    wrong.append(title)
    print("MiB; tensors: as the file has them, in bfloat16")
    print("OK" if not wrong else f"MORE THAN PREDICTED: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--write", name, directory]:
            write(MODELS[name], Path(directory))
        case ["--load", directory, how]:
            print(json.dumps(load(directory, how == "--keep")))
        case names:
            sys.exit(main(names))
