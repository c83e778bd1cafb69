"""The diagram's shapes are those of the engine's arrays, its orange parts those with a gradient."""

import numpy as np
from matplotlib.colors import same_color
from matplotlib.patches import Rectangle

from refqlora.figures import FROZEN, TRAINED
from refqlora.figures.anatomy import PARTS, SIZES, anatomy_figure
from refqlora.lora import LoRA, linear_backward, linear_forward

LENGTHS = {"N": 3, "in": 7, "out": 5, "r": 2}


def arrays():
    """{name: array} of a layer with these lengths, and the names of the gradients of its parameters."""
    x, w = np.ones((3, 7)), np.ones((5, 7))
    lora = LoRA(np.ones((2, 7)), np.ones((5, 2)), 1.0)
    y, cache = linear_forward(x, w, None, lora)
    z = cache[5]
    _, grads = linear_backward(y, cache)
    return {"x": x, "W": w, "A": lora.A, "z": z, "B": lora.B, "y": y}, set(grads)


def test_the_shapes_are_those_of_the_engine():
    for name, array in arrays()[0].items():
        rows, columns, _, _ = PARTS[name]
        assert (LENGTHS[rows], LENGTHS[columns]) == array.shape, name
    words = {text.get_text() for text in anatomy_figure().axes[0].texts}
    for name, (rows, columns, _, _) in PARTS.items():
        assert any(f"({rows}, {columns})" in said for said in words), name


def test_the_trained_parts_are_orange_and_the_frozen_one_is_blue():
    gradients = arrays()[1]
    for name, (_, _, _, color) in PARTS.items():
        assert (color == TRAINED) == (f"lora_{name}.weight" in gradients), name
        assert (color == FROZEN) == (name == "W"), name


def test_one_length_is_drawn_as_one_length():
    drawn = [patch for patch in anatomy_figure().axes[0].patches if isinstance(patch, Rectangle)]
    for patch, (rows, columns, middle, color) in zip(drawn, PARTS.values(), strict=True):
        assert (patch.get_height(), patch.get_width()) == (SIZES[rows], SIZES[columns])
        np.testing.assert_allclose(patch.get_center(), middle)
        assert same_color(patch.get_facecolor(), color)
