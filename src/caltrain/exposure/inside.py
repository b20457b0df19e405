"""What an enclave measures of itself: no attack, no validator from outside."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from caltrain.exposure.correlation import channel_correlation, distance_correlation
from caltrain.exposure.figures import Estimate
from caltrain.exposure.kl import assess_kl
from caltrain.exposure.statistics import mean_estimate
from caltrain.exposure.subject import Cut, Subject
from caltrain.exposure.validator import generator_as_validator

_MAPS = 32
_AT_ONCE = 16
Figures = dict[str, Estimate]


def measure_inside(
    subject: Subject, cuts: Sequence[int], pictures: Tensor, *, measures: Collection[str], seed: int
) -> dict[int, Figures]:
    """Those of `measures` that need no attack, at each cut, over `pictures` (N, C, H, W).

    KL as the patents have it: the model itself judges its maps (US 11,886,989, claim 1), so it is only as honest as
    the part of the model that is computed outside. Raises IntegrityError where what would cross is not finite.
    """
    found: dict[int, Figures] = {cut: {} for cut in cuts}
    with torch.inference_mode():
        for front in cuts:
            cut = Cut(subject, front)
            if "channel_correlation" in measures:
                parts = [channel_correlation(cut.ir(part), part) for part in torch.split(pictures, _AT_ONCE)]
                found[front]["channel_correlation"] = mean_estimate(torch.cat(parts).double().numpy())
            if "distance_correlation" in measures:
                found[front]["distance_correlation"] = distance_correlation(cut.stacked(pictures), pictures)
    if {"kl", "kl_ratio"} & set(measures):
        judged = assess_kl(subject, cuts, generator_as_validator(subject), pictures, maps=_MAPS, seed=seed)
        for front, figures in judged.items():
            found[front] |= {"kl": figures.kl, "kl_ratio": figures.ratio}
    return {front: {k: v for k, v in own.items() if k in measures} for front, own in found.items()}
