"""How close reconstructions come to the pictures that they are of. *Pictures* (N, C, H, W) lie in 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure.figures import Scores
from caltrain.exposure.material import Material
from caltrain.exposure.perceptual import Distance
from caltrain.exposure.statistics import mean_estimate, rate_estimate
from caltrain.exposure.subject import check_finite

MOST_PSNR = 100.0
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_AT_ONCE = 1 << 24
_FLAT = 1e-4
_SAME = 1e-6


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB for a peak of 1; equal pictures get 100, and none gets more."""
    error = (a - b).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-MOST_PSNR / 10)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) (Wang et al. 2004): the mean over channels and the places where the window fits.

    A Gaussian window of 11 x 11, sigma 1.5, K1 0.01, K2 0.03; where a side is shorter, the largest odd one that fits.
    """
    x, y = a.flatten(0, 1)[:, None], b.flatten(0, 1)[:, None]
    down, across = (_gaussian(side, like=a) for side in a.shape[2:])
    mean_x, mean_y, xx, yy, xy = (
        F.conv2d(F.conv2d(t, down[None, None, :, None]), across[None, None, None, :])
        for t in (x, y, x * x, y * y, x * y)
    )
    light = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    texture = (2 * (xy - mean_x * mean_y) + _C2) / (xx - mean_x.square() + yy - mean_y.square() + _C2)
    return (light * texture).reshape(len(a), -1).mean(1)


def _gaussian(side: int, *, like: Tensor) -> Tensor:
    reach = (min(side, _WINDOW) - 1) // 2
    places = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    return F.softmax(-places.square() / (2 * _SIGMA**2), dim=0)


def reidentify(reconstructions: Tensor, candidates: Tensor) -> Tensor:
    """Whether the nearest of `candidates` (M, C, H, W) to reconstruction i is candidate i: (N,) bool, N <= M.

    Nearest by correlation, once the mean picture of each set is taken off: neither brightness and contrast, nor what
    an attack gets wrong in all pictures, nor its pull towards the mean image is held against the adversary. (Of raw
    distances, plain correlation and this, this one finds the most under noise, blur and shrinking.) It needs some
    dozens of reconstructions. A tie is no hit, so neither is a constant guess; copies of the true candidate do not tie.

    Who knows the FrontNet and has the candidates compares IRs and needs no reconstruction: this measures how much of
    a picture comes back, not whether its owner can be found.
    """
    known, guesses = _unit(candidates - candidates.mean(0)), _unit(reconstructions - reconstructions.mean(0))
    rows = max(1, _AT_ONCE // len(known))
    return torch.cat([_hits(guesses[i : i + rows], known, first=i) for i in range(0, len(guesses), rows)])


def _hits(guesses: Tensor, known: Tensor, *, first: int) -> Tensor:
    truth = known[first : first + len(guesses)]
    at_truth = (guesses * truth).sum(1)
    rivals = truth @ known.T <= 1 - _SAME
    rivals[torch.arange(len(truth)), first + torch.arange(len(truth))] = False
    return at_truth > (guesses @ known.T).masked_fill(~rivals, -torch.inf).amax(1) + _SAME


def _unit(pictures: Tensor) -> Tensor:
    """(N, D): mean 0 and length 1; all 0 for a picture whose standard deviation is under 1e-4."""
    flat = pictures.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length > _FLAT * flat.shape[1] ** 0.5, flat / length.clamp_min(1e-12), 0.0)


def score(reconstructions: Tensor, material: Material, perceptual: Distance, *, seed: int = 0) -> Scores:
    """How close reconstructions (N, C, H, W), clamped to 0..1, come to the first N targets. `seed`: of the intervals.

    Raises DataError `exposure.shapes`, IntegrityError `exposure.not-finite`, and as `mean_estimate` does.
    """
    truth = material.targets[: len(reconstructions)]
    if reconstructions.shape != truth.shape:
        raise DataError(
            "exposure.shapes",
            f"reconstructions of {tuple(reconstructions.shape)} for targets of {tuple(material.targets.shape)}",
            step="score reconstructions",
            fix="Reconstruct the targets in their shape and order.",
        )
    check_finite(reconstructions, "a reconstruction")
    guesses = reconstructions.detach().clamp(0, 1)
    hits = int(reidentify(guesses, material.candidates).sum())
    return Scores(
        psnr=mean_estimate(psnr(guesses, truth).numpy(), seed=seed),
        ssim=mean_estimate(ssim(guesses, truth).numpy(), seed=seed),
        perceptual=mean_estimate(perceptual(guesses, truth).numpy(), seed=seed),
        reidentification=rate_estimate(hits, len(guesses)),
        candidates=len(material.candidates),
    )


def floors(material: Material, perceptual: Distance, *, seed: int = 0) -> dict[str, Scores]:
    """Scores of guesses that need no IR: the mean of the adversary's pictures, and for each target one of them."""
    count = len(material.targets)
    drawn = torch.randint(len(material.own), (count,), generator=torch.Generator().manual_seed(seed))
    guesses = {
        "mean image": material.own.mean(0, keepdim=True).expand(count, -1, -1, -1),
        "own draw": material.own[drawn],
    }
    return {name: score(guess, material, perceptual, seed=seed) for name, guess in guesses.items()}
