"""What an assessment measures, as data. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

BudgetName = Literal["quick", "standard", "thorough"]
"""How much attacks may compute."""
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


class KlFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The papers' measure of one cut, in nats: KL(validator(input) || validator(map)), least over maps, per input.

    `uniform` is KL(validator(input) || uniform), `ratio` the quotient of both means, `below` the share of inputs with
    a map under their own uniform. `unrelated` is what the least over so many maps comes to by chance: the same with
    maps of another input. `quantiles` (5, 25, 50, 75, 95 %) are of the per-input minima. Where not all maps were
    shown, `sampling_error` is how far the minima lie above those over all maps. `most_telling` is the number, as
    `exposure.maps` counts, of the map that most often is the least.
    """

    channels: Count
    maps_used: Count
    kl: Estimate
    uniform: Estimate
    ratio: Estimate
    below: Estimate
    unrelated: Estimate
    quantiles: tuple[float, float, float, float, float]
    sampling_error: Estimate | None
    most_telling: Count
