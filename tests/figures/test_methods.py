"""The picture of the methods shows the bytes that they take."""

from pathlib import Path

import numpy as np

import refqlora as rq
from refqlora.commands import main
from refqlora.commands.figures import FIGURES
from refqlora.figures.methods import method_bytes


def test_the_bytes_are_those_of_the_arrays():
    size, rank = 192, 5
    w = np.ones((size, size), np.float32)
    adapter = np.ones((rank, size), np.float32).nbytes + np.ones((size, rank), np.float32).nbytes
    moments = rq.AdamW({"A": np.ones((rank, size), np.float32), "B": np.ones((size, rank), np.float32)}, lr=1).nbytes
    trained = {"adapter": adapter, "gradients": adapter, "AdamW": moments}
    assert method_bytes(size, rank) == {
        "full fine-tuning": {"weights": w.nbytes, "gradients": w.nbytes, "AdamW": rq.AdamW({"W": w}, lr=1).nbytes},
        "LoRA": {"weights": w.nbytes, **trained},
        "QLoRA": {"weights": rq.quantize(w).nbytes, **trained},
    }


def test_every_figure_is_redrawn(tmp_path):
    assert main(["figures", "--out", str(tmp_path / "out")]) == 0
    kept = Path(rq.__file__).parent.parent / "figures"
    assert (
        {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in kept.iterdir()} == set(FIGURES)
    )
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
