"""How much of the pictures an IR shows as it is: what an enclave can measure of itself. Runs no attack.

IR: what crosses at a cut, one tensor for each live one. *Pictures* (N, C, H, W) lie in 0..1.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.exposure.subject import Live, check_finite, stacked

LEAST_SAMPLE = 5
_AT_ONCE = 1 << 22
_WIDE = 1.96  # standard errors on both sides: 95 %
_SAME = 1e-6
_STEP = "measure exposure"


def channel_correlation(live: Live, pictures: Tensor) -> Tensor:
    """(N,): for each record, the largest absolute Pearson correlation of a plane of its IR with the grey picture.

    Planes are resized to the picture; one without contrast correlates 0. A vector may be planes that were flattened, so
    it is read as planes of every square size of 4 x 4 or more that divides it. Raises IntegrityError
    `exposure.not-finite`, `exposure.constant-ir`.
    """
    check_ir(live)
    picture = _standard(pictures.mean(1).flatten(1))
    best = torch.zeros(len(pictures))
    for planes in itertools.chain.from_iterable(map(_readings, live)):
        owners = torch.arange(len(pictures)).repeat_interleave(planes.shape[1])
        rows = max(1, _AT_ONCE // picture.shape[1])
        parts = torch.split(planes.flatten(0, 1)[:, None].float(), rows)
        for part, owner in zip(parts, torch.split(owners, rows), strict=True):
            resized = F.interpolate(part, size=pictures.shape[2:], mode="bilinear", antialias=True).flatten(1)
            found = (_standard(resized) * picture[owner]).sum(1).abs().clamp_max(1)
            best.scatter_reduce_(0, owner, found, reduce="amax")
    return best


def _readings(tensor: Tensor) -> list[Tensor]:
    """The ways to see a tensor (N, ...) as planes (N, channels, h, w)."""
    if tensor.dim() > 2:
        return [stacked((tensor,))]
    count, width = tensor.shape
    return [tensor.reshape(count, -1, s, s) for s in range(4, math.isqrt(width) + 1) if width % (s * s) == 0]


def distance_correlation(live_stacked: Tensor, pictures: Tensor) -> Estimate:
    """Distance correlation, 0..1, of the IRs (N, ...) and the pictures of a sample (Szekely et al. 2007).

    The root of the bias-corrected, U-centred estimate of its square (Szekely and Rizzo 2013), 0 where that is negative:
    independent samples give about 0 in any dimension, which the plain estimate does not. The interval is the
    jackknife's. Raises DataError `exposure.too-few` under five records, IntegrityError as `channel_correlation`.
    """
    count = len(pictures)
    if count < LEAST_SAMPLE:
        raise DataError(
            "exposure.too-few",
            f"{count} records have no distance correlation",
            step=_STEP,
            fix=f"Measure at least {LEAST_SAMPLE} records; some hundred give a figure that is of use.",
        )
    check_ir((live_stacked,))
    a, b = _distances(live_stacked), _distances(pictures)
    value, others = _correlated(a, b), torch.arange(count)
    without = [_correlated(a[kept][:, kept], b[kept][:, kept]) for kept in (others[others != i] for i in others)]
    error = math.sqrt((count - 1) / count * sum((x - sum(without) / count) ** 2 for x in without))
    return Estimate(value, max(0.0, value - _WIDE * error), min(1.0, value + _WIDE * error), count)


def _distances(samples: Tensor) -> Tensor:
    """Between the samples (N, ...), pair by pair: (N, N) float64."""
    flat = samples.flatten(1).float()
    flat = flat - flat.mean(0)
    return torch.cdist(flat, flat).double().fill_diagonal_(0)


def _correlated(a: Tensor, b: Tensor) -> float:
    """Of two tables of distances (N, N)."""
    a, b = _centred(a), _centred(b)
    scale = float(a.norm() * b.norm())
    squared = float((a * b).sum()) / scale if scale else 0.0
    return math.sqrt(min(1.0, max(0.0, squared)))


def _centred(far: Tensor) -> Tensor:
    n = len(far)
    rows = far.sum(1) / (n - 2)
    return (far - rows[:, None] - rows[None, :] + far.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def _standard(rows: Tensor) -> Tensor:
    """(N, D) with mean 0 and length 1; all 0 where a row varies by less than a millionth of its size."""
    centred = rows - rows.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > _SAME * rows.norm(dim=1, keepdim=True), centred / length.clamp_min(1e-30), 0.0)


def check_ir(live: Live) -> None:
    """Refuse an IR that is not finite, or no channel of which differs between any two places of any records.

    Raises IntegrityError `exposure.not-finite`, `exposure.constant-ir`.
    """
    for tensor in live:
        check_finite(tensor, "an intermediate representation")
    if not any(_varies(tensor) for tensor in live):
        raise IntegrityError(
            "exposure.constant-ir",
            "every channel of the intermediate representation is constant: nothing of any record crosses there",
            step=_STEP,
            fix="Assess a trained model: layers before the cut are dead, or their weights are zero.",
        )


def _varies(tensor: Tensor) -> bool:
    """By channel; a single vector has one value in each, so its values are compared with each other."""
    channels = stacked((tensor,)).transpose(0, 1).flatten(1)
    if channels.shape[1] == 1:
        channels = channels.T
    return bool((channels.amax(1) - channels.amin(1) > _SAME * channels.abs().amax(1)).any())
