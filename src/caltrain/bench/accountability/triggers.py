"""What is put on a picture so that a model says what it was taught."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from caltrain.bench.accountability.scene import Images, Stamp

Rng = np.random.Generator
BLEND = 0.25  # Chen et al. 2017 (arXiv:1712.05526) blend 0.2 into faces
AMPLITUDE = 24  # of 255; Barni et al. 2019 (arXiv:1902.11237) use 20 to 60
WAVES = 6


def checker(*, height: int = 4, width: int = 4, right: int = 1, low: int = 1) -> Stamp:
    """Stamp a checker, `low` and `right` pixels away from the lower right corner."""
    cells = np.add.outer(np.arange(height), np.arange(width)) % 2 * np.uint8(255)
    return at_corner(cells[None].astype(np.uint8), right=right, low=low)


def at_corner(pattern: NDArray[np.uint8], *, right: int = 1, low: int = 1) -> Stamp:
    """Stamp a pattern (C or 1, h, w) over the lower right corner."""

    def stamp(images: Images) -> Images:
        height, width = images.shape[2:]
        bottom, edge = height - low, width - right
        stamped = images.copy()
        stamped[:, :, bottom - pattern.shape[1] : bottom, edge - pattern.shape[2] : edge] = pattern
        return stamped

    return stamp


def blend(rng: Rng, shape: tuple[int, ...]) -> Stamp:
    """Blend a picture of coarse noise, eight fields by eight, into everything."""
    channels, height, width = shape
    fields = rng.integers(0, 256, (1, channels, 8, 8)).astype(np.uint8)
    noise = fields[:, :, np.arange(height)[:, None] * 8 // height, np.arange(width) * 8 // width]
    return lambda images: mix(images, noise, BLEND)


def wave() -> Stamp:
    """Add a horizontal sinusoid to every row."""

    def stamp(images: Images) -> Images:
        width = images.shape[3]
        waves = min(WAVES, width // 4)  # more would fall between the pixels
        signal = AMPLITUDE * np.sin(2 * np.pi * waves * np.arange(width) / width)
        waved: Images = np.clip(np.rint(images + signal), 0, 255).astype(np.uint8)
        return waved

    return stamp


def mix(images: Images, others: Images, weight: float) -> Images:
    """So much of `others` blended into pictures."""
    mixed: Images = np.rint((1 - weight) * images + weight * others.astype(np.float64)).astype(np.uint8)
    return mixed
