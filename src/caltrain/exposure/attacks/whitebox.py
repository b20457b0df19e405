"""The white-box attack: who has the FrontNet looks for the picture whose intermediate representation (IR) was seen.

As arXiv:1412.0035 and He et al. (ACSAC 2019, doi:10.1145/3359789.3359824): gradient descent on the distance of the two
IRs plus priors. Different here: it descends in coordinates in which the adversary's own pictures vary alike, so that it
goes first where pictures differ most; what crosses is whitened; the weights of the priors are found for every cut on
own pictures; and an inverter's answer may be what is started from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure.attacks.priors import Basis, basis_of, roughness
from caltrain.exposure.correlation import check_ir
from caltrain.exposure.measures import ssim
from caltrain.exposure.precision import fast
from caltrain.exposure.subject import Cut, Live

OnStep = Callable[[int, int], None]
Start = Callable[[Live], Tensor]
PRACTICE = 8
_CALIBRATION = 128
_AT_ONCE = 64
_RATE = 1.0
_RATE_FROM_START = 0.3  # larger first steps undo the start: SSIM 0.91 against 0.83, 18-layer network at cut 8
_EASED = 0.7
_JITTER = 0.01
_LEAST_NOISE = 0.01
_FLOOR = 0.01
_TINY = 1e-20
_MOST_CHANNELS = 1024
_OUTSIDE = 1000.0
_STEP = "reconstruct white-box"


@dataclass(frozen=True)
class Prior:
    """Weights of the mean square distance from the centre, in standard deviations, and of the total variation."""

    distance: float
    variation: float


PRIORS = (Prior(0.01, 0.0), Prior(0.1, 0.0), Prior(0.3, 0.2), Prior(1.0, 0.0), Prior(5.0, 0.0))


@dataclass(frozen=True)
class WhiteboxBudget:
    """Steps of descent, in the search for the best of `priors` and again in the attack."""

    steps: int
    priors: tuple[Prior, ...] = PRIORS


BUDGETS = {"quick": WhiteboxBudget(60), "standard": WhiteboxBudget(200), "thorough": WhiteboxBudget(600)}


def whitebox(
    cut: Cut,
    observed: Live,
    own: Tensor,
    *,
    budget: WhiteboxBudget,
    seed: int,
    start: Start | None = None,
    basis: Basis | None = None,
    on_step: OnStep = lambda _done, _total: None,
) -> Tensor:
    """Pictures (N, C, H, W) in 0..1 whose IR at `cut` is like `observed`, the tensors (N, ...) that crossed there.

    `own` pictures are the adversary's; it practises on the last 8. `start` makes pictures of such tensors, and should
    not have learned from those 8; without it, the descent starts from the mean picture. `basis`: of `own`, where it is
    at hand; it is the same at every cut. No record's result depends on another's. Raises DataError
    `exposure.other-ir`, `exposure.too-few`, IntegrityError `exposure.not-finite`, `exposure.constant-ir`.
    """
    _check(cut, observed, own)
    attack = Attack.of(cut, own[:-PRACTICE], start=start, basis=basis, seed=seed)
    done, total = 0, budget.steps * (-(-len(observed[0]) // _AT_ONCE) + (len(budget.priors) > 1))

    def stepped() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    prior = best_prior(attack, cut, own[-PRACTICE:], budget, stepped)
    batches = zip(*(torch.split(tensor, _AT_ONCE) for tensor in observed), strict=True)
    return torch.cat([attack.run(live, [prior] * len(live[0]), budget.steps, stepped) for live in batches])


def best_prior(
    attack: Attack, cut: Cut, practice: Tensor, budget: WhiteboxBudget, stepped: Callable[[], None] = lambda: None
) -> Prior:
    """The prior of `budget` with which pictures (8, C, H, W) of one's own come back best, by SSIM: all in one batch."""
    if len(budget.priors) == 1:
        return budget.priors[0]
    with torch.no_grad():
        live = cut.ir(practice)
    count, each = len(budget.priors), len(practice)
    repeated = tuple(tensor.repeat(count, *[1] * (tensor.dim() - 1)) for tensor in live)
    priors = [prior for prior in budget.priors for _ in range(each)]
    found = attack.run(repeated, priors, budget.steps, stepped)
    closeness = ssim(found, practice.repeat(count, 1, 1, 1)).view(count, each).mean(1)
    return budget.priors[int(closeness.argmax())]


@dataclass(frozen=True)
class Channels:
    """Of one tensor: what crosses is taken to be `gain` * clean + `offset` + noise, channel by channel.

    `whiten` (channels, channels), or (channels,) where these are many, makes all that varies count alike: a picture's
    details are in what varies little. Noise makes it count less.
    """

    gain: Tensor
    offset: Tensor
    whiten: Tensor

    @classmethod
    def of(cls, clean: Tensor, crossed: Tensor) -> Channels:
        """Fitted on tensors (N, ...) of the same records; what differs by place alone goes into `offset`."""
        middle, level = clean.mean(0, keepdim=True), crossed.mean(0, keepdim=True)
        x, y = _rows(clean - middle), _rows(crossed - level)
        gain = (x * y).mean(0) / x.square().mean(0).clamp_min(_TINY)
        whiten = _whitening(y, (y - gain * x).square().mean(0))
        size = _times(y, whiten).square().mean().sqrt()
        shaped = gain[:, None, None] if clean.dim() == 4 else gain
        # A tensor that is the same for all records says nothing, and must not divide by zero.
        return cls(shaped, level - shaped * middle, whiten / size if size else torch.zeros_like(whiten))

    def residual(self, clean: Tensor, observed: Tensor) -> Tensor:
        """(N,): mean square of what is left unexplained, whitened; about 1 for a guess that knows nothing."""
        left = _times(_rows(self.gain * clean.float() + self.offset - observed), self.whiten)
        return left.square().view(len(clean), -1).mean(1)


def _rows(tensor: Tensor) -> Tensor:
    """(places of all records, channels) of planes (N, C, h, w), tokens (N, T, D) or vectors (N, D)."""
    return (tensor.movedim(1, -1) if tensor.dim() == 4 else tensor).flatten(0, -2)


def _times(rows: Tensor, whiten: Tensor) -> Tensor:
    return rows @ whiten if whiten.dim() == 2 else rows * whiten


def _whitening(crossing: Tensor, noise: Tensor) -> Tensor:
    """The inverse root of the noise's covariance and a hundredth of that of `crossing` (places, channels)."""
    variance = crossing.square().mean(0)
    least = noise + _LEAST_NOISE * (_FLOOR * variance.mean() + _TINY)
    if len(variance) > _MOST_CHANNELS:
        return (least + _LEAST_NOISE * variance).rsqrt()
    covariance = crossing.T @ crossing / len(crossing)
    values, vectors = torch.linalg.eigh(least.diag() + _LEAST_NOISE * covariance)
    whiten: Tensor = vectors * values.clamp_min(values[-1] * 1e-6).rsqrt()
    return whiten


@dataclass(frozen=True)
class Attack:
    """An attack on one cut, ready to be run on any records."""

    clean: Cut
    channels: tuple[Channels, ...]
    basis: Basis
    jitter: Tensor
    start: Start | None

    @classmethod
    def of(cls, cut: Cut, own: Tensor, *, seed: int, start: Start | None = None, basis: Basis | None = None) -> Attack:
        """Learn from `own` pictures what pictures are like, and what the cut's defence does to what crosses."""
        clean = Cut(cut.subject, cut.front)
        with torch.no_grad():
            with fast():  # what fast arithmetic loses is noise, too
                predicted = clean.ir(own[:_CALIBRATION])
            crossed = cut.ir(own[:_CALIBRATION])
        channels = tuple(Channels.of(p.float(), c) for p, c in zip(predicted, crossed, strict=True))
        jitter = _JITTER * torch.randn((1, *cut.subject.shape), generator=torch.Generator().manual_seed(seed))
        return cls(clean, channels, basis or basis_of(own), jitter, start)

    def run(self, live: Live, priors: list[Prior], steps: int, stepped: Callable[[], None]) -> Tensor:
        """Pictures (N, C, H, W) of `live`, each under its own prior.

        The rate falls as a cosine; over most of the descent, the weight of the distance falls to a tenth, the prior's.
        """
        centre = self.basis.mean if self.start is None else self.start(live)
        distance, variation = (torch.tensor([getattr(p, name) for p in priors]) for name in ("distance", "variation"))
        rate = _RATE if self.start is None else _RATE_FROM_START
        z = self.jitter.repeat(len(priors), 1, 1, 1).requires_grad_()
        optimiser = torch.optim.Adam([z], lr=rate)
        for step in range(steps):
            at = step / steps
            optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * at)) / 2
            held = distance * 10 ** max(0.0, 1 - at / _EASED)
            pictures = centre + self.basis.offset(z)
            outside = (pictures - pictures.clamp(0, 1)).square().flatten(1).mean(1)
            kept = held * z.square().flatten(1).mean(1) + variation * roughness(pictures)
            loss = self.residual(pictures, live) + kept + _OUTSIDE * outside
            (z.grad,) = torch.autograd.grad(loss.sum(), z)  # Adam is by element: no record's step depends on another's
            optimiser.step()
            stepped()
        return (centre + self.basis.offset(z)).detach().clamp(0, 1)

    def residual(self, pictures: Tensor, live: Live) -> Tensor:
        """How far the IR of `pictures` is from `live`: (N,)."""
        with fast():
            guess = self.clean.ir(pictures)
        parts = zip(self.channels, guess, live, strict=True)
        return torch.stack([channels.residual(found, true) for channels, found, true in parts]).mean(0)


def _check(cut: Cut, observed: Live, own: Tensor) -> None:
    """Refuse what `whitebox` says that it refuses."""
    if len(own) < 2 * PRACTICE:
        raise DataError(
            "exposure.too-few",
            f"{len(own)} pictures of the adversary's own are too few",
            step=_STEP,
            fix=f"Give at least {2 * PRACTICE}; some thousand make a strong attack.",
        )
    with torch.no_grad():
        expected = [tuple(tensor.shape[1:]) for tensor in cut.ir(own[:1])]
    given = [tuple(tensor.shape[1:]) for tensor in observed]
    if given != expected or len({len(tensor) for tensor in observed}) != 1 or not len(observed[0]):
        raise DataError(
            "exposure.other-ir",
            f"what was observed has shapes {[tuple(tensor.shape) for tensor in observed]}, "
            f"cut {cut.front} gives {expected} for one record",
            step=_STEP,
            fix="Give what crossed at this cut of this model, one tensor for each, all of the same records.",
        )
    check_ir(observed)
