"""Networks that go back from what crosses a cut to the picture: ours, and two that were published.

A `Design` says how such a network is built and what it is trained to do. All of them take planes (N, C, h, w) of any
size and give pictures (N, C', H, W): the *ladder* of sizes between the two doubles from rung to rung, and what is too
large by a row or a column is cropped. Vectors (planes of 1x1, or one wide) have no places to keep: a linear layer gives
them some first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.exposure.measures import ssim
from caltrain.models.layers import Shape

Size = tuple[int, int]
Build = Callable[[Shape, Shape, int, int], nn.Module]
_LEAST = (4, 4)  # the first rung for vectors
_WIDEST = 4  # times the width at the picture's size


@dataclass(frozen=True)
class Design:
    """`build(planes, picture, width, depth)` makes the network; `loss` compares its pictures with the true ones.

    `rate` is the highest learning rate of its training.
    """

    build: Build
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float


def ladder(small: Size, large: Size) -> list[Size]:
    """Sizes up to `large`, ascending; each is the half of the next, rounded up, and none is less than `small`."""
    rungs = [large]
    while rungs[0] != (half := (-(-rungs[0][0] // 2), -(-rungs[0][1] // 2))):
        if half[0] < small[0] or half[1] < small[1]:
            break
        rungs.insert(0, half)
    return rungs


class Fit(nn.Module):
    """Planes of exactly `size`: cropped if pixels were doubled once too often, else scaled."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C, H, W)
        height, width = self.size
        if 0 <= x.shape[2] - height <= 1 and 0 <= x.shape[3] - width <= 1:
            return x[:, :, :height, :width]
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


class Residual(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), nn.GELU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C, h, w)
        return F.gelu(x + self.body(x))


def residual(planes: Shape, picture: Shape, width: int, depth: int) -> nn.Module:
    """Ours: `depth` residual blocks at every size, twice as wide at half the size; channels become pixels between."""
    rungs, widths = _rungs(planes, picture, width)
    layers = [*_enter(planes, widths[0], rungs[0]), nn.BatchNorm2d(widths[0]), nn.GELU()]
    layers += [Residual(widths[0]) for _ in range(depth)]
    for (wide, narrow), rung in zip(itertools.pairwise(widths), rungs[1:], strict=True):
        layers += [_conv(wide, 4 * narrow, kernel=1), nn.PixelShuffle(2), Fit(rung), nn.GELU()]
        layers += [Residual(narrow) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], picture[0], 3, padding=1), nn.Sigmoid())


def up_convolutional(planes: Shape, picture: Shape, width: int, _depth: int) -> nn.Module:
    """As arXiv:1506.02753 (Dosovitskiy and Brox): three convolutions, then 5x5 up-convolutions, leaky ReLU of 0.2."""
    rungs, widths = _rungs(planes, picture, width)
    layers = [*_enter(planes, widths[0], rungs[0]), nn.LeakyReLU(0.2)]
    for _ in range(2):
        layers += [nn.Conv2d(widths[0], widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
    for (wide, narrow), rung in zip(itertools.pairwise(widths), rungs[1:], strict=True):
        up = nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1)
        layers += [up, Fit(rung), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], picture[0], 3, padding=1))


def transposed(planes: Shape, picture: Shape, width: int, _depth: int) -> nn.Module:
    """As He et al. (ACSAC 2019, doi:10.1145/3359789.3359824): a transposed convolution for every pooling, and one."""
    rungs, widths = _rungs(planes, picture, width)
    spatial = _has_places(planes)
    layers = [] if spatial else [*_enter(planes, widths[0], rungs[0]), nn.ReLU()]
    channels = planes[0] if spatial else widths[0]
    for narrow, rung in zip(widths[1:], rungs[1:], strict=True):
        up = nn.ConvTranspose2d(channels, narrow, 3, stride=2, padding=1, output_padding=1)
        layers += [up, Fit(rung), nn.ReLU()]
        channels = narrow
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, picture[0], 3, padding=1), Fit(rungs[-1]))


def draw(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """First weights (arXiv:1502.01852), from a generator of one's own; every convolution's and layer's bias is 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fan_in = math.prod(module.weight.shape[1:])
            if isinstance(module, nn.ConvTranspose2d):  # of the input's places, only every stride-th meets a pixel
                fan_in = module.in_channels * math.prod(module.kernel_size) // math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def similar(found: Tensor, true: Tensor) -> Tensor:
    """What is measured is what is learnt: structure (1 - SSIM) and squared error."""
    return (1 - ssim(found, true)).mean() + 10 * F.mse_loss(found, true)


def _rungs(planes: Shape, picture: Shape, width: int) -> tuple[list[Size], list[int]]:
    """Sizes from the first to the picture's, and how many channels the network has at each."""
    large = (picture[1], picture[2])
    rungs = ladder((planes[1], planes[2]) if _has_places(planes) else _LEAST, large)
    return rungs, [width * min(_WIDEST, 2**above) for above in reversed(range(len(rungs)))]


def _has_places(planes: Shape) -> bool:
    return min(planes[1:]) > 1


def _enter(planes: Shape, width: int, rung: Size) -> list[nn.Module]:
    """From what crosses to `width` planes of the first size."""
    if _has_places(planes):
        return [nn.Conv2d(planes[0], width, 1), Fit(rung)]
    out = (width, *rung)
    return [nn.Flatten(), nn.Linear(math.prod(planes), math.prod(out)), nn.Unflatten(1, out)]


def _conv(wide: int, narrow: int, *, kernel: int = 3) -> nn.Module:
    """A convolution with batch normalisation, which makes a bias needless."""
    return nn.Sequential(nn.Conv2d(wide, narrow, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(narrow))


OURS = Design(residual, similar, rate=3e-3)
DOSOVITSKIY_BROX = Design(up_convolutional, F.mse_loss, rate=1e-3)
HE_ET_AL = Design(transposed, F.mse_loss, rate=1e-3)
