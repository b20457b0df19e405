"""The torch module of one layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models import layers as m
from caltrain.models.layers import Layer, Shape
from caltrain.models.wheel import Factory, check_stage, no_wheel
from caltrain.training.seeds import Draws


class KeyedDropout(nn.Module):
    """Dropout with a mask drawn from (seed, epoch, step, layer, place): the same in whichever process it runs."""

    def __init__(self, p: float, layer: int, place: int = 0) -> None:
        super().__init__()
        self.p, self.layer, self.place = p, layer, place
        self.draws: Draws | None = None

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        if not self.training or self.draws is None or self.p == 0:
            return x
        generator = self.draws.generator(f"dropout/{self.place}", self.layer)
        # Drawn in the order of memory: a mask of another layout than `x` would cost more than the draw.
        uniform = torch.empty_strided(x.shape, x.stride()).uniform_(generator=generator)
        return x * (uniform >= self.p).to(x.device, x.dtype).div_(1 - self.p)


class MaxPool(nn.Module):
    """Max pooling that may be padded on one side more than on the other."""

    def __init__(self, layer: m.MaxPool) -> None:
        super().__init__()
        before = layer.padding // 2
        self.margin = (before, layer.padding - before) * 2
        self.kernel, self.stride = layer.kernel, layer.stride

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H', W')
        if any(self.margin):
            x = F.pad(x, self.margin, value=-torch.inf)
        return F.max_pool2d(x, self.kernel, self.stride)


class Average(nn.Module):
    """Mean over the places of an image (N, C, H, W), or over tokens (N, T, D): (N, C) or (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return mean_over_places(x)


class Shortcut(nn.Module):
    """Sum of two outputs, then the activation."""

    def __init__(self, layer: m.Shortcut) -> None:
        super().__init__()
        self.act = activation(layer.activation)

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        return cast(Tensor, self.act(x + earlier))


class Route(nn.Module):
    """Outputs joined along the channels; one alone passes as it is."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


class Patches(nn.Module):
    """An image as tokens, each with its learned position."""

    def __init__(self, layer: m.Patches, shape: Shape) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], layer.width, layer.size, layer.size)
        places = shape[1] * shape[2] // layer.size**2
        self.position = nn.Parameter(torch.zeros(places, layer.width))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        return cast(Tensor, self.conv(x)).flatten(2).transpose(1, 2).contiguous() + self.position


class Transformer(nn.Module):
    """Pre-norm attention, then a perceptron, each added to what came in."""

    def __init__(self, layer: m.Transformer, width: int, index: int) -> None:
        super().__init__()
        self.heads = layer.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, layer.ratio * width), nn.Linear(layer.ratio * width, width)
        self.drop1, self.drop2 = KeyedDropout(layer.p, index, 1), KeyedDropout(layer.p, index, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(n, t, d)
        x = x + self.drop1(self.out(mixed))
        return x + cast(Tensor, self.drop2(self.down(F.gelu(self.up(self.norm2(x))))))


def mean_over_places(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C), (N, T, D) to (N, D); (N, D) as it is."""
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
    return x.mean(1) if x.dim() == 3 else x


def activation(name: m.Activation) -> nn.Module:
    """In place: what it overwrites is read by nothing else."""
    match name:
        case "relu":
            return nn.ReLU(inplace=True)
        case "leaky":
            return nn.LeakyReLU(0.1, inplace=True)
        case "none":
            return nn.Identity()


def block(index: int, layer: Layer, shape: Shape, factory: Factory = no_wheel) -> nn.Module:  # noqa: PLR0911  # one case a type of layer
    """The module of layer `index`, whose first input has `shape`; stages come from `factory`."""
    match layer:
        case m.Conv():
            return _conv(layer, shape)
        case m.Linear():
            linear = nn.Linear(shape[0], layer.units)
            return nn.Sequential(OrderedDict([("linear", linear), ("act", activation(layer.activation))]))
        case m.MaxPool():
            return MaxPool(layer)
        case m.AvgPool():
            return Average()
        case m.Dropout():
            return KeyedDropout(layer.p, index)
        case m.Flatten():
            return nn.Flatten()
        case m.Shortcut():
            return Shortcut(layer)
        case m.Route():
            return Route()
        case m.Patches():
            return Patches(layer, shape)
        case m.Transformer():
            return Transformer(layer, shape[1], index)
        case m.Norm():
            return nn.LayerNorm(shape[1])
        case m.Stage():
            return check_stage(key_dropouts(factory(layer), index), layer, shape)


def _conv(layer: m.Conv, shape: Shape) -> nn.Module:
    conv = nn.Conv2d(shape[0], layer.filters, layer.kernel, layer.stride, layer.padding, bias=not layer.batch_norm)
    parts: list[tuple[str, nn.Module]] = [("conv", conv)]
    if layer.batch_norm:
        parts.append(("norm", nn.BatchNorm2d(layer.filters)))
    return nn.Sequential(OrderedDict([*parts, ("act", activation(layer.activation))]))


def key_dropouts(module: nn.Module, layer: int) -> nn.Module:
    """Replace torch's dropouts, which draw from a running stream, in a module of a user's."""
    if isinstance(module, nn.Dropout):
        return KeyedDropout(module.p, layer)
    # Not `named_children`: it names a dropout that is used under two names only once.
    found = [(parent, name, child) for parent in module.modules() for name, child in parent._modules.items()]
    for place, (parent, name, child) in enumerate(found, start=1):
        if isinstance(child, nn.Dropout):
            setattr(parent, name, KeyedDropout(child.p, layer, place))
    return module
