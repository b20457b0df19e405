"""A model as data: shapes, bounds, and where it may be cut."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.errors import ConfigError
from caltrain.models import spec as specs
from caltrain.models.spec import (
    AvgPool,
    Conv,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    ModelSpec,
    Partition,
    Shape,
    check_model,
    inner_weights,
    layer_shapes,
)
from support.samples import refused

IMAGE = (3, 8, 6)
MODEL = ModelSpec(
    layers=(
        Conv(filters=4, batch_norm=True),
        Dropout(p=0.5),
        Conv(filters=8, stride=2),
        MaxPool(),
        Flatten(),
        Dropout(p=0.5),
        Linear(units=10, activation="relu"),
        Linear(units=3),
    )
)


def model(*layers: Layer) -> ModelSpec:
    return ModelSpec(layers=layers)


def test_known_digest() -> None:
    assert MODEL.digest() == "sha256:8bcc04103cff2951558c2acfc379b833c03bd4ac560f91a36385ba8b5b6eae24"


def test_the_digest_covers_every_layer_and_its_order() -> None:
    first, second, *rest = MODEL.layers
    others = (model(second, first, *rest), model(*MODEL.layers[:-1]), model(Conv(filters=4), second, *rest))
    assert len({MODEL.digest(), *(other.digest() for other in others)}) == 4


def test_shapes_of_a_whole_model() -> None:
    assert layer_shapes(MODEL, IMAGE) == (
        (3, 8, 6),
        (4, 8, 6),
        (4, 8, 6),
        (8, 4, 3),
        (8, 2, 1),
        (16,),
        (16,),
        (10,),
        (3,),
    )


LAYERS: list[tuple[Layer, Shape, Shape]] = [
    (Conv(filters=5), (3, 8, 6), (5, 8, 6)),
    (Conv(filters=5, kernel=1, padding=0), (3, 8, 6), (5, 8, 6)),
    (Conv(filters=5, kernel=5, padding=0), (3, 8, 6), (5, 4, 2)),
    (Conv(filters=5, stride=2), (3, 7, 6), (5, 4, 3)),
    (Conv(filters=5, kernel=8, padding=1), (3, 8, 6), (5, 3, 1)),
    (MaxPool(), (3, 7, 6), (3, 3, 3)),
    (MaxPool(kernel=3, stride=2), (3, 8, 6), (3, 3, 2)),
    (MaxPool(kernel=6, stride=1), (3, 8, 6), (3, 3, 1)),
    (AvgPool(), (3, 8, 6), (3,)),
    (Flatten(), (3, 8, 6), (144,)),
    (Dropout(p=0.1), (3, 8, 6), (3, 8, 6)),
    (Dropout(p=0.1), (7,), (7,)),
    (Linear(units=5), (7,), (5,)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS)
def test_shape_of_a_layer(layer: Layer, shape: Shape, expected: Shape) -> None:
    assert layer_shapes(model(layer, Dropout(p=0)), shape)[1] == expected


MISFITS: list[tuple[Layer, Shape]] = [
    (Linear(units=5), (3, 8, 6)),
    (Conv(filters=5), (7,)),
    (MaxPool(), (7,)),
    (AvgPool(), (7,)),
    (Flatten(), (7,)),
    (Flatten(), (3, 8)),
    (Conv(filters=5, kernel=9), (3, 8, 6)),
    (Conv(filters=5, kernel=7, padding=0), (3, 8, 6)),
    (MaxPool(kernel=7), (3, 8, 6)),
    (MaxPool(kernel=64, stride=64), (3, 8, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), MISFITS)
def test_a_layer_that_does_not_fit_its_input_is_refused(layer: Layer, shape: Shape) -> None:
    with refused(ConfigError, "model.shape"):
        layer_shapes(model(layer, Dropout(p=0)), shape)


def test_an_activation_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "MAX_ACTIVATION", 4 * 8 * 6)
    assert layer_shapes(model(Conv(filters=4), AvgPool()), IMAGE)
    with refused(ConfigError, "model.too-large"):
        layer_shapes(model(Conv(filters=5), AvgPool()), IMAGE)


def test_weights_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    conv_and_linear = model(Conv(filters=4, kernel=3), AvgPool(), Linear(units=5))
    weights = 4 * 3 * 3 * 3 + 5 * 4
    monkeypatch.setattr(specs, "MAX_WEIGHTS", weights)
    assert layer_shapes(conv_and_linear, IMAGE)
    monkeypatch.setattr(specs, "MAX_WEIGHTS", weights - 1)
    with refused(ConfigError, "model.too-large"):
        layer_shapes(conv_and_linear, IMAGE)


def test_the_largest_layers_do_not_fit_together() -> None:
    with refused(ConfigError, "model.too-large"):
        layer_shapes(model(Linear(units=65_536), Linear(units=65_536)), (65_536,))
    with refused(ConfigError, "model.too-large"):
        layer_shapes(model(Conv(filters=65_536), Flatten()), (1, 1024, 1024))


GOOD_CUTS = [
    Partition(front=1),
    Partition(front=1, head=1),
    Partition(front=2, head=5),
    Partition(front=7),
    Partition(front=0, head=1, unsafe_cut_at_input=True),
]


@pytest.mark.parametrize("partition", GOOD_CUTS, ids=repr)
def test_a_model_with_a_center_and_a_front_that_have_weights_is_accepted(partition: Partition) -> None:
    check_model(MODEL, partition, input_shape=IMAGE, classes=3)


def test_the_form_follows_from_the_head() -> None:
    assert Partition(front=1).form == "two-way"
    assert Partition(front=1, head=1).form == "ternary"


FEW = model(Dropout(p=0.5), Flatten(), Linear(units=4), Dropout(p=0.5), Linear(units=3))
BAD_MODELS: dict[str, tuple[ModelSpec, Partition, str]] = {
    "four outputs for three classes": (model(Flatten(), Linear(units=4)), Partition(front=1), "model.classes"),
    "an image at the end": (model(Conv(filters=3), Conv(filters=3)), Partition(front=1), "model.classes"),
    "activation at the end": (
        model(Flatten(), Linear(units=3, activation="relu")),
        Partition(front=1),
        "model.no-logits",
    ),
    "pooling at the end": (model(Conv(filters=3), AvgPool()), Partition(front=1), "model.no-logits"),
    "front takes all": (MODEL, Partition(front=8), "model.partition"),
    "head takes all": (MODEL, Partition(front=0, head=8, unsafe_cut_at_input=True), "model.partition"),
    "front and head meet": (MODEL, Partition(front=4, head=4), "model.partition"),
    "front and head overlap": (MODEL, Partition(front=5, head=5), "model.partition"),
    "front without weights": (FEW, Partition(front=2), "model.partition"),
    "center without weights": (FEW, Partition(front=3, head=1), "model.partition"),
    "records go out": (MODEL, Partition(front=0), "model.cut-at-input"),
    "shapes do not fit": (model(Flatten(), Flatten(), Linear(units=3)), Partition(front=1), "model.shape"),
}


@pytest.mark.parametrize(("spec", "partition", "code"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_cut_as_said_is_refused(spec: ModelSpec, partition: Partition, code: str) -> None:
    with refused(ConfigError, code):
        check_model(spec, partition, input_shape=IMAGE, classes=3)


MALFORMED: dict[str, dict[str, Any]] = {
    "no type": {"units": 3},
    "unknown type": {"type": "attention", "units": 3},
    "unknown key": {"type": "linear", "units": 3, "bias": True},
    "key of another layer": {"type": "flatten", "units": 3},
    "no units": {"type": "linear"},
    "units of 0": {"type": "linear", "units": 0},
    "units beyond the limit": {"type": "linear", "units": 65_537},
    "filters as text": {"type": "conv", "filters": "4"},
    "kernel of 0": {"type": "conv", "filters": 4, "kernel": 0},
    "kernel of 65": {"type": "maxpool", "kernel": 65},
    "stride of 0": {"type": "maxpool", "stride": 0},
    "negative padding": {"type": "conv", "filters": 4, "padding": -1},
    "unknown activation": {"type": "linear", "units": 3, "activation": "tanh"},
    "dropout of everything": {"type": "dropout", "p": 1.0},
    "dropout of nan": {"type": "dropout", "p": float("nan")},
    "dropout below 0": {"type": "dropout", "p": -0.1},
}


@pytest.mark.parametrize("layer", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_layer_is_refused_when_read(layer: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"layers": [layer, {"type": "flatten"}]}, ModelSpec)


@pytest.mark.parametrize("count", [0, 1, 513])
def test_the_number_of_layers_is_bounded(count: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"layers": [{"type": "flatten"}] * count}, ModelSpec)


@pytest.mark.parametrize(("front", "head", "weights"), [(1, 0, 72), (1, 1, 72 + 40), (2, 1, 72 + 40), (0, 1, 40)])
def test_inner_weights_are_those_of_front_and_head(front: int, head: int, weights: int) -> None:
    spec = ModelSpec(layers=(Conv(filters=8), MaxPool(), Flatten(), Linear(units=10), Linear(units=4)))
    assert inner_weights(spec, Partition(front=front, head=head), (1, 4, 4)) == weights
