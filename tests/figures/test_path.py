"""The picture of a block's path shows that block."""

import numpy as np
import pytest

import refqlora as rq
from refqlora.bits import block_path
from refqlora.codebooks import NF4
from refqlora.figures.path import LAYER, bundled_block, path_figure

RANDOM = block_path(np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32), 257)


def test_the_bundled_block_is_the_model_s():
    w = rq.Model.from_pretrained(rq.BUNDLED).params[LAYER]
    np.testing.assert_array_equal(bundled_block(3).weights, w.reshape(-1)[192:256])
    np.testing.assert_array_equal(bundled_block(3).back, rq.dequantize(rq.quantize(w)).reshape(-1)[192:256])


@pytest.mark.parametrize("path", [RANDOM, bundled_block()], ids=["random", "bundled"])
def test_what_is_drawn_is_the_path(path):
    figure = path_figure(path)
    weights, codes, packed, constant, back = figure.axes[:5]
    np.testing.assert_allclose([bar.get_height() for bar in weights.patches], path.weights)
    colors = [bar.get_facecolor() for bar in weights.patches]
    (largest,) = [i for i in range(64) if colors.count(colors[i]) == 1]
    assert abs(path.weights[largest]) == path.absmax

    lines = {line.get_label(): line.get_ydata() for line in codes.get_lines()}
    np.testing.assert_array_equal(lines["weight / absmax"], path.normalised)
    np.testing.assert_array_equal(lines["the nearest of NF4's 16 values"], NF4[path.codes])

    assert bytes.fromhex("".join(text.get_text() for text in packed.texts)) == path.packed.tobytes()

    ticks = constant.collections[0].get_segments()
    np.testing.assert_allclose([tick[0, 0] for tick in ticks], path.constants)
    said = " ".join(text.get_text().replace("−", "-") for text in constant.texts)
    for number in (path.absmax, path.mean, path.nested_absmax, path.absmax_back):
        assert f"{number:.5f}" in said
    assert f"code {path.absmax_code}," in said
    assert f"one for {len(path.constants)} blocks" in said

    np.testing.assert_allclose([bar.get_height() for bar in back.patches], path.back)
    np.testing.assert_array_equal(back.get_lines()[0].get_ydata()[:-1], path.weights)
