"""Torch modules from a model spec, whole or as one zone of it.

Every zone's children carry the layer's number in the whole model, so the state of front, center and head together has
exactly the names of the unsplit module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models.blocks import KeyedDropout, block, mean_over_places
from caltrain.models.layers import Layer, Shape, sources_of
from caltrain.models.spec import ModelSpec, embedding_layer, layer_shapes, live_at
from caltrain.models.wheel import Factory, no_wheel
from caltrain.training.seeds import Draws


class Network(nn.Sequential):
    """Consecutive layers of a model. Alone (all layers), it maps (N, ...) to logits (N, classes)."""

    def __init__(self, modules: OrderedDict[str, nn.Module], layers: Sequence[Layer], part: range) -> None:
        super().__init__(modules)
        self.part = part
        self.wiring = {i: sources_of(i, layers[i]) for i in part}
        self.takes, self.gives = live_at(layers, part.start), live_at(layers, part.stop)
        self._last_use = {source: i for i in part for source in self.wiring[i]}

    def through(self, live: Sequence[Tensor], *, keep: int | None = None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What crosses at the end from what crossed at the start; also the first input of layer `keep`."""
        held, kept = dict(zip(self.takes, live, strict=True)), None
        for number, module in zip(self.part, self.children(), strict=True):
            inputs = [held[source] for source in self.wiring[number]]
            kept = inputs[0] if number == keep else kept
            held[number] = module(*inputs)
            for source in self.wiring[number]:  # what nothing reads any more is let go
                if self._last_use[source] == number and source not in self.gives:
                    held.pop(source, None)
        return tuple(held[number] for number in self.gives), kept

    def forward(self, x: Tensor) -> Tensor:
        """One tensor in, one out."""
        (out,), _ = self.through((x,))
        return out


def set_draws(module: nn.Module, draws: Draws) -> None:
    """Give every dropout of `module` the key of the coming step."""
    for child in module.modules():
        if isinstance(child, KeyedDropout):
            child.draws = draws


def build(spec: ModelSpec, *, input_shape: Shape, layers: range | None = None, factory: Factory = no_wheel) -> Network:
    """The module of `layers` (default: all), not yet initialised from a seed; see `training.seeds`.

    `input_shape` is that of a record. Raises ConfigError `model.no-wheel`.
    """
    shapes = layer_shapes(spec, input_shape)
    part = range(len(spec.layers)) if layers is None else layers
    modules = OrderedDict[str, nn.Module]()
    for i in part:
        shape = shapes[sources_of(i, spec.layers[i])[0] + 1]
        modules[str(i)] = block(i, spec.layers[i], shape, factory)
    return Network(modules, spec.layers, part)


def zone_of(model: Network, spec: ModelSpec, part: range) -> Network:
    """The part of a model that holds `part`, sharing its parameters."""
    chosen = [(name, child) for name, child in model.named_children() if int(name) in part]
    return Network(OrderedDict(chosen), spec.layers, part)


def lay_out(module: nn.Module, *, channels_last: bool) -> None:
    """Store every 4-d parameter in the run's memory layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def features_and_logits(model: Network, spec: ModelSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate embedding, L2-normalised (N, D), and logits (N, classes): one pass in the model's mode.

    The embedding is that of `last_features` (CALTRAIN's fingerprint F).
    """
    features, logits = last_features(model, spec, x)
    return F.normalize(features, dim=1), logits


def last_features(model: Network, spec: ModelSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input of the last layer with weights, averaged over places (N, D), and logits (N, classes)."""
    (logits,), features = model.through((x,), keep=embedding_layer(spec))
    return mean_over_places(cast(Tensor, features)).flatten(1), logits
