"""The numbers of LoRA's and QLoRA's papers and of the introduction, recomputed: each claim beside what arithmetic makes
of it.

LoRA: arXiv 2106.09685. QLoRA: arXiv 2305.14314. The introduction: A. B. Vijay Kumar, "Fine Tuning LLM: Parameter
Efficient Fine Tuning (PEFT) - LoRA & QLoRA - Part 1". MB and GB are decimal, MiB and GiB binary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..codebooks import NF4, nearest
from ..config import Config
from ..lora_config import LoraConfig
from ..quantization import quantized_nbytes
from .models import adapter_size, base_bytes, model_config, parameter_count

UNITS = {"": 1.0, "bits": 1.0, "times": 1.0, "M": 1e6, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20}
LLAMAS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
_ALL = LoraConfig(rank=64)  # on all linears, as Guanaco's
_MANY = 64 * 256 * 1024  # elements in blocks without a remainder


@dataclass(frozen=True)
class Claim:
    """A number that was published, and what it should be.

    what: the claim. where: the paper and its section. formula: of our value; L layers, D the hidden size, r the rank,
    P all parameters, n those of linears. ours, theirs: in `unit`, one of UNITS. note: a sentence where the two are not
    the same, and why; empty where they are.
    """

    what: str
    where: str
    formula: str
    ours: float
    theirs: float
    unit: str = ""
    note: str = ""

    @property
    def ratio(self) -> float:
        """ours / theirs"""
        return self.ours / self.theirs


def claims() -> list[Claim]:
    """All of them, in the order of the papers."""
    return [*_lora(), *_qlora(), *_figure_6(), *_guanaco(), *_introduction(), *_benchmarks()]


def _constants_bits(double_quant: bool) -> float:
    """Bits a parameter of the quantisation constants."""
    return 8 * quantized_nbytes(_MANY, double_quant=double_quant) / _MANY - 4


def _claim(what: str, where: str, formula: str, ours: float, theirs: float, unit: str = "", note: str = "") -> Claim:
    """`ours` is given in bytes, or one by one, and stated in `unit`."""
    return Claim(what, where, formula, ours / UNITS[unit], theirs, unit, note)


def _square(config: Config, rank: int, matrices: int) -> int:
    """LoRA's section 4.2: A and B on `matrices` of D x D in each layer, 2 L D r a matrix."""
    return 2 * matrices * config.layers * config.hidden_size * rank


def _lora() -> Iterator[Claim]:
    gpt3 = model_config("gpt3-175b")
    whole, small = parameter_count(gpt3), _square(gpt3, rank=4, matrices=2)
    yield _claim(
        "GPT-3's parameters", "LoRA, table 4", "P", whole, 175_255.8, "M",
        "Table 2.1 of GPT-3's paper gives 96 layers of 12,288; the tied head counts once here.",
    )  # fmt: skip
    yield _claim("r 1 on q and v", "LoRA, table 4", "2 · 2 L D r", _square(gpt3, 1, 2), 4.7, "M")
    yield _claim("r 8 on q and v", "LoRA, table 4", "2 · 2 L D r", _square(gpt3, 8, 2), 37.7, "M")
    yield _claim(
        "r 2 on q, k, v and o", "LoRA, appendix D.4", "4 · 2 L D r", _square(gpt3, 2, 4), 37.7, "M",
        "A slip: r 4 on four matrices has 37.7M, as table 15 says; r 2 has half of it.",
    )  # fmt: skip
    yield _claim("a checkpoint of GPT-3", "LoRA, section 4.2", "2 P", 2 * whole, 350, "GB")
    yield _claim(
        "a checkpoint of r 4 on q and v", "LoRA, section 4.2", "2 · 2 · 2 L D r", 2 * small, 35, "MB",
        "The paper means MiB: it is 36.0 of them.",
    )  # fmt: skip
    yield _claim(
        "the checkpoint is so many times smaller", "LoRA, section 4.2", "P / (2 · 2 L D r)", whole / small, 10_000,
        "times", "Rounded: 350 GB / 35 MB. With the paper's own count of parameters it is 9,285.",
    )  # fmt: skip
    yield _claim(
        "training GPT-3 with Adam", "LoRA, section 4.2", "3 · 2 P", 6 * whole, 1.2, "TB",
        "Weights and both moments in 16 bits, which LoRA cuts by the 2/3 that the paper states. 1.2 TB leaves 0.15 TB "
        "for gradients and activations.",
    )  # fmt: skip
    yield _claim(
        "training GPT-3 with LoRA", "LoRA, section 4.2", "2 P + 8 · 2 · 2 L D r", 2 * whole + 8 * small, 350, "GB"
    )
    yield _claim(
        "100 adapted models", "LoRA, section 4.2", "2 P + 100 · 2 · 2 · 2 L D r", 2 * whole + 100 * 2 * small, 354, "GB"
    )
    for name, theirs, note in (
        ("gpt2-medium", 0.35, "0.39M by the formula; the table says 0.35."),
        ("gpt2-large", 0.77, "0.74M by the formula; the table says 0.77."),
    ):
        size = _square(model_config(name), 4, 2)
        yield _claim(f"r 4 on q and v of {name}", "LoRA, table 3", "2 · 2 L D r", size, theirs, "M", "A slip: " + note)


def _qlora() -> Iterator[Claim]:
    small, large = model_config("llama-7b"), model_config("llama-65b")
    one, two = _constants_bits(False), _constants_bits(True)
    yield _claim("constants at one level", "QLoRA, section 3", "32 / 64", one, 0.5, "bits")
    yield _claim("constants at two levels", "QLoRA, section 3", "8 / 64 + 32 / (64 · 256)", two, 0.127, "bits")
    yield _claim(
        "double quantisation saves", "QLoRA, section 3", "32/64 - 8/64 - 32/(64 · 256)", one - two, 0.373, "bits"
    )
    saved = base_bytes(large, double_quant=False) - base_bytes(large)
    yield _claim("which saves on 65B", "QLoRA, section 2", "0.373 n / 8", saved, 3, "GB", "")
    full, adapter = parameter_count(large), adapter_size(large, _ALL)
    yield _claim("16-bit fine-tuning of 65B: more than", "QLoRA, section 1", "(2 + 2 + 8) P", 12 * full, 780, "GB", "")
    yield _claim(
        "QLoRA of 65B: less than", "QLoRA, section 1", "4.127 n / 8 + 2 (P - n) + (2 + 2 + 8) Σ r (in + out)",
        base_bytes(large) + 12 * adapter, 48, "GB",
        "Weights, adapters of r 64 in 16 bits, their gradients and 32-bit moments; activations come on top.",
    )  # fmt: skip
    yield _claim(
        "LoRA weights of 0.2 % on 7B", "QLoRA, section 2", "2 · 0.002 P", 2 * 0.002 * parameter_count(small), 26, "MB",
        "The paper means MiB: it is 25.7 of them.",
    )  # fmt: skip
    yield _claim(
        "input gradients of 7B with checkpointing", "QLoRA, section 2", "567 MB / L", 567e6 / small.layers, 18, "MB",
        "The paper's two numbers fit one another: with checkpointing there is one layer at a time.",
    )  # fmt: skip
    yield _claim(
        "the 4-bit base of 7B", "QLoRA, section 2", "4.127 n / 8 + 2 (P - n)", base_bytes(small), 5048, "MB",
        "Weights alone: the paper's number has some 1.2 GB more, and does not say of what.",
    )  # fmt: skip


def _figure_6() -> Iterator[Claim]:
    """The bars of figure 6, in MiB: r = 64, AdamW's moments in 32 bits."""
    optimizer, model = (1152, 1800, 3510, 5760), (5046, 8476, 19302, 37074)
    where = "QLoRA, figure 6"
    for name, theirs in zip(LLAMAS, optimizer, strict=True):
        c = model_config(name)
        two_matrices = 64 * c.layers * (4 * 2 * c.hidden_size + 2 * 5 * c.hidden_size)  # an MLP of D x 4 D, twice
        formula = "8 · 18 D L r"
        yield _claim(
            f"moments, {name}: two matrices of 4 D in the MLP", where, formula, 8 * two_matrices, theirs, "MiB"
        )
    for name, theirs in zip(LLAMAS, optimizer, strict=True):
        size = 8 * adapter_size(model_config(name), _ALL)
        yield _claim(
            f"moments, {name}: its three matrices", where, "8 Σ r (in + out)", size, theirs, "MiB",
            "A slip: the figure counts an MLP of two matrices; LLaMA's has three, and its adapters are larger.",
        )  # fmt: skip
    for name, theirs in zip(LLAMAS, model, strict=True):
        size = base_bytes(model_config(name))
        yield _claim(
            f"weights, {name}", where, "4.127 n / 8 + 2 (P - n)", size, theirs, "MiB",
            "The bar does not follow from 4.127 bits; 4.5 bits are nearer, and some 1 GiB is left.",
        )  # fmt: skip


def _guanaco() -> Iterator[Claim]:
    for name, theirs in zip(reversed(LLAMAS), (41, 21, 10, 6), strict=True):
        c = model_config(name)
        where = "QLoRA, table 1" + (" (5 GB in table 6)" if theirs == 6 else "")
        yield _claim(
            f"Guanaco on {name}", where, "4.127 n / 8 + 2 (P - n) + 2 Σ r (in + out)",
            base_bytes(c) + 2 * adapter_size(c, _ALL), theirs, "GB",
            "Weights and the adapter of r 64 in 16 bits; the paper does not say what else it counts.",
        )  # fmt: skip


def _introduction() -> Iterator[Claim]:
    where, n, square = "introduction", 1_000_000, (512, 512)
    adapter = 2 * sum(square)  # r = 2
    yield _claim("weights of 512 x 512", where, "512 · 512", math.prod(square), 262_144)
    yield _claim("r 2 on them", where, "2 · 512 + 512 · 2", adapter, 2_048)
    one, two = _constants_bits(False), _constants_bits(True)
    yield _claim("constants a parameter", where, "32 / 64", one, 0.5, "bits")
    yield _claim("constants of 1M parameters", where, "0.5 · 10^6", one * n, 500_000, "bits")
    yield _claim("32-bit part at two levels", where, "32 / (64 · 256)", two - 8 / 64, 0.001953125, "bits")
    yield _claim("constants at two levels", where, "8 / 64 + 32 / (64 · 256)", two, 0.127, "bits")
    yield _claim(
        "of 1M parameters", where, "0.126953 · 10^6", two * n, 125_000, "bits", "A slip: 8/64 alone gives 125,000."
    )
    code = int(nearest(np.array([0.2121], np.float32), NF4)[0])
    yield _claim("the position nearest to 0.2121", where, "argmin |NF4 - 0.2121|", code, 10)
    yield _claim(
        "its value", where, "NF4[10]", float(NF4[code]), 0.1997, "",
        "A slip: 0.1997 is near an even split of [-1, 1]; NF4's code 10 is 0.2461.",
    )  # fmt: skip


def _benchmarks() -> Iterator[Claim]:
    """Exact counts from two benchmarks: PEFT's of MetaMathQA, and litgpt's tutorials/resource-tables.md."""
    c = model_config("llama-3.2-3b")
    size, where = (
        adapter_size(c, LoraConfig(rank=32, targets=("q_proj", "v_proj"))),
        "PEFT's MetaMathQA, lora--llama-3.2-3B-rank32",
    )
    yield _claim("trainable", where, "Σ r (in + out)", size, 9_175_040)
    yield _claim("parameters in all", where, "P + Σ r (in + out)", parameter_count(c) + size, 3_221_924_864)
    yield _claim(
        "the adapter's file",
        where,
        "4 Σ r (in + out)",
        4 * size,
        36.715216,
        "MB",
        "The file has a header of 15,056 bytes.",
    )
    for name, theirs in (("llama-2-7b", 0.30), ("llama-2-13b", 0.59)):
        c = model_config(name)
        saved = base_bytes(c, double_quant=False) - base_bytes(c)
        yield _claim(f"nf4 less nf4-dq, {name}", "litgpt, resource tables", "0.373 n / 8", saved, theirs, "GB")
