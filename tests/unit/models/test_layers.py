"""Layers as data: what each reads, the shape that it gives, how many weights it has, and what none can be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from caltrain.errors import ConfigError
from caltrain.models.layers import (
    AvgPool,
    Conv,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Norm,
    Patches,
    Route,
    Shape,
    Shortcut,
    Stage,
    Transformer,
    has_weights,
    shape_of,
    sources_of,
    weights_of,
)
from support.samples import refused

IMAGE: Shape = (3, 8, 6)
STAGE = Stage(name="middle", shape=(4, 2), weights=10)

SHAPES: list[tuple[Layer, list[Shape], Shape]] = [
    (Conv(filters=5), [IMAGE], (5, 8, 6)),
    (Conv(filters=5, kernel=1, padding=0), [IMAGE], (5, 8, 6)),
    (Conv(filters=5, kernel=5, padding=0), [IMAGE], (5, 4, 2)),
    (Conv(filters=5, kernel=1, padding=1), [IMAGE], (5, 10, 8)),
    (Conv(filters=5, stride=2), [(3, 7, 6)], (5, 4, 3)),
    (Conv(filters=5, kernel=8, padding=1), [IMAGE], (5, 3, 1)),
    (MaxPool(), [(3, 7, 6)], (3, 3, 3)),
    (MaxPool(kernel=3, stride=2), [IMAGE], (3, 3, 2)),
    (MaxPool(kernel=6, stride=1), [IMAGE], (3, 3, 1)),
    (MaxPool(padding=1), [(3, 7, 6)], (3, 4, 3)),
    (MaxPool(kernel=3, stride=1, padding=2), [IMAGE], IMAGE),
    (AvgPool(), [IMAGE], (3,)),
    (AvgPool(), [(12, 5)], (5,)),
    (Flatten(), [IMAGE], (144,)),
    (Dropout(p=0.1), [IMAGE], IMAGE),
    (Dropout(p=0.1), [(7,)], (7,)),
    (Linear(units=5), [(7,)], (5,)),
    (Shortcut(source=0), [IMAGE, IMAGE], IMAGE),
    (Shortcut(source=0), [(7,), (7,)], (7,)),
    (Route(sources=(0,)), [IMAGE], IMAGE),
    (Route(sources=(0, 1, 2)), [IMAGE, (5, 8, 6), IMAGE], (11, 8, 6)),
    (Route(sources=(0, 1)), [(7,), (2,)], (9,)),
    (Patches(size=2, width=5), [IMAGE], (12, 5)),
    (Transformer(heads=3), [(12, 6)], (12, 6)),
    (Norm(), [(12, 6)], (12, 6)),
    (STAGE, [IMAGE], (4, 2)),
    (STAGE, [(7,)], (4, 2)),
]


@pytest.mark.parametrize(("layer", "inputs", "expected"), SHAPES, ids=str)
def test_a_layer_gives_its_shape(layer: Layer, inputs: Sequence[Shape], expected: Shape) -> None:
    assert shape_of(4, layer, inputs) == expected


MISFITS: list[tuple[Layer, list[Shape], str]] = [
    (Linear(units=5), [IMAGE], r"needs 1 dimensions, gets \(3, 8, 6\)"),
    (Linear(units=5), [(3, 8)], "needs 1 dimensions"),
    (Conv(filters=5), [(7,)], "needs 3 dimensions"),
    (MaxPool(), [(3, 7)], "needs 3 dimensions"),
    (Patches(size=2, width=5), [(4, 4)], "needs 3 dimensions"),
    (Flatten(), [(7,)], "needs 3 dimensions"),
    (Flatten(), [(3, 8)], "needs 3 dimensions"),
    (Transformer(heads=1), [IMAGE], "needs 2 dimensions"),
    (Transformer(heads=1), [(7,)], "needs 2 dimensions"),
    (Norm(), [IMAGE], "needs 2 dimensions"),
    (AvgPool(), [(7,)], "nothing to average"),
    (Transformer(heads=4), [(12, 6)], "4 heads do not divide a width of 6"),
    (Patches(size=4, width=5), [IMAGE], "squares of 4 do not fill"),
    (Patches(size=3, width=5), [(3, 8, 6)], "squares of 3 do not fill"),
    (Conv(filters=5, kernel=9), [IMAGE], "window of 9 does not fit"),
    (Conv(filters=5, kernel=7, padding=0), [IMAGE], "window of 7 does not fit"),
    (MaxPool(kernel=7), [IMAGE], "window of 7 does not fit"),
    (MaxPool(kernel=64, stride=64), [IMAGE], "window of 64 does not fit"),
    (MaxPool(kernel=2, padding=2), [IMAGE], "window of 2 does not fit"),
    (MaxPool(kernel=7, padding=7), [IMAGE], "window of 7 does not fit"),
    (Shortcut(source=0), [IMAGE, (3, 8, 5)], r"\(shortcut\) cannot join \(3, 8, 6\), \(3, 8, 5\)"),
    (Shortcut(source=0), [IMAGE, (4, 8, 6)], "cannot join"),
    (Shortcut(source=0), [IMAGE, (3, 8)], "cannot join"),
    (Route(sources=(0, 1)), [IMAGE, (3, 8, 5)], r"\(route\) cannot join"),
    (Route(sources=(0, 1)), [IMAGE, (7,)], "cannot join"),
]


@pytest.mark.parametrize(("layer", "inputs", "why"), MISFITS, ids=str)
def test_a_layer_that_does_not_fit_its_inputs_is_refused(layer: Layer, inputs: Sequence[Shape], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.shape: layer 4\b.*{why}"):
        shape_of(4, layer, inputs)


def test_a_window_no_larger_than_its_margin_would_see_nothing_but_margin() -> None:
    assert shape_of(0, MaxPool(kernel=3, padding=2), [IMAGE]) == (3, 4, 3)
    with refused(ConfigError, "model.shape"):
        shape_of(0, MaxPool(kernel=3, padding=3), [IMAGE])


def test_a_layer_reads_the_one_before_it_unless_it_says_otherwise() -> None:
    assert sources_of(5, Conv(filters=1)) == (4,)
    assert sources_of(0, Flatten()) == (-1,)
    assert sources_of(5, Shortcut(source=2)) == (4, 2)
    assert sources_of(5, Route(sources=(3, -1, 3))) == (3, -1, 3)
    assert sources_of(5, STAGE) == (4,)


WEIGHTS: list[tuple[Layer, Shape, int]] = [
    (Conv(filters=5, kernel=3, batch_norm=True), IMAGE, 5 * 3 * 9),
    (Linear(units=5), (7,), 35),
    (Patches(size=2, width=5), IMAGE, 5 * 3 * 4 + 12 * 5),
    (Transformer(heads=2, ratio=3), (12, 6), 36 * 4 + 36 * 6),
    (STAGE, IMAGE, 10),
    (Stage(name="none", shape=(1,), weights=0), IMAGE, 0),
    (MaxPool(), IMAGE, 0),
    (AvgPool(), IMAGE, 0),
    (Dropout(p=0.5), IMAGE, 0),
    (Flatten(), IMAGE, 0),
    (Norm(), (12, 6), 0),
    (Shortcut(source=0), IMAGE, 0),
    (Route(sources=(0,)), IMAGE, 0),
]


@pytest.mark.parametrize(("layer", "shape", "weights"), WEIGHTS, ids=str)
def test_weights_are_counted_and_known(layer: Layer, shape: Shape, weights: int) -> None:
    assert weights_of(layer, shape) == weights
    assert has_weights(layer) == (weights > 0)
