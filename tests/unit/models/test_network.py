"""Modules from a spec: the shapes that were announced, the whole model's names in every zone, keyed dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caltrain.models.network import (
    KeyedDropout,
    build,
    features_and_logits,
    lay_out,
    set_draws,
    zone_of,
    zone_ranges,
)
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
    layer_shapes,
)
from caltrain.training.seeds import Draws, initialise

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
DRAWS = Draws(bytes(32), 1, 2)


def images(n: int = 4) -> Tensor:
    return torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(0))


def model_of(spec: ModelSpec) -> nn.Sequential:
    model = build(spec, input_shape=SHAPE)
    initialise(model, bytes(32))
    return model.eval()


@pytest.mark.parametrize("spec", [SPEC, POOLED])
def test_every_layer_gives_the_shape_that_was_announced(spec: ModelSpec) -> None:
    shapes = layer_shapes(spec, SHAPE)
    x = images()
    for index, block in enumerate(model_of(spec).children()):
        assert x.shape[1:] == shapes[index]
        x = block(x)
    assert x.shape[1:] == shapes[-1]


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
    assert (children["3"].kernel_size, children["3"].stride) == (3, 2)
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
    zone = zone_of(whole, range(2, 6))
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


# --- dropout ---------------------------------------------------------------------------------------------------


def dropped(draws: Draws | None, *, layer: int = 3, p: float = 0.3, training: bool = True) -> Tensor:
    module = KeyedDropout(p, layer).train(training)
    module.draws = draws
    return module(torch.full((100, 50), 2.0))  # type: ignore[no-any-return]


def test_dropout_drops_its_share_and_scales_up_the_rest() -> None:
    out = dropped(DRAWS)
    kept = out != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.03)
    assert torch.equal(out[kept], torch.full_like(out[kept], 2.0) / 0.7)


def test_a_mask_is_that_of_its_seed_epoch_step_and_layer() -> None:
    masks = [
        dropped(DRAWS),
        dropped(Draws(b"\1" * 32, 1, 2)),
        dropped(Draws(bytes(32), 0, 2)),
        dropped(Draws(bytes(32), 1, 3)),
        dropped(DRAWS, layer=4),
    ]
    assert torch.equal(dropped(DRAWS), masks[0])
    for other in masks[1:]:
        assert not torch.equal(other, masks[0])


def test_dropout_lets_all_through_outside_training_and_before_it_has_a_key() -> None:
    everything = torch.full((100, 50), 2.0)
    assert torch.equal(dropped(DRAWS, training=False), everything)
    assert torch.equal(dropped(None), everything)
    assert torch.equal(dropped(DRAWS, p=0.0), everything)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_mask_is_the_same_in_either_layout_and_keeps_it(layout: torch.memory_format) -> None:
    module = KeyedDropout(0.5, 0)
    module.draws = DRAWS
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=layout)
    out = module(x)
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(out, module(torch.ones(2, 3, 4, 5)))


def test_every_dropout_of_a_module_gets_the_draws() -> None:
    model = build(SPEC, input_shape=SHAPE)
    set_draws(model, DRAWS)
    found = [module.draws for module in model.modules() if isinstance(module, KeyedDropout)]
    assert found == [DRAWS, DRAWS]


# --- fingerprints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, POOLED])
def test_a_fingerprint_is_the_last_layers_input_at_unit_length(spec: ModelSpec) -> None:
    model = model_of(spec)
    x = images()
    features, logits = features_and_logits(model, x)
    assert torch.equal(logits, model(x))
    assert torch.allclose(features.norm(dim=1), torch.ones(len(x)), atol=1e-6)
    inner = x
    for block in list(model.children())[:-1]:
        inner = block(inner)
    assert torch.allclose(features * inner.norm(dim=1, keepdim=True), inner, atol=1e-5)
