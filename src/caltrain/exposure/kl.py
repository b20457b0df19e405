"""The papers' assessment (arXiv:1807.00969): what a validator still tells of an input from its maps, at each cut.

It measures what a classifier sees, not what an inverter recovers. And the least over many maps is low by chance alone:
`KlFigures.unrelated` shows how low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from caltrain.errors import ConfigError, DataError
from caltrain.exposure.figures import Estimate, KlFigures
from caltrain.exposure.material import LEAST_TARGETS
from caltrain.exposure.shown import Look, Progress, Seen
from caltrain.exposure.statistics import mean_estimate, rate_estimate
from caltrain.exposure.subject import Defence, Subject, check_front, undefended
from caltrain.exposure.validator import Validator

_BATCH = 16  # inputs at once, and in each of the two pilots
_LEAST_UNIFORM = 1e-6  # nats: a validator that knows nothing still gives a finite ratio
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_RESAMPLES = 2000
_STEP = "assess KL"


def assess_kl(
    subject: Subject,
    cuts: Collection[int],
    validator: Validator,
    pictures: Tensor,
    *,
    maps: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    defence: Defence = undefended,
) -> dict[int, KlFigures]:
    """The figures of each cut over pictures (N, C, H, W), at least 8. `on_step(done, total)` counts maps shown.

    With `maps`, only so many maps of each tensor are shown. Two pilots of 16 inputs, shown with all maps, choose them;
    and how far the least of those that one pilot chooses lies above the least of all is measured on the other. Up to 32
    inputs are shown with all maps. Raises ConfigError `exposure.cut`, `exposure.maps`, `exposure.validator-shape`,
    DataError `exposure.too-few`, IntegrityError `exposure.not-finite`, `exposure.constant-ir`.
    """
    for front in cuts:
        check_front(subject.spec, front)
    _check_counts(maps, len(pictures))
    rng = torch.Generator().manual_seed(seed)
    pictures = pictures[torch.randperm(len(pictures), generator=rng)]
    batches = pictures.tensor_split(math.ceil(len(pictures) / _BATCH))
    with torch.inference_mode():
        look = Look(subject, sorted(set(cuts)), validator, defence)
        counts = look.counts(batches[0])
        if maps is None or len(batches) < 3 or max(counts, default=0) <= maps:
            progress = Progress(on_step, len(pictures) * sum(counts))
            seen, tested = [look(batch, None, progress) for batch in batches], []
        else:
            piloted, few = len(batches[0]) + len(batches[1]), sum(min(maps, count) for count in counts)
            progress = Progress(on_step, piloted * sum(counts) + (len(pictures) - piloted) * few)
            one, two = (look(batch, None, progress) for batch in batches[:2])
            tested = [(two, two.only(_telling([one], maps, rng))), (one, one.only(_telling([two], maps, rng)))]
            chosen = _telling([one, two], maps, rng)
            seen = [one.only(chosen), two.only(chosen), *(look(batch, chosen, progress) for batch in batches[2:])]
    return {front: _figures(front, seen, tested, seed) for front in look.cuts}


def papers_cut(figures: Mapping[int, KlFigures], *, tolerance: float = 1.0) -> int | None:
    """The papers' rule: the first cut from which on every ratio is at least `tolerance`. None where the last is not."""
    best = None
    for front in sorted(figures, reverse=True):
        if not figures[front].ratio.value >= tolerance:  # nor where either is not a number
            break
        best = front
    return best


def _telling(pilots: Sequence[Seen], wanted: int, rng: torch.Generator) -> list[Tensor]:
    """Of each tensor the numbers of `wanted` maps, ascending: half rank best over the pilots' inputs, half drawn."""
    chosen = []
    for tables in zip(*(pilot.tables for pilot in pilots), strict=True):
        own = torch.cat([table.own for table in tables])
        ranked = own.argsort(1).argsort(1).double().mean(0).argsort(stable=True)
        best = (wanted + 1) // 2
        rest = ranked[best:]
        drawn = rest[torch.randperm(len(rest), generator=rng)[: wanted - best]]
        chosen.append(torch.cat([ranked[:best], drawn]).sort().values)
    return chosen


def _figures(front: int, seen: Sequence[Seen], tested: Sequence[tuple[Seen, Seen]], seed: int) -> KlFigures:
    least, winner, other = (torch.cat(parts) for parts in zip(*(batch.least(front) for batch in seen), strict=True))
    uniform = torch.cat([batch.uniform for batch in seen])
    tables = [seen[0].tables[part] for part in seen[0].parts[front]]
    used, channels = sum(len(table.index) for table in tables), sum(table.count for table in tables)
    error = None
    if tested and used < channels:
        gaps = [few.least(front)[0] - every.least(front)[0] for every, few in tested]
        error = mean_estimate(torch.cat(gaps).numpy(), seed=seed)
    five = np.quantile(least.double().numpy(), _QUANTILES)
    return KlFigures(
        channels=channels,
        maps_used=used,
        kl=mean_estimate(least.numpy(), seed=seed),
        uniform=mean_estimate(uniform.numpy(), seed=seed),
        ratio=_ratio(least, uniform, seed),
        below=rate_estimate(int((least < uniform).sum()), len(least)),
        unrelated=mean_estimate(other.numpy(), seed=seed),
        quantiles=(float(five[0]), float(five[1]), float(five[2]), float(five[3]), float(five[4])),
        sampling_error=error,
        most_telling=int(winner.bincount().argmax()),
    )


def _ratio(least: Tensor, uniform: Tensor, seed: int) -> Estimate:
    """Quotient of the means of (N,) and (N,), its interval by bootstrap over inputs."""
    pairs = torch.stack((least, uniform)).double().numpy()
    rng, n = np.random.default_rng(seed), pairs.shape[1]
    drawn = np.stack([pairs[:, rng.integers(0, n, n)].mean(1) for _ in range(_RESAMPLES)])
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1].clip(min=_LEAST_UNIFORM), (0.025, 0.975))
    value = float(pairs[0].mean() / max(pairs[1].mean(), _LEAST_UNIFORM))
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def _check_counts(maps: int | None, inputs: int) -> None:
    if maps is not None and maps < 1:
        raise ConfigError(
            "exposure.maps", f"{maps} maps of each tensor were asked for", step=_STEP, fix="Ask for at least one map."
        )
    if inputs < LEAST_TARGETS:
        raise DataError(
            "exposure.too-few",
            f"{inputs} inputs were given",
            step=_STEP,
            fix=f"Give at least {LEAST_TARGETS}; the papers' distributions need some hundred.",
        )
