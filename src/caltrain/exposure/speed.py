"""How fast a FrontNet alone runs, beside the whole model, on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from caltrain.exposure.figures import Count
from caltrain.exposure.subject import Subject, check_front
from caltrain.models.network import zone_of


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Pictures a second through the FrontNet, and through the whole model: medians of `repeats` batches."""

    front: float
    whole: float
    batch: Count
    repeats: Count


def images_per_second(
    subject: Subject, front: int, pictures: Tensor, *, clock: Callable[[], float], repeats: int = 5
) -> Speed:
    """Forward passes of one batch of `pictures`; `clock` gives seconds and never goes back.

    Normalisation is counted on both sides, a first pass on neither. Raises ConfigError `exposure.cut`.
    """
    check_front(subject.spec, front)
    zone = zone_of(subject.module, subject.spec, range(front))
    passes = (lambda: zone.through((subject.inputs(pictures),)), lambda: subject.logits(pictures))
    inside, whole = (len(pictures) / _median_seconds(run, clock, repeats) for run in passes)
    return Speed(front=inside, whole=whole, batch=len(pictures), repeats=repeats)


def _median_seconds(run: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    taken = []
    with torch.inference_mode():
        run()
        for _ in range(repeats):
            began = clock()
            run()
            taken.append(clock() - began)
    return max(statistics.median(taken), 1e-9)  # a coarse clock may not have moved
