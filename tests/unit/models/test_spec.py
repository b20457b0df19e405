"""A model as data: shapes, bounds, and where it may be cut."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.errors import ConfigError
from caltrain.models import spec as specs
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
)
from caltrain.models.spec import (
    Deepen,
    ModelSpec,
    Partition,
    Wheel,
    check_model,
    cut_shapes,
    embedding_layer,
    inner_weights,
    layer_shapes,
    live_at,
    model_input,
    zone_ranges,
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
    assert MODEL.digest() == "sha256:60f6835655d4e56440fc1f495729c5521f039fc4527628eaff27f1d45da08de8"


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


RESIDUAL = model(
    Conv(filters=4),
    Conv(filters=4),
    Shortcut(source=0),
    Conv(filters=6, stride=2),
    Route(sources=(2,)),
    Conv(filters=6, kernel=1, padding=0, stride=2),
    Shortcut(source=3),
    Route(sources=(6, 3)),
    AvgPool(),
    Linear(units=3),
)
VIT = model(Patches(size=2, width=8), Transformer(heads=2), Norm(), AvgPool(), Linear(units=3))
SKIP = model(Conv(filters=3), Conv(filters=3), Route(sources=(1, -1)), AvgPool(), Linear(units=3))


def test_shapes_of_a_graph() -> None:
    assert layer_shapes(RESIDUAL, IMAGE) == (
        IMAGE,
        *[(4, 8, 6)] * 3,
        (6, 4, 3),
        (4, 8, 6),
        *[(6, 4, 3)] * 2,
        (12, 4, 3),
        (12,),
        (3,),
    )
    assert layer_shapes(VIT, IMAGE) == (IMAGE, *[(12, 8)] * 3, (8,), (3,))


@pytest.mark.parametrize(
    "layers",
    [
        (Conv(filters=3), Shortcut(source=1)),
        (Conv(filters=3), Shortcut(source=2), Flatten()),
        (Route(sources=(-1, 0)), Flatten()),
        (Conv(filters=3), Route(sources=(0, 5)), Flatten()),
    ],
    ids=str,
)
def test_a_layer_reads_only_what_is_before_it(layers: tuple[Layer, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.shape: layer \d reads layer \d, which is not before it"):
        layer_shapes(model(*layers), (3, 8, 6))


def test_a_misfit_is_found_wherever_it_is() -> None:
    with refused(ConfigError, "model.shape"):
        layer_shapes(model(Conv(filters=5), Shortcut(source=-1), Flatten()), IMAGE)


def test_what_crosses_a_cut_is_what_a_later_layer_still_reads() -> None:
    assert [live_at(MODEL.layers, cut) for cut in range(9)] == [(cut - 1,) for cut in range(9)]
    assert [live_at(RESIDUAL.layers, cut) for cut in range(11)] == [
        *((-1,), (0,), (0, 1), (2,), (2, 3), (3, 4)),
        *((3, 5), (3, 6), (7,), (8,), (9,)),
    ]
    assert [live_at(SKIP.layers, cut) for cut in range(4)] == [(-1,), (-1, 0), (-1, 1), (2,)]


def test_the_shapes_that_cross_are_those_of_the_live_tensors() -> None:
    assert cut_shapes(RESIDUAL, 5, IMAGE) == ((6, 4, 3), (4, 8, 6))
    assert cut_shapes(RESIDUAL, 10, IMAGE) == ((3,),)
    assert cut_shapes(SKIP, 1, IMAGE) == (IMAGE, IMAGE)
    assert cut_shapes(VIT, 0, IMAGE) == (IMAGE,)


def test_records_are_cropped_to_the_models_size() -> None:
    spec = ModelSpec(layers=MODEL.layers, size=(6, 4))
    assert model_input(spec, (3, 8, 6)) == (3, 6, 4)
    assert model_input(spec, (3, 6, 4)) == (3, 6, 4)
    assert model_input(MODEL, IMAGE) == IMAGE
    assert layer_shapes(spec, (3, 8, 6))[:2] == ((3, 6, 4), (4, 6, 4))


@pytest.mark.parametrize("record", [(3, 5, 6), (3, 8, 3), (5, 3), (24,)], ids=str)
def test_records_smaller_than_the_models_size_are_refused(record: Shape) -> None:
    with refused(ConfigError, "model.size"):
        layer_shapes(ModelSpec(layers=MODEL.layers, size=(6, 4)), record)


def test_the_embedding_is_what_the_last_layer_with_weights_reads() -> None:
    assert embedding_layer(MODEL) == 7
    assert embedding_layer(model(Conv(filters=4), Conv(filters=3), AvgPool())) == 1
    assert embedding_layer(VIT) == 4


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
    Partition(front=1, head=1, deepen=(Deepen(epoch=1, front=2), Deepen(epoch=9, front=6))),
]


@pytest.mark.parametrize("partition", GOOD_CUTS, ids=repr)
def test_a_model_with_a_center_and_a_front_that_have_weights_is_accepted(partition: Partition) -> None:
    check_model(MODEL, partition, input_shape=IMAGE, classes=3)


def test_the_form_follows_from_the_head() -> None:
    assert Partition(front=1).form == "two-way"
    assert Partition(front=1, head=1).form == "ternary"


STAGED = model(Conv(filters=4), Stage(name="rest", shape=(3,), weights=7))
WHEEL = Wheel(sha256="sha256:" + "ab" * 32, factory="some.package:make")


def deepened(front: int, *steps: tuple[int, int], head: int = 0) -> Partition:
    return Partition(front=front, head=head, deepen=tuple(Deepen(epoch=epoch, front=to) for epoch, to in steps))


FEW = model(Dropout(p=0.5), Flatten(), Linear(units=4), Dropout(p=0.5), Linear(units=3))
BAD_MODELS: dict[str, tuple[ModelSpec, Partition, str]] = {
    "four outputs for three classes": (model(Flatten(), Linear(units=4)), Partition(front=1), "model.classes"),
    "an image at the end": (model(Conv(filters=3), Conv(filters=3)), Partition(front=1), "model.classes"),
    "activation at the end": (
        model(Flatten(), Linear(units=3, activation="relu")),
        Partition(front=1),
        "model.no-logits",
    ),
    "maxima at the end": (model(Flatten(), Linear(units=3), Dropout(p=0)), Partition(front=1), "model.no-logits"),
    "front takes all": (MODEL, Partition(front=8), "model.partition"),
    "head takes all": (MODEL, Partition(front=0, head=8, unsafe_cut_at_input=True), "model.partition"),
    "front and head meet": (MODEL, Partition(front=4, head=4), "model.partition"),
    "front and head overlap": (MODEL, Partition(front=5, head=5), "model.partition"),
    "front without weights": (FEW, Partition(front=2), "model.partition"),
    "center without weights": (FEW, Partition(front=3, head=1), "model.partition"),
    "records go out": (MODEL, Partition(front=0), "model.cut-at-input"),
    "shapes do not fit": (model(Flatten(), Flatten(), Linear(units=3)), Partition(front=1), "model.shape"),
    "records are read again behind the cut": (SKIP, Partition(front=1), "model.cut-at-input"),
    "a sum at the end": (model(Flatten(), Linear(units=3), Shortcut(source=1)), Partition(front=1), "model.no-logits"),
    "a stage and no wheel": (STAGED, Partition(front=1), "model.no-wheel"),
    "it deepens to nothing new": (MODEL, deepened(1, (1, 1)), "model.not-deeper"),
    "it becomes shallower": (MODEL, deepened(3, (1, 5), (2, 4)), "model.not-deeper"),
    "two steps in an epoch": (MODEL, deepened(1, (2, 2), (2, 3)), "model.not-deeper"),
    "steps out of order": (MODEL, deepened(1, (2, 2), (1, 3)), "model.not-deeper"),
    "it deepens until nothing is left": (MODEL, deepened(1, (1, 7), head=1), "model.partition"),
    "it deepens until the center has no weights": (MODEL, deepened(1, (1, 3), head=2), "model.partition"),
}


@pytest.mark.parametrize(("spec", "partition", "code"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_cut_as_said_is_refused(spec: ModelSpec, partition: Partition, code: str) -> None:
    with refused(ConfigError, code):
        check_model(spec, partition, input_shape=IMAGE, classes=3)


def test_pooled_channels_may_be_the_logits() -> None:
    check_model(model(Conv(filters=4), Conv(filters=3), AvgPool()), Partition(front=1), input_shape=IMAGE, classes=3)


def test_a_cut_with_too_many_live_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = model(*[Conv(filters=2)] * 4, Route(sources=(0, 1, 2, 3)), Conv(filters=3), AvgPool(), Linear(units=3))
    monkeypatch.setattr(specs, "MAX_LIVE", 4)
    for partition in (Partition(front=4), Partition(front=1, head=4)):
        check_model(wide, partition, input_shape=IMAGE, classes=3)
    monkeypatch.setattr(specs, "MAX_LIVE", 3)
    for partition in (Partition(front=4), Partition(front=1, head=4)):
        with refused(ConfigError, "model.partition"):
            check_model(wide, partition, input_shape=IMAGE, classes=3)


def test_a_stage_may_be_cut_and_may_end_a_model_that_names_its_wheel() -> None:
    spec = ModelSpec(layers=STAGED.layers, wheel=WHEEL)
    check_model(spec, Partition(front=1), input_shape=IMAGE, classes=3)
    assert spec.digest() != STAGED.digest()


@pytest.mark.parametrize("spec", [RESIDUAL, VIT], ids=["residual", "vit"])
def test_graphs_are_accepted_where_the_zones_have_weights(spec: ModelSpec) -> None:
    for partition in (Partition(front=1), Partition(front=1, head=2)):
        check_model(spec, partition, input_shape=IMAGE, classes=3)


def test_the_cut_deepens_by_the_schedule() -> None:
    cut = deepened(2, (3, 4), (5, 7), head=1)
    assert [cut.front_at(epoch) for epoch in range(7)] == [2, 2, 2, 4, 4, 7, 7]
    assert cut.at(4) == Partition(front=4, head=1)
    assert cut.at(cut.front_at(0)) == Partition(front=2, head=1)
    assert zone_ranges(MODEL, cut.at(4)) == (range(4), range(4, 7), range(7, 8))


@pytest.mark.parametrize("factory", ["make", "a:", ":make", "a-b:make", "a:b.c", "a:make\n", "1a:make"])
def test_a_factory_is_a_module_and_a_function(factory: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"sha256": WHEEL.sha256, "factory": factory}, Wheel)


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
    "a route from nowhere": {"type": "route", "sources": []},
    "a route from 33 layers": {"type": "route", "sources": [0] * 33},
    "a source before the input": {"type": "shortcut", "source": -2},
    "a source beyond all layers": {"type": "route", "sources": [512]},
    "no heads": {"type": "transformer", "heads": 0},
    "patches of 0": {"type": "patches", "size": 0, "width": 4},
    "a stage without a shape": {"type": "stage", "name": "a", "shape": [], "weights": 1},
    "a stage of four dimensions": {"type": "stage", "name": "a", "shape": [1, 1, 1, 1], "weights": 1},
    "a stage with a path for a name": {"type": "stage", "name": "../a", "shape": [1], "weights": 1},
    "a stage of negative weights": {"type": "stage", "name": "a", "shape": [1], "weights": -1},
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


def test_inner_weights_are_those_of_the_deepest_front() -> None:
    spec = ModelSpec(layers=(Conv(filters=8), MaxPool(), Flatten(), Linear(units=10), Linear(units=4)))
    assert inner_weights(spec, deepened(1, (2, 2), (3, 4)), (1, 4, 4)) == 72 + 8 * 4 * 10
