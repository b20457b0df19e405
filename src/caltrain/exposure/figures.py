"""What an assessment measures, as data. Needs no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mean or a rate over `n` records, with its confidence interval."""

    value: float
    low: float
    high: float
    n: Count


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How close reconstructions come to the pictures that they are of.

    `psnr` in dB, `ssim` in -1..1: higher is closer. `perceptual`: distance of a trained network's features, 0 is the
    same. `reidentification`: the share of reconstructions whose nearest of `candidates` pictures is the true one.
    """

    psnr: Estimate
    ssim: Estimate
    perceptual: Estimate
    reidentification: Estimate
    candidates: Count
