"""Feature maps as grey pictures, as the papers show them to a validator (arXiv:1807.00969, IR projection)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.exposure.subject import Live, stacked

Size = tuple[int, int]


def maps_of(live: Live, size: Size, wanted: Tensor | None = None) -> Tensor:
    """Maps of an IR as grey pictures (N, maps, *size) in 0..1: all, or those with the numbers `wanted` (k,), ascending.

    A map is a channel, or a dimension of tokens over their places; maps are numbered through the tensors in order. A
    tensor without places, (N, D) or (N, D, 1, 1), is one map: its values row by row in a square, since each alone
    would be a picture of one shade. Each map is scaled from its least and largest value to 0..1, then resized
    (bilinear); one of a single value is black.
    """
    grey, at = [], 0
    for tensor in live:
        planes = _planes(tensor)
        count = planes.shape[1]
        if wanted is not None:
            planes = planes[:, wanted[(wanted >= at) & (wanted < at + count)].sort().values - at]
        if planes.shape[1]:  # none may be wanted of a tensor that crosses beside others
            grey.append(_grey(planes, size))
        at += count
    return torch.cat(grey, dim=1)


def map_count(live: Live) -> int:
    """How many maps `maps_of` gives."""
    return sum(_planes(tensor[:1]).shape[1] for tensor in live)


def _planes(tensor: Tensor) -> Tensor:
    planes = stacked((tensor,))
    if planes.shape[2:] != (1, 1):
        return planes
    vector = planes.flatten(1)
    side = math.ceil(vector.shape[1] ** 0.5)
    rest = vector.amin(1, keepdim=True).expand(-1, side * side - vector.shape[1])
    return torch.cat([vector, rest], dim=1).reshape(-1, 1, side, side)


def _grey(planes: Tensor, size: Size) -> Tensor:
    planes = planes.float()
    low, high = planes.amin((2, 3), keepdim=True), planes.amax((2, 3), keepdim=True)
    span = high - low
    grey = (planes - low) / torch.where(span > 0, span, 1)
    return F.interpolate(grey, size=size, mode="bilinear", align_corners=False).clamp(0, 1)
