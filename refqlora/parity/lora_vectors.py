"""The LoRA linear's vectors: small inputs, and torch's outputs and gradients in float64, rounded to float32."""

from __future__ import annotations

import numpy as np

SIZES = {  # N rows, in, out, rank; all different, except where noted
    "ordinary": (7, 12, 10, 3),
    "one row": (1, 9, 6, 2),
    "rank 1": (5, 8, 11, 1),
    "square": (6, 9, 9, 4),  # in = out
    "long": (300, 16, 20, 5),
    "B zero": (4, 10, 7, 3),  # as at the start of training: dA is zero
}
SCALES = {"ordinary": 1.75, "one row": 0.5, "rank 1": 3.0, "square": 1.25, "long": 2.0, "B zero": 1.5}
DROPOUT = 0.25


def inputs(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """{case: {x (N, in), W (out, in), A (r, in), B (out, r), dy (N, out), scale (), keep bool (N, in), dropout ()}}."""
    rng = np.random.default_rng(seed)
    cases: dict[str, dict[str, np.ndarray]] = {}
    for case, (n, i, o, r) in SIZES.items():
        shapes = {"x": (n, i), "W": (o, i), "A": (r, i), "B": (o, r), "dy": (n, o)}
        cases[case] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if case == "B zero":
            cases[case]["B"][...] = 0
        cases[case]["scale"] = np.array(SCALES[case], np.float32)
        cases[case]["keep"] = rng.random((n, i)) >= DROPOUT
        cases[case]["dropout"] = np.array(DROPOUT, np.float32)
    return cases


def observe(seed: int) -> dict[str, np.ndarray]:
    """lora/CASE/NAME: the inputs, y, dx, dA and dB; and the same with dropout, dropped_y, dropped_dx, ..."""
    import torch

    observed: dict[str, np.ndarray] = {}
    for case, given in inputs(seed).items():
        observed |= {f"lora/{case}/{name}": x for name, x in given.items()}
        x, w, a, b, dy = (torch.from_numpy(given[name]).double() for name in ("x", "W", "A", "B", "dy"))
        keep = torch.from_numpy(given["keep"]).double() / (1 - DROPOUT)
        for prefix, mask in (("", 1.0), ("dropped_", keep)):
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]
            y = leaves[0] @ w.T + float(given["scale"]) * ((leaves[0] * mask) @ leaves[1].T) @ leaves[2].T
            y.backward(dy)
            results = {"y": y.detach(), **{f"d{n}": t.grad for n, t in zip(("x", "A", "B"), leaves, strict=True)}}
            observed |= {f"lora/{case}/{prefix}{name}": t.float().numpy() for name, t in results.items()}
    return observed
