"""The included models: sizes, graphs, and that the presets made of them can be used."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
import torch

from caltrain.models.layers import AvgPool, Conv, Linear, Route, Shape, Shortcut, Transformer, has_weights
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec, Partition, check_model, layer_shapes, live_at, macs
from caltrain.models.zoo import cifar_10_layer, cifar_18_layer, mlp, resnet18_32, vit_small_32
from caltrain.presets import NETWORKS, PRESETS, STARTS, NetworkName, PresetName, StartName, with_cut
from caltrain.records.schema import check_schema
from caltrain.training.spec import TrainingSpec
from support.networks import cfg

COLOUR = (3, 32, 32)


def parameters(spec: ModelSpec, shape: Shape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(spec, input_shape=shape).parameters())


@pytest.mark.parametrize(
    ("spec", "shape", "layers", "weights", "millions"),
    [
        (cifar_18_layer(), COLOUR, 16, 7_681_674, 812),
        (cifar_10_layer(), COLOUR, 8, 300_554, 136),  # 136 MMAC is also what the paper's would have, if so remembered
        (resnet18_32(), COLOUR, 33, 11_173_962, 555),  # torchvision's with this stem has as many
        (vit_small_32(), COLOUR, 10, 1_205_642, 82),
        (mlp(10), (1, 1, 20), 4, 39_562, 0),
    ],
)
def test_an_included_model_has_its_size(
    spec: ModelSpec, shape: Shape, layers: int, weights: int, millions: int
) -> None:
    assert len(spec.layers) == layers
    assert layer_shapes(spec, shape)[-1] == (10,)
    assert parameters(spec, shape) == weights
    assert round(macs(spec, shape) / 1e6) == millions


@pytest.mark.data
def test_the_18_layer_network_is_that_of_the_file() -> None:
    found = cfg("cifar.2017")
    assert cifar_18_layer() == found.model
    preset = NETWORKS["cifar10-18-layer"]
    assert msgspec.structs.replace(preset.training, checkpoint_steps=0) == found.training(epochs=12)
    assert (preset.data.shape, preset.data.mean, preset.data.std) == (found.record, (found.mean,), (found.std,))


def test_any_number_of_classes_changes_the_last_weights_only() -> None:
    for make, shape in (
        (cifar_18_layer, COLOUR),
        (cifar_10_layer, COLOUR),
        (resnet18_32, COLOUR),
        (vit_small_32, COLOUR),
    ):
        ten, seven = make(10), make(7)
        assert layer_shapes(seven, shape)[-1] == (7,)
        changed = [i for i, (a, b) in enumerate(zip(ten.layers, seven.layers, strict=True)) if a != b]
        assert changed == [max(i for i, layer in enumerate(ten.layers) if has_weights(layer))]


def test_a_residual_block_goes_around_by_itself_or_by_a_projection() -> None:
    layers = resnet18_32().layers
    shortcuts = [i for i, layer in enumerate(layers) if isinstance(layer, Shortcut)]
    assert len(shortcuts) == 8
    projected = [i for i in shortcuts if isinstance(layers[i - 1], Conv) and layers[i - 1] != layers[i - 2]
                 and isinstance(layers[i - 2], Route)]  # fmt: skip
    assert len(projected) == 3
    for i in shortcuts:
        shortcut, route = layers[i], layers[i - 2]
        assert isinstance(shortcut, Shortcut)
        entry = i - 5 if i in projected else i - 3
        assert shortcut.source == (i - 3 if i in projected else entry)
        if isinstance(route, Route):
            assert route.sources == (entry,)
        assert live_at(layers, entry + 2) == ((entry, entry + 1))
    assert [s for s in layer_shapes(resnet18_32(), COLOUR) if len(s) == 3][-1] == (512, 4, 4)


def test_a_vision_transformer_has_64_tokens() -> None:
    spec = vit_small_32()
    assert sum(isinstance(layer, Transformer) for layer in spec.layers) == 6
    assert layer_shapes(spec, COLOUR)[1:8] == ((64, 128),) * 7


def test_macs_count_what_is_multiplied() -> None:
    spec = ModelSpec(layers=(Conv(filters=4, stride=2), AvgPool(), Linear(units=5)))
    assert macs(spec, (3, 8, 6)) == 4 * 3 * 9 * 4 * 3 + 4 * 5
    tokens, width = 64, 128
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    assert macs(vit_small_32(), COLOUR) == width * 3 * 16 * tokens + 6 * block + width * 10


def test_names_of_presets_are_told_apart() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)
    assert set(get_args(NetworkName)) == set(NETWORKS)
    assert set(get_args(StartName)) == set(STARTS) == set(PRESETS) | set(NETWORKS)
    assert not set(PRESETS) & set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_preset_can_be_used_and_keeps_logits_inside(name: NetworkName) -> None:
    preset = NETWORKS[name]
    check_schema(preset.data)
    check_model(preset.model, preset.partition, input_shape=preset.data.shape, classes=10)
    assert msgspec.convert(msgspec.to_builtins(preset.training), TrainingSpec) == preset.training
    assert preset.partition.front == 4
    assert has_weights(preset.model.layers[-preset.partition.head])


def test_a_preset_can_be_cut_elsewhere() -> None:
    preset = NETWORKS["cifar10-18-layer"]
    assert with_cut(preset, front=None, head=None) == preset
    assert with_cut(preset, front=2, head=0).partition == Partition(front=2)
    assert with_cut(preset, front=None, head=3).partition == Partition(front=4, head=3)
