"""Torch modules from a model spec, whole or as one zone of it.

Every zone is a `Sequential` whose children carry the layer's index in the whole model, so the state of front,
center and head together has exactly the names of the unsplit module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from caltrain.models.spec import (
    Activation,
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
    layer_shapes,
)
from caltrain.training.seeds import Draws

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "none": nn.Identity}


class KeyedDropout(nn.Module):
    """Dropout with a mask drawn from (seed, epoch, step, layer): the same in whichever process it runs."""

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.draws: Draws | None = None

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        if not self.training or self.draws is None:
            return x
        keep = torch.rand(x.shape, generator=self.draws.generator("dropout", self.layer)) >= self.p
        return x * keep / (1 - self.p)


def set_draws(module: nn.Module, draws: Draws) -> None:
    """Give every dropout of `module` the key of the coming step."""
    for child in module.modules():
        if isinstance(child, KeyedDropout):
            child.draws = draws


def _activation(name: Activation) -> nn.Module:
    return nn.LeakyReLU(0.1) if name == "leaky" else _ACTIVATIONS[name]()


def _block(index: int, layer: Layer, shape: Shape) -> nn.Module:
    match layer:
        case Conv():
            parts: list[tuple[str, nn.Module]] = [
                ("conv", nn.Conv2d(shape[0], layer.filters, layer.kernel, layer.stride, layer.padding))
            ]
            if layer.batch_norm:
                parts.append(("norm", nn.BatchNorm2d(layer.filters)))
            return nn.Sequential(OrderedDict([*parts, ("act", _activation(layer.activation))]))
        case Linear():
            linear = nn.Linear(shape[0], layer.units)
            return nn.Sequential(OrderedDict([("linear", linear), ("act", _activation(layer.activation))]))
        case MaxPool():
            return nn.MaxPool2d(layer.kernel, layer.stride)
        case AvgPool():
            return nn.Sequential(OrderedDict([("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]))
        case Dropout():
            return KeyedDropout(layer.p, index)
        case Flatten():
            return nn.Flatten()


def build(spec: ModelSpec, *, input_shape: Shape, layers: range | None = None) -> nn.Sequential:
    """The module of `layers` (default: all), not yet initialised from a seed; see `training.seeds`."""
    shapes = layer_shapes(spec, input_shape)
    chosen = range(len(spec.layers)) if layers is None else layers
    return nn.Sequential(OrderedDict((str(i), _block(i, spec.layers[i], shapes[i])) for i in chosen))


def zone_ranges(spec: ModelSpec, partition: Partition) -> tuple[range, range, range]:
    """Layer indices of FrontNet, CenterNet and HeadNet."""
    total = len(spec.layers)
    return (
        range(partition.front),
        range(partition.front, total - partition.head),
        range(total - partition.head, total),
    )


def zone_of(model: nn.Sequential, layers: range) -> nn.Sequential:
    """The part of a whole model that holds `layers`, sharing its parameters."""
    return nn.Sequential(OrderedDict(list(model.named_children())[layers.start : layers.stop]))


def lay_out(module: nn.Module, *, channels_last: bool) -> None:
    """Store every 4-d parameter in the run's memory layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def features_and_logits(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate embedding, L2-normalised (N, D), and logits (N, classes): one pass in the model's mode.

    The embedding is the input of the last linear layer (CALTRAIN's fingerprint F).
    """
    blocks: Sequence[nn.Module] = list(model.children())
    for block in blocks[:-1]:
        x = block(x)
    return nn.functional.normalize(x, dim=1), blocks[-1](x)
