"""A party's own assessment of a semi-trained model: attacks on its own records (arXiv:1812.03230, IV-B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.exposure.attacks.labels import ir_groups
from caltrain.exposure.choice import choose
from caltrain.exposure.figures import BudgetName, Estimate
from caltrain.exposure.lineup import Lineup
from caltrain.exposure.material import Material, gather
from caltrain.exposure.measures import score
from caltrain.exposure.party_report import PartyReport
from caltrain.exposure.perceptual import Distance, distance_by
from caltrain.exposure.policy import MEASURES, Adversary, Policy, attack_bounds
from caltrain.exposure.report import of_scores
from caltrain.exposure.statistics import records_to_show
from caltrain.exposure.subject import Cut, Subject

_TARGETS = 32
_CANDIDATES = 1000
OnStep = Callable[[str, int, int], None]


def judge(
    subject: Subject,
    cuts: Sequence[int],
    records: tuple[NDArray[np.generic], NDArray[np.int64]],
    policy: Policy,
    *,
    budget: BudgetName,
    seed: int,
    on_step: OnStep = lambda _what, _done, _of: None,
) -> PartyReport:
    """Attack the policy's bounds with elements (N, C, H, W) and labels (N,) of one party.

    One half of the records plays the adversary's, the other those that it wants. Raises DataError
    `exposure.too-few`, `exposure.too-few-for-policy` where the records are too few for the policy.
    """
    bounds = attack_bounds(policy)
    policy = msgspec.structs.replace(policy, bounds=bounds)
    names = sorted({bound.adversary for bound in bounds if MEASURES[bound.measure].run == "attack"})
    material = _halves(subject, records, policy, seed=seed)
    found: dict[int, dict[str, Estimate]] = {}
    lineup, distance = Lineup(material, budget, seed), distance_by(subject)
    for number, front in enumerate(sorted(cuts)):
        found[front] = _figures(Cut(subject, front), lineup, names, policy, distance)
        on_step(f"cut {front}", number + 1, len(cuts))
    choice = choose(policy, found, costs={cut: float(cut) for cut in found})
    return PartyReport(
        model=subject.digest,
        budget=budget,
        adversary_records=len(material.own),
        figures=found,
        misses=choice.misses,
        front=choice.front or 0,
    )


def _halves(
    subject: Subject, records: tuple[NDArray[np.generic], NDArray[np.int64]], policy: Policy, *, seed: int
) -> Material:
    elements, labels = torch.from_numpy(records[0].copy()), torch.from_numpy(records[1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    own, others = order[: len(order) // 2], order[len(order) // 2 :]
    needed = [records_to_show(b.limit) for b in policy.bounds if b.measure == "reidentification"]
    targets = max([_TARGETS, *needed] if policy.use == "bound" else [_TARGETS])
    return gather(
        subject,
        (elements[own], labels[own]),
        (elements[others], labels[others]),
        targets=targets,
        candidates=max(targets, min(_CANDIDATES, len(others))),
        seed=seed,
    )


def _figures(
    cut: Cut, lineup: Lineup, names: Sequence[Adversary], policy: Policy, distance: Distance
) -> dict[str, Estimate]:
    material, seed, found = lineup.material, lineup.seed, dict[str, Estimate]()
    for name in names:
        pictures: Tensor = lineup.reconstruct(name, cut)
        scores = of_scores(score(pictures, material, distance, seed=seed))
        found |= {f"{name}.{measure}": value for measure, value in scores.items()}
    if any(bound.measure == "label_purity" for bound in policy.bounds):
        found["label_purity"] = ir_groups(cut, material.widened(), seed=seed).purity
    return found
