"""From stored records to the tensor that the first layer sees: augmentation, normalisation, memory layout.

Only operations on single elements are used, so the result is the same on any number of threads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.records.schema import DataSchema
from caltrain.training.seeds import Draws
from caltrain.training.spec import Augment

Size = tuple[int, int]


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of every 4-d tensor of a run."""
    return torch.channels_last if channels_last else torch.contiguous_format


def augment(pixels: Tensor, spec: Augment, draws: Draws, *, size: Size | None = None) -> Tensor:
    """Each record of (N, C, H, W) changed by its own draws, and cropped to `size` (height, width) at random.

    In Darknet's order (`load_data_augment`): scaled, stretched, turned and cropped; mirrored; then its colours. Where
    `min_crop` and `max_crop` are the records' own shorter side (or 0) and there is no angle or aspect, nothing is
    scaled: the crop is at whole pixels, and no pixel is mixed with another. (Darknet mixes even then.)

    u8 stays u8 where pixels only move; where they are mixed or their colours change, it becomes float32, still in
    0..255, not rounded. float32 stays float32; for hue, saturation and exposure it has to lie in 0..1. What
    `check_augment` refuses must not be asked for.
    """
    top = 255.0 if pixels.dtype == torch.uint8 else 1.0
    pixels = _warp(pixels, spec, draws, size) if _warps(pixels, spec) else _crop(pixels, size, draws)
    if spec.shift:
        pixels = _shift(pixels, spec.shift, draws)
    if spec.flip:
        mirrored = torch.rand((len(pixels), 1, 1, 1), generator=draws.generator("flip")) < 0.5
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
    if spec.hue or spec.saturation or spec.exposure:
        pixels = _colour(pixels, spec, draws, top=top)
    return pixels


def _crop(pixels: Tensor, size: Size | None, draws: Draws) -> Tensor:
    """Windows of `size`, each at a place of its own."""
    n, _, height, width = pixels.shape
    if size is None or size == (height, width):
        return pixels
    generator = draws.generator("crop")
    top = torch.randint(0, height - size[0] + 1, (n, 1), generator=generator)
    left = torch.randint(0, width - size[1] + 1, (n, 1), generator=generator)
    return _windows(pixels, top, left, size)


def _shift(pixels: Tensor, most: int, draws: Draws) -> Tensor:
    n, _, height, width = pixels.shape
    top, left = torch.randint(0, 2 * most + 1, (2, n, 1), generator=draws.generator("shift"))
    return _windows(F.pad(pixels, (most, most, most, most)), top, left, (height, width))


def _windows(pixels: Tensor, top: Tensor, left: Tensor, size: Size) -> Tensor:
    """Of each record the window of `size` whose corner is at `top`, `left` (N, 1): (N, C, height, width)."""
    windows = pixels.unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view: (N, C, top, left, height, width)
    return windows[torch.arange(len(pixels)), :, top[:, 0], left[:, 0]]


def _warps(pixels: Tensor, spec: Augment) -> bool:
    scaled = bool(spec.max_crop) and {spec.min_crop, spec.max_crop} != {min(pixels.shape[2:])}
    return scaled or bool(spec.angle or spec.aspect)


def _warp(pixels: Tensor, spec: Augment, draws: Draws, size: Size | None) -> Tensor:
    """Darknet's `random_augment_image`: from each place of the crop back to one of the record; zeros lie outside it.

    Its integer arithmetic is not kept: the shorter side gets exactly as many pixels as were drawn.
    """
    n, _, high, wide = pixels.shape
    height, width = size or (high, wide)
    aspect = _factor(spec.aspect, n, draws, "aspect")
    shorter = torch.clamp(wide * aspect, max=high)
    side = torch.full((n,), float(min(high, wide)), dtype=torch.float64)
    if spec.max_crop:
        side = torch.randint(spec.min_crop, spec.max_crop + 1, (n,), generator=draws.generator("scale")).double()
    scale = side / shorter
    turn = _between(n, draws, "angle") * math.radians(spec.angle)
    right = _between(n, draws, "right") * (wide * scale / aspect - width) / 2
    down = _between(n, draws, "down") * (high * scale - height) / 2
    u = (torch.arange(width) - width / 2 + right[:, None]) * (aspect / scale)[:, None]
    v = (torch.arange(height) - height / 2 + down[:, None]) / scale[:, None]
    u, v, cos, sin = u[:, None, :], v[:, :, None], turn.cos()[:, None, None], turn.sin()[:, None, None]
    places = torch.stack((cos * u - sin * v + wide / 2, sin * u + cos * v + high / 2), dim=3)
    # `grid_sample` has the record's edges at -1 and 1; here, as in Darknet, a pixel's middle is at its number.
    grid = ((2 * places + 1) / torch.tensor([wide, high]) - 1).float()
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _between(n: int, draws: Draws, name: str) -> Tensor:
    """One number a record, uniform in -1..1: (N,) float64."""
    return 2 * torch.rand(n, dtype=torch.float64, generator=draws.generator(name)) - 1


def _factor(most: float, n: int, draws: Draws, name: str) -> Tensor:
    """Darknet's `rand_scale`: uniform in 1..1 + `most`, every other one inverted: (N,) float64."""
    drawn = torch.rand((2, n), dtype=torch.float64, generator=draws.generator(name))
    factor = 1 + most * drawn[0]
    return torch.where(drawn[1] < 0.5, factor, 1 / factor)


def _colour(pixels: Tensor, spec: Augment, draws: Draws, *, top: float) -> Tensor:
    """Darknet's `random_distort_image`, without going through HSV: (N, 3, H, W) in 0..`top` to the same.

    With the value V, the largest of a pixel's channels, scaling saturation by s and exposure by e takes a channel c to
    e * (V - s * (V - c)).
    """
    n = len(pixels)
    saturation, exposure = (
        _factor(most, n, draws, name).float()[:, None, None]
        for most, name in ((spec.saturation, "saturation"), (spec.exposure, "exposure"))
    )
    planes = list(pixels.to(torch.float32).unbind(1))
    value = torch.maximum(torch.maximum(planes[0], planes[1]), planes[2])
    if spec.hue:
        shift = _between(n, draws, "hue") * spec.hue
        planes = _turn_hue(planes, value, (6 * (shift % 1)).float()[:, None, None])
    base = value * (exposure - exposure * saturation)
    chroma = exposure * saturation
    out = torch.empty(pixels.shape)
    for plane, target in zip(planes, out.unbind(1), strict=True):
        torch.mul(plane, chroma, out=target)
        target.add_(base).clamp_(0, top)
    return out


def _turn_hue(planes: list[Tensor], value: Tensor, shift: Tensor) -> list[Tensor]:
    """Channels (N, H, W) whose hue is moved by `shift` (N, 1, 1) sixths of the circle, 0 to 6.

    All is in units of the chroma d (largest less smallest channel) instead of divided by it: the hue runs from 0 to 6d.
    """
    red, green, blue = planes
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    twice, circle = 2 * chroma, 6 * chroma
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(twice), (red - green).add_(twice).add_(twice)),
    )
    hue.add_(chroma * shift)  # from -d to 11d
    hue = torch.where(hue < 0, hue + circle, hue)
    hue = torch.where(hue >= circle, hue - circle, hue)
    # Red is full at both ends of the circle and lacks in its middle third, green and blue are full around 2d and 4d.
    ramps = (
        (hue - (chroma + twice)).abs_().sub_(chroma),
        (hue - twice).abs_().neg_().add_(twice),
        (hue - 2 * twice).abs_().neg_().add_(twice),
    )
    return [torch.minimum(ramp.clamp_(min=0), chroma, out=ramp).add_(least) for ramp in ramps]


def center_crop(pixels: Tensor, size: Size | None) -> Tensor:
    """The middle (height, width) of (N, C, H, W): what inference sees where training crops at random."""
    if size is None:
        return pixels
    top, left = (pixels.shape[2] - size[0]) // 2, (pixels.shape[3] - size[1]) // 2
    return pixels[:, :, top : top + size[0], left : left + size[1]]


def normalise(pixels: Tensor, schema: DataSchema, *, channels_last: bool) -> Tensor:
    """(N, C, H, W) of u8 records (as u8, or as float32 in 0..255: scaled to 0..1) or f32 to the first layer's input.

    Normalised float32 in the run's layout.
    """
    x = pixels.to(torch.float32)
    if schema.dtype == "u8":
        x = x / 255
    mean, std = (torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (schema.mean, schema.std))
    return ((x - mean) / std).contiguous(memory_format=memory_format(channels_last))
