"""Distances of pictures that look at more than single pixels. *Pictures* (N, C, H, W) lie in 0..1."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.exposure.subject import Live, Subject, stacked
from caltrain.models.layers import Shape
from caltrain.models.network import zone_of
from caltrain.models.spec import layer_shapes

Distance = Callable[[Tensor, Tensor], Tensor]
"""From pictures and pictures to (N,), 0 for the same."""

_LAYERS = 5
_BATCH = 128
_SCALES = 3
_EDGE = 0.0026  # of the GMSD paper (170), for gradients of 0..1 instead of 0..255


class Perceptual:
    """Distance (N,), 0..4, in the features of a trained network: LPIPS (arXiv:1801.03924) without learned weights.

    At up to five layers that have places, evenly spread: features of unit length at each place, the square of their
    difference, averaged over places and layers. LPIPS weighs channels by how people judged pictures; there are no such
    weights here, so figures compare with each other but not with those of papers. Pictures are resized to the network's
    size, and through grey to its channels. Raises ConfigError `exposure.no-places` for a network without such layers.
    """

    def __init__(self, network: Subject) -> None:
        spatial = _spatial(network)
        if not spatial:
            raise ConfigError(
                "exposure.no-places",
                "no layer of the network keeps the places of a picture, so pictures cannot be compared by it",
                step="compare pictures",
                fix="Compare by a network with convolutions or tokens, or by edges (`edge_distance`).",
            )
        chosen = np.linspace(0, len(spatial) - 1, min(_LAYERS, len(spatial))).round().astype(int)
        self.network, self.fronts = network, [spatial[i] for i in chosen]
        parts = zip([0, *self.fronts[:-1]], self.fronts, strict=True)
        self._zones = [zone_of(network.module, network.spec, range(*part)) for part in parts]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(torch.split(a, _BATCH), torch.split(b, _BATCH), strict=True)
        return torch.cat([self._of_batch(*pair) for pair in pairs])

    def _of_batch(self, a: Tensor, b: Tensor) -> Tensor:
        live: Live = (self.network.inputs(_fit(torch.cat([a, b]), self.network.shape)),)
        total = torch.zeros(len(a))
        for zone in self._zones:
            live = zone.through(live)[0]
            one, other = F.normalize(stacked(live[-1:]), dim=1).chunk(2)
            total += (one - other).square().sum(1).flatten(1).mean(1)
        return total / len(self._zones)


def _spatial(network: Subject) -> list[int]:
    """FrontNets whose last layer has places."""
    shapes = layer_shapes(network.spec, network.data.shape)[1:]
    return [front for front, shape in enumerate(shapes, 1) if _places(shape) > 1]


def _places(shape: Shape) -> int:
    """Of a layer's output: pixels of (C, H, W), tokens of (T, D), one of a vector."""
    return math.prod(shape[1:]) if len(shape) == 3 else shape[0] if len(shape) == 2 else 1


def _fit(pictures: Tensor, shape: Shape) -> Tensor:
    if pictures.shape[1] != shape[0]:
        pictures = pictures.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if tuple(pictures.shape[2:]) != shape[1:]:
        pictures = F.interpolate(pictures, size=shape[1:], mode="bilinear", antialias=True)
    return pictures


def edge_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance (N,), 0..1, of the edges of grey pictures at up to three scales. Needs no network.

    One minus the mean similarity of gradient magnitudes (after arXiv:1308.3052). It is not a perceptual distance.
    """
    x, y = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    scales: list[Tensor] = []
    while True:
        g, h = _gradient(x), _gradient(y)
        scales.append(1 - ((2 * g * h + _EDGE) / (g.square() + h.square() + _EDGE)).flatten(1).mean(1))
        if len(scales) == _SCALES or min(x.shape[2:]) < 2:
            return torch.stack(scales).mean(0)
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)


def _gradient(x: Tensor) -> Tensor:
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    across, down = x[:, :, :-1, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, :-1]
    return (across.square() + down.square()).sqrt()


def distance_by(network: Subject) -> Distance:
    """In the features of `network`; by edges where none of its layers keeps places."""
    return Perceptual(network) if _spatial(network) else edge_distance
