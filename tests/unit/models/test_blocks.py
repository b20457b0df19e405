"""Blocks against straightforward torch code, and dropout from a key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models import layers as m
from caltrain.models.blocks import KeyedDropout, block, key_dropouts, mean_over_places
from caltrain.models.layers import Layer, Shape
from caltrain.training.seeds import Draws, initialise

DRAWS = Draws(bytes(32), 1, 2)
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made(layer: Layer, shape: Shape) -> Any:
    """The block of layer 3, with weights, in the mode of inference."""
    module = block(3, layer, shape)
    initialise(nn.ModuleDict({"3": module}), bytes(32))
    return module.eval()


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


def test_a_mask_is_that_of_its_place_in_the_layer() -> None:
    masks = []
    for place in (0, 1, 2):
        module = KeyedDropout(0.5, 3, place)
        module.draws = DRAWS
        masks.append(module(torch.ones(100)))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_dropout_lets_all_through_outside_training_and_before_it_has_a_key() -> None:
    everything = torch.full((100, 50), 2.0)
    assert torch.equal(dropped(DRAWS, training=False), everything)
    assert torch.equal(dropped(None), everything)
    assert torch.equal(dropped(DRAWS, p=0.0), everything)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_keeps_the_layout_and_is_the_same_for_the_same_layout(layout: torch.memory_format) -> None:
    module = KeyedDropout(0.5, 0)
    module.draws = DRAWS
    x = random(4, 3, 5, 6).contiguous(memory_format=layout)
    out = module(x)
    assert out.stride() == x.stride()
    assert torch.equal(out, module(x.clone(memory_format=torch.preserve_format)))
    kept = out != 0
    assert torch.equal(out[kept], x[kept] * 2)
    assert 0.4 < float(kept.float().mean()) < 0.6


def test_a_mask_is_drawn_in_the_order_of_memory() -> None:
    module = KeyedDropout(0.5, 0)
    module.draws = DRAWS
    uniform = torch.rand(4 * 5 * 6 * 3, generator=DRAWS.generator("dropout/0", 0))
    ones = torch.ones(4, 3, 5, 6)
    in_rows = module(ones)
    in_places = module(ones.contiguous(memory_format=torch.channels_last))
    assert torch.equal(in_rows.flatten() != 0, uniform >= 0.5)
    assert torch.equal(in_places.permute(0, 2, 3, 1).flatten() != 0, uniform >= 0.5)


def test_dropout_of_nothing_draws_nothing() -> None:
    module = KeyedDropout(0.0, 0)
    module.draws = DRAWS
    x = random(2, 3)
    assert module(x) is x


def test_the_gradient_goes_where_the_value_went() -> None:
    module = KeyedDropout(0.5, 0)
    module.draws = DRAWS
    x = torch.ones(50, 4, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out)


class Twice(nn.Module):
    """One dropout under two names, and one deeper down."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Dropout(0.5)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))  # type: ignore[no-any-return]


def test_torchs_dropouts_in_a_users_module_are_keyed_each_with_its_place() -> None:
    module = key_dropouts(Twice(), 7)
    assert not any(isinstance(child, nn.Dropout) for child in module.modules())
    keyed = [child for child in module.modules() if isinstance(child, KeyedDropout)]
    assert [(k.p, k.layer) for k in keyed] == [(0.5, 7), (0.5, 7), (0.25, 7)]
    assert len({k.place for k in keyed}) == 3
    assert all(k.place > 0 for k in keyed)


def test_a_stage_that_is_a_dropout_is_keyed() -> None:
    module = block(2, m.Stage(name="x", shape=(4,), weights=0), (4,), lambda _stage: nn.Dropout(0.5))
    assert isinstance(module, KeyedDropout)
    assert (module.p, module.layer) == (0.5, 2)


# --- pooling ---------------------------------------------------------------------------------------------------


def darknet_maxpool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """`forward_maxpool_layer`, loop for loop."""
    n, c, h, w = x.shape
    out = torch.empty(n, c, (h + padding - size) // stride + 1, (w + padding - size) // stride + 1)
    offset = -(padding // 2)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            rows = range(max(0, offset + i * stride), min(h, offset + i * stride + size))
            columns = range(max(0, offset + j * stride), min(w, offset + j * stride + size))
            out[:, :, i, j] = x[:, :, rows.start : rows.stop, columns.start : columns.stop].amax((2, 3))
    return out


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(2, 2, 0), (2, 2, 1), (3, 2, 2), (3, 1, 2), (5, 2, 3), (2, 1, 1)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pooling_is_padded_as_darknet_has_it(
    size: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    layer, x = m.MaxPool(kernel=size, stride=stride, padding=padding), random(2, 3, 7, 8) - 5
    got = made(layer, (3, 7, 8))(x.contiguous(memory_format=layout))
    assert torch.equal(got, darknet_maxpool(x, size, stride, padding))
    assert got.shape[1:] == m.shape_of(0, layer, [(3, 7, 8)])
    assert got.is_contiguous(memory_format=layout)


def test_a_mean_is_over_places_or_tokens() -> None:
    assert torch.allclose(mean_over_places(random(2, 3, 4, 5)), random(2, 3, 4, 5).mean((2, 3)))
    assert torch.equal(mean_over_places(random(2, 3, 4)), random(2, 3, 4).mean(1))
    assert mean_over_places(x := random(2, 3)) is x
    assert made(m.AvgPool(), (3, 4, 5))(random(2, 3, 4, 5)).shape == (2, 3)


# --- convolutions and joins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky", "none"])
def test_a_convolution_is_normalised_and_activated(batch_norm: bool, activation: m.Activation) -> None:
    module = made(m.Conv(filters=4, stride=2, batch_norm=batch_norm, activation=activation), (3, 6, 6)).train()
    x = random(5, 3, 6, 6)
    conv = F.conv2d(x, module.conv.weight, module.conv.bias, stride=2, padding=1)
    if batch_norm:
        conv = (conv - conv.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
            conv.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        )
    slope = {"relu": 0.0, "leaky": 0.1, "none": 1.0}[activation]
    assert torch.allclose(module(x), torch.where(conv > 0, conv, slope * conv), atol=1e-5)
    assert (module.conv.bias is None) == batch_norm


def test_a_residual_block_is_the_ordinary_one_and_so_are_its_gradients() -> None:
    conv = made(m.Conv(filters=3, batch_norm=True, activation="none"), (3, 6, 6)).train()
    join = made(m.Shortcut(source=0, activation="relu"), (3, 6, 6))
    ours, theirs = random(4, 3, 6, 6).requires_grad_(), random(4, 3, 6, 6).requires_grad_()
    got = join(conv(ours), ours)
    want = F.relu(conv(theirs) + theirs)
    assert torch.equal(got, want)
    weights = random(*got.shape)
    (mine,) = torch.autograd.grad((got * weights).sum(), ours)
    (expected,) = torch.autograd.grad((want * weights).sum(), theirs)
    assert torch.allclose(mine, expected, atol=1e-6)


def test_a_join_changes_neither_of_its_inputs() -> None:
    one, other = -torch.ones(2, 3), -torch.ones(2, 3)
    assert torch.equal(made(m.Shortcut(source=0, activation="relu"), (3,))(one, other), torch.zeros(2, 3))
    assert torch.equal(one, -torch.ones(2, 3))
    assert torch.equal(other, -torch.ones(2, 3))


def test_a_route_joins_along_channels_in_order() -> None:
    one, other = random(2, 3, 4, 4), random(2, 2, 4, 4) + 9
    route = made(m.Route(sources=(0, 1)), (3, 4, 4))
    assert torch.equal(route(one, other), torch.cat((one, other), 1))
    assert route(one) is one


# --- tokens ----------------------------------------------------------------------------------------------------


def test_patches_are_squares_in_rows_each_with_its_position() -> None:
    module, x = made(m.Patches(size=2, width=5), (3, 4, 6)), random(2, 3, 4, 6)
    got = module(x)
    assert got.shape == (2, 6, 5)
    weight, bias = module.conv.weight.reshape(5, -1), module.conv.bias
    for number in range(6):
        row, column = divmod(number, 3)
        square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, -1)
        assert torch.allclose(got[:, number], square @ weight.T + bias + module.position[number], atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_dense_whatever_the_image_was(layout: torch.memory_format) -> None:
    module = made(m.Patches(size=2, width=5), (3, 4, 6))
    assert module(random(2, 3, 4, 6).contiguous(memory_format=layout)).is_contiguous()


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_transformer_is_pre_norm_attention_and_a_perceptron(heads: int) -> None:
    module, x = made(m.Transformer(heads=heads, ratio=2), (5, 8)), random(3, 5, 8)
    attention = nn.MultiheadAttention(8, heads, batch_first=True)
    state = {
        "in_proj_weight": module.qkv.weight,
        "in_proj_bias": module.qkv.bias,
        "out_proj.weight": module.out.weight,
        "out_proj.bias": module.out.bias,
    }
    attention.load_state_dict(state)
    normed = F.layer_norm(x, (8,))
    mixed, _ = attention(normed, normed, normed)
    middle = x + mixed
    hidden = F.layer_norm(middle, (8,)) @ module.up.weight.T + module.up.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    want = middle + gelu @ module.down.weight.T + module.down.bias
    assert torch.allclose(module(x), want, atol=1e-5)


def test_the_two_dropouts_of_a_transformer_have_places_of_their_own() -> None:
    module = made(m.Transformer(heads=1, p=0.3), (5, 8))
    assert [(d.p, d.layer, d.place) for d in (module.drop1, module.drop2)] == [(0.3, 3, 1), (0.3, 3, 2)]


def test_a_norm_is_over_the_width_of_each_token() -> None:
    x = random(2, 5, 8) * 3 + 1
    got = made(m.Norm(), (5, 8))(x)
    want = (x - x.mean(2, keepdim=True)) / torch.sqrt(x.var(2, correction=0, keepdim=True) + 1e-5)
    assert torch.allclose(got, want, atol=1e-5)


def test_flatten_and_linear() -> None:
    x = random(2, 3, 4, 5)
    assert torch.equal(made(m.Flatten(), (3, 4, 5))(x), x.reshape(2, 60))
    linear = made(m.Linear(units=4, activation="relu"), (60,))
    want = torch.relu(x.reshape(2, 60) @ linear.linear.weight.T + linear.linear.bias)
    assert torch.allclose(linear(x.reshape(2, 60)), want, atol=1e-6)
