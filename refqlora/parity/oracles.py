"""Random models of every architecture, run by transformers, PEFT and torch; only this file runs them.

A model's weights are of order one (matrices 1/sqrt(in), norms about 1, biases about 0.3), its sizes are all different,
and everything is float32. Importing this file needs torch, transformers and PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from .settings import MAX_NORM, STEP

Named = list[tuple[str, Any]]


def their_model(config: str, seed: int = 0, **sizes: Any) -> Any:
    """A causal language model of this transformers config class, its weights of order one."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    norms = 0 if config.startswith("Gemma") else 1  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[1] ** -0.5)
            else:
                p.normal_(0 if name.endswith("bias") else norms, 0.3)
    return model


def round_to_bfloat16(model: Any) -> Any:
    """Round each weight, in place, so that a 16-bit file stores it exactly."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def set_apart(model: Any, rank: int) -> Any:
    """Reduce all but the largest singular value of each linear's weight, in place, so that the `rank` largest differ
    clearly. If two are nearly equal, rounding decides which direction PiSSA takes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "_proj" in name:
                u, s, vt = torch.linalg.svd(p.double(), full_matrices=False)
                s *= torch.clamp(1 - 0.5 * torch.arange(len(s)) / rank, min=0.5)  # 1, ..., 0.5 from rank on
                p.copy_(u * s @ vt)
    return model


def their_adapter(base: Any, config: dict[str, Any], b_is_zero: bool = False, seed: int = 1) -> Any:
    """PEFT's model of `base` with an adapter, in train mode: as it starts if B is to be zero, else with every B,
    every magnitude of DoRA, and A and B of PiSSA and OLoRA moved at random."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**config, lora_dropout=0.0, task_type="CAUSAL_LM"))
    model.train()
    if b_is_zero:
        return model
    from_weight = config.get("init_lora_weights", True) is not True
    with torch.no_grad():
        for name, p in trained(model):
            if "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
            elif from_weight:
                p.add_(0.02 * torch.randn_like(p))
            elif "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def residuals(theirs: Any) -> dict[str, np.ndarray]:
    """{our name: the weight under a PEFT adapter}, which PiSSA and OLoRA have changed."""
    weights = [(name, p) for name, p in theirs.named_parameters() if name.endswith("base_layer.weight")]
    return {name.replace(".base_layer", ""): p for name, p in arrays(weights).items()}


def their_4bit(path: Path, double_quant: bool) -> Any:
    """The model in the directory `path`, quantised to NF4 by bitsandbytes as it is loaded, computing in float32: in
    train mode, as in eval mode it computes in bfloat16 on a CPU with AVX512-BF16."""
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double_quant,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path, quantization_config=options, dtype=torch.float32, device_map="cpu").train()


def packed_weights(theirs: Any) -> dict[str, Any]:
    """{our name: Params4bit} of a 4-bit model of PEFT or transformers."""
    named = (theirs.get_base_model() if isinstance(theirs, peft.PeftModel) else theirs).named_parameters()
    return {name.replace(".base_layer", ""): p for name, p in named if hasattr(p, "quant_state")}


def trained(theirs: Any) -> Named:
    return [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]


def arrays(named: Named) -> dict[str, np.ndarray]:
    """{our name: array} of torch tensors under PEFT's names."""
    names = {name: name.removeprefix("base_model.model.").replace(".default.", ".") for name, _ in named}
    names = {name: here.removesuffix(".weight") if "magnitude" in here else here for name, here in names.items()}
    return {names[name]: p.detach().float().numpy().copy() for name, p in named}


def gradients(theirs: Any) -> dict[str, np.ndarray]:
    return arrays([(name, p.grad) for name, p in trained(theirs)])


def logits_of(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens)).logits.float().numpy()


def run(theirs: Any, tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """-> logits (B, T, V) and loss; the gradients are left on the trained parameters."""
    output = theirs(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels))
    output.loss.backward()
    return output.logits.detach().float().numpy(), output.loss.item()


def their_steps(
    theirs: Any, tokens: np.ndarray, labels: np.ndarray, steps: int, **changes: Any
) -> Iterator[dict[str, Any]]:
    """For each step: the loss, the gradients before clipping, their norm, and the adapter after the step."""
    params = [p for _, p in trained(theirs)]
    optimizer = torch.optim.AdamW(params, **STEP | changes)
    for _ in range(steps):
        optimizer.zero_grad()
        _, loss = run(theirs, tokens, labels)
        grads = gradients(theirs)
        norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        yield {"loss": loss, "gradients": grads, "norm": norm.item(), "adapter": arrays(trained(theirs))}


def their_adamw(
    start: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]], decayed: set[str], setting: dict[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """-> {"params", "m", "v"} after an update with each of `grads`; only `decayed` has weight decay."""
    params = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in start.items()}
    rest = {key: value for key, value in setting.items() if key != "weight_decay"}
    groups = [
        {"params": [p for name, p in params.items() if name in decayed], "weight_decay": setting["weight_decay"]},
        {"params": [p for name, p in params.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **rest, foreach=False, fused=False)
    for g in grads:
        for name, p in params.items():
            p.grad = torch.from_numpy(g[name].copy())
        optimizer.step()
    state = optimizer.state
    return {
        "params": {name: p.detach().numpy() for name, p in params.items()},
        "m": {name: state[p]["exp_avg"].numpy() for name, p in params.items()},
        "v": {name: state[p]["exp_avg_sq"].numpy() for name, p in params.items()},
    }


def load_strictly(path: str | Path) -> Any:
    """transformers' model of the directory; ValueError if a tensor is missing or not expected."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # a pair, with output_loading_info
    theirs, info = load(path, dtype=torch.float32, device_map="cpu", output_loading_info=True)
    for what, names in info.items():
        if names:
            raise ValueError(f"transformers reports {what}: {sorted(map(str, names))[0]}")
    return theirs


def load_adapter_strictly(base: Any, path: Path) -> Any:
    """PEFT's model with the adapter in the directory; ValueError if a tensor is missing or not expected."""
    theirs = peft.PeftModel.from_pretrained(base, path, is_trainable=True)
    result = theirs.load_adapter(path, "again")
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if "lora" in name)]
    if wrong:
        raise ValueError(f"PEFT misses or does not expect {wrong[0]}")
    theirs.delete_adapter("again")
    return theirs


def dequantised(base: Any) -> dict[str, np.ndarray]:
    """{our name: float32 array} of every 4-bit weight, dequantised by bitsandbytes."""
    import bitsandbytes.functional as bnb

    named = packed_weights(base).items()
    return {name: bnb.dequantize_4bit(p.data, p.quant_state).float().numpy() for name, p in named}
