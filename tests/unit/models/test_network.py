"""Modules from a spec: the shapes that were announced, the whole model's names in every zone, keyed dropout."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.errors import ConfigError
from caltrain.models.blocks import KeyedDropout
from caltrain.models.layers import (
    AvgPool,
    Conv,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Patches,
    Route,
    Shortcut,
    Stage,
    Transformer,
)
from caltrain.models.network import Network, build, features_and_logits, last_features, lay_out, set_draws, zone_of
from caltrain.models.spec import ModelSpec, Partition, layer_shapes, live_at, zone_ranges
from caltrain.training.seeds import Draws, initialise
from support.samples import refused

SHAPE = (3, 9, 11)
LAYERS: tuple[Layer, ...] = (
    Conv(filters=6, kernel=3, stride=2, padding=1, batch_norm=True),
    Dropout(p=0.5),
    Conv(filters=4, kernel=2, stride=1, padding=2, activation="leaky"),
    MaxPool(kernel=3, stride=2),
    Flatten(),
    Linear(units=7, activation="relu"),
    Dropout(p=0.25),
    Linear(units=3),
)
SPEC = ModelSpec(layers=LAYERS)
POOLED = ModelSpec(layers=(Conv(filters=5, kernel=1, padding=0, activation="none"), AvgPool(), Linear(units=2)))
RESIDUAL = ModelSpec(
    layers=(
        Conv(filters=4),
        Conv(filters=4, activation="none"),
        Shortcut(source=0, activation="relu"),
        Conv(filters=6, stride=2),
        Route(sources=(2,)),
        Conv(filters=6, kernel=1, padding=0, stride=2),
        Shortcut(source=3),
        Route(sources=(6, 3, 6)),
        AvgPool(),
        Linear(units=3),
    ),
    size=(8, 8),
)
VIT = ModelSpec(layers=(Patches(size=4, width=8), Transformer(heads=2, p=0.2), AvgPool(), Linear(units=3)), size=(8, 8))
DRAWS = Draws(bytes(32), 1, 2)


def images(n: int = 4, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn((n, 3, *(size or SHAPE[1:])), generator=torch.Generator().manual_seed(0))


def model_of(spec: ModelSpec) -> Network:
    model = build(spec, input_shape=SHAPE)
    initialise(model, bytes(32))
    return model.eval()


@pytest.mark.parametrize("spec", [SPEC, POOLED, RESIDUAL, VIT], ids=["chain", "pooled", "residual", "vit"])
def test_every_layer_gives_the_shape_that_was_announced(spec: ModelSpec) -> None:
    shapes, x = layer_shapes(spec, SHAPE), images(size=spec.size)
    assert x.shape[1:] == shapes[0]
    whole = model_of(spec)
    for stop in range(1, len(spec.layers) + 1):
        live, _ = zone_of(whole, spec, range(stop)).through((x,))
        assert [t.shape[1:] for t in live] == [shapes[number + 1] for number in live_at(spec.layers, stop)]
    assert whole(x).shape[1:] == shapes[-1]


def test_a_graph_is_what_it_says() -> None:
    net: dict[str, Any] = dict(model_of(RESIDUAL).named_children())
    x = images(size=(8, 8))
    zero = net["0"](x)
    two = torch.relu(net["1"](zero) + zero)
    three = net["3"](two)
    six = net["5"](two) + three
    seven = torch.cat([six, three, six], 1)
    expected = net["9"](seven.mean((2, 3)))
    assert torch.allclose(model_of(RESIDUAL)(x), expected, atol=1e-6)


@pytest.mark.parametrize("spec", [SPEC, RESIDUAL, VIT], ids=["chain", "residual", "vit"])
def test_any_two_cuts_compose_to_the_whole(spec: ModelSpec) -> None:
    whole, x, total = model_of(spec), images(size=spec.size), len(spec.layers)
    expected = whole(x)
    for first in range(total):
        for second in range(first, total):
            live: tuple[Tensor, ...] = (x,)
            for part in (range(first), range(first, second), range(second, total)):
                live, _ = zone_of(whole, spec, part).through(live)
            assert torch.equal(live[0], expected), (first, second)


def test_what_no_layer_reads_any_more_is_let_go() -> None:
    """Else memory would hold every activation of an inference."""

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module, number: int) -> None:
            super().__init__()
            self.inner, self.number = inner, number

        def forward(self, *inputs: Tensor) -> Tensor:
            alive.append({number for number, ref in outputs.items() if ref() is not None})
            out = self.inner(*inputs)
            outputs[self.number] = weakref.ref(out)
            return out  # type: ignore[no-any-return]

    outputs: dict[int, weakref.ref[Tensor]] = {}
    alive: list[set[int]] = []
    spec = ModelSpec(layers=tuple(layer for layer in RESIDUAL.layers[:4]))
    inner = model_of(RESIDUAL)
    watched = OrderedDict((name, Watched(child, int(name))) for name, child in list(inner.named_children())[:4])
    with torch.inference_mode():
        Network(watched, spec.layers, range(4)).through((images(size=(8, 8)),))  # type: ignore[arg-type]
    assert alive == [set(), {0}, {0, 1}, {2}]


def test_a_wrong_number_of_tensors_is_no_cut() -> None:
    part = zone_of(model_of(RESIDUAL), RESIDUAL, range(2, 10))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        part.through((images(size=(8, 8)),))


def test_a_stage_needs_its_wheel_and_then_is_what_the_wheel_makes() -> None:
    spec = ModelSpec(layers=(Stage(name="half", shape=(3, 4, 4), weights=0), Flatten(), Linear(units=3)))
    with refused(ConfigError, "model.no-wheel"):
        build(spec, input_shape=(3, 8, 8))
    assert len(build(spec, input_shape=(3, 8, 8), layers=range(1, 3))) == 2

    def factory(stage: Stage) -> nn.Module:
        assert stage.name == "half"
        return nn.AvgPool2d(2)

    model = build(spec, input_shape=(3, 8, 8), factory=factory)
    x = images(size=(8, 8))
    linear: Any = model[2]
    assert torch.allclose(model(x), linear(F.avg_pool2d(x, 2).flatten(1)))


def test_a_layer_is_what_the_spec_says() -> None:
    children: dict[str, Any] = dict(build(SPEC, input_shape=SHAPE).named_children())
    conv = children["0"].conv
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding) == (
        *(3, 6, (3, 3)),
        *((2, 2), (1, 1)),
    )
    assert isinstance(children["0"].norm, nn.BatchNorm2d)
    assert not hasattr(children["2"], "norm")
    assert isinstance(children["0"].act, nn.ReLU)
    assert children["2"].act(torch.tensor(-1.0)).item() == pytest.approx(-0.1)
    assert isinstance(children["7"].act, nn.Identity)
    assert (children["3"].kernel, children["3"].stride) == (3, 2)
    assert children["0"].conv.bias is None
    assert children["2"].conv.bias is not None
    assert (children["1"].p, children["1"].layer, children["6"].p, children["6"].layer) == (0.5, 1, 0.25, 6)


@pytest.mark.parametrize(("front", "head"), [(0, 0), (1, 0), (3, 2), (2, 5), (7, 0)])
def test_the_zones_have_the_names_and_shapes_of_the_whole(front: int, head: int) -> None:
    whole = build(SPEC, input_shape=SHAPE)
    ranges = zone_ranges(SPEC, Partition(front=front, head=head))
    assert [len(r) for r in ranges] == [front, len(LAYERS) - front - head, head]
    assert [i for r in ranges for i in r] == list(range(len(LAYERS)))
    state: dict[str, Tensor] = {}
    for layers in ranges:
        state |= build(SPEC, input_shape=SHAPE, layers=layers).state_dict()
    expected = whole.state_dict()
    assert list(state) == list(expected)
    assert all(state[name].shape == value.shape for name, value in expected.items())


def test_a_zone_of_a_whole_shares_its_parameters_and_its_modules_names() -> None:
    whole = build(SPEC, input_shape=SHAPE)
    zone = zone_of(whole, SPEC, range(2, 6))
    assert list(dict(zone.named_children())) == ["2", "3", "4", "5"]
    for name, parameter in zone.named_parameters():
        assert parameter is dict(whole.named_parameters())[name]


@pytest.mark.parametrize("channels_last", [True, False])
def test_parameters_of_images_get_the_runs_layout_and_keep_their_values(channels_last: bool) -> None:
    model = model_of(SPEC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lay_out(model, channels_last=not channels_last)
    lay_out(model, channels_last=channels_last)
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert len(weights) == 2
    for weight in weights:
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert weight.is_contiguous() != channels_last
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), dict(model.named_parameters()).values(), strict=True)
    )


def test_every_dropout_of_a_module_gets_the_draws() -> None:
    model = build(SPEC, input_shape=SHAPE)
    set_draws(model, DRAWS)
    found = [module.draws for module in model.modules() if isinstance(module, KeyedDropout)]
    assert found == [DRAWS, DRAWS]
    tokens = build(VIT, input_shape=SHAPE)
    set_draws(tokens, DRAWS)
    assert [module.draws for module in tokens.modules() if isinstance(module, KeyedDropout)] == [DRAWS, DRAWS]


# --- fingerprints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, POOLED, RESIDUAL, VIT], ids=["chain", "pooled", "residual", "vit"])
def test_a_fingerprint_is_the_last_layers_input_at_unit_length(spec: ModelSpec) -> None:
    model = model_of(spec)
    x = images(size=spec.size)
    features, logits = features_and_logits(model, spec, x)
    assert torch.equal(logits, model(x))
    assert torch.allclose(features.norm(dim=1), torch.ones(len(x)), atol=1e-6)
    (inner,), _ = zone_of(model, spec, range(len(spec.layers) - 1)).through((x,))
    assert torch.allclose(features * inner.norm(dim=1, keepdim=True), inner, atol=1e-5)
    own, same_logits = last_features(model, spec, x)
    assert torch.equal(own, inner)
    assert torch.equal(same_logits, logits)


def test_where_a_convolution_comes_last_a_fingerprint_is_the_mean_over_its_places() -> None:
    spec = ModelSpec(layers=(Conv(filters=5), Conv(filters=3, activation="none"), AvgPool()))
    model = model_of(spec)
    features, _ = features_and_logits(model, spec, images())
    assert features.shape == (4, 5)
    expected = F.normalize(model[0](images()).mean((2, 3)), dim=1)
    assert torch.allclose(features, expected, atol=1e-6)
