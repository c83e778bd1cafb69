"""Short training runs on the tiny Llama and their results, for the tests of the loop and of resuming."""

import json

import numpy as np
import tiny

import refqlora as rq
from refqlora.resume import METRICS
from refqlora.training import TrainingConfig, train

TARGETS = ("q_proj", "o_proj", "down_proj")


def new_model(seed=0, dtype=np.float32, quantize=False, adapter=True, **changes):
    """The tiny Llama; with `adapter` (True or options) one on some linears, its B not zero."""
    model = rq.Model.from_config(tiny.config(**changes), seed, dtype)
    if quantize:
        model.quantize()
    if adapter:
        model.add_adapter(**{"rank": 4, "alpha": 8, "targets": TARGETS, **(adapter if adapter is not True else {})})
        rng = np.random.default_rng(1)
        for name, p in model.trainable().items():
            if "lora_B" in name:
                p[...] = rng.normal(0, 0.3, p.shape)
    return model


def run(model, steps, dataset=None, **options):
    names = ("held_out", "out", "resume", "on_step")
    settings = {key: value for key, value in options.items() if key not in names}
    config = TrainingConfig(**{"steps": steps, "batch_size": 4, "lr": 1e-2, **settings})
    return train(model, dataset or tiny.examples(), config, **{k: options[k] for k in names if k in options})


def bits(arrays):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def read_rows(out):
    return [json.loads(line) for line in (out / METRICS).read_text().split("\n")[:-1]]
