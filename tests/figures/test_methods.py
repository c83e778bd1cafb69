"""The picture of the methods shows the bytes that they take."""

import numpy as np

import refqlora as rq
from refqlora.figures.methods import method_bytes, methods_figure


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


def test_the_picture_shows_the_bytes():
    figure = methods_figure(method_bytes())
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert [next(text for text in panel if "MiB" in text) for panel in texts] == ["256.0 MiB", "66.0 MiB", "10.3 MiB"]
    bars = [[patch for patch in axes.patches if getattr(patch, "get_y", float)() == 1.55] for axes in figure.axes]
    widths = [sum(bar.get_width() for bar in panel) for panel in bars]
    np.testing.assert_allclose(widths, 9.2 * np.array([256, 66, 10.2539]) / 256, rtol=1e-4)


def test_the_picture_names_the_rank():
    texts = [[text.get_text() for text in axes.texts] for axes in methods_figure(method_bytes(64, 3), 3).figure.axes]
    assert ["r = 3" in panel for panel in texts] == [False, True, True]
