"""What is asked about a run, what a method answers, and the sums that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.scene import Scene
from caltrain.bench.accountability.training import Seen

NEAR = 9
SINGLES = 100  # traces of one clean answer each
BATCHES = 10  # traces of nine of them


@dataclass(frozen=True)
class Question:
    """Mispredictions that are asked about together: what the model sees in them."""

    queries: Seen

    @property
    def predicted(self) -> Tensor:
        """What the model called them (Q,)."""
        return self.queries.predicted


@dataclass(frozen=True)
class Answer:
    """What a method makes of a question: the contributors it names, none where it cannot tell; records it holds
    responsible (R,); and for each query the `NEAR` records that it ranks highest (Q, NEAR).
    """

    named: tuple[int, ...]
    suspects: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class LabelView:
    """What a method makes of the records' labels: suspicion (N,), and shares of wrong labels (P,) with an interval."""

    suspicion: Tensor
    shares: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


class Method(Protocol):
    """A method that has been shown a run, but not the truth about it."""

    def answer(self, question: Question) -> Answer:
        """Who and what is behind these mispredictions."""

    def labels(self) -> LabelView | None:
        """What is wrong with labels, if the method says anything about that."""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one run. None where the figure has no meaning, or where the method says nothing of the kind."""

    precision_at_9: float | None = None
    poison_precision: float | None = None
    poison_recall: float | None = None
    asked: float = 0
    unsure: float = 0
    falsely: float = 0
    right: float | None = None
    average_precision: float | None = None
    rate_error: float | None = None
    covered: float | None = None
    width: float | None = None
    ranked: float | None = None


def questions(made: Made) -> list[Question]:
    """All triggered queries at once where there is a trigger; else clean answers, singly and in nines.

    Those are mispredictions; where a model makes few, answers that were nearly wrong fill up what is asked singly.
    """
    if made.triggered:
        parts = [seen for seen in made.triggered if len(seen.features)]
        return [Question(_joined(parts))] if parts else []
    wrong = made.wrong[torch.randperm(len(made.wrong), generator=torch.Generator().manual_seed(0))]
    sure = made.tests.probabilities.max(1).values.scatter(0, wrong, torch.inf)
    single = torch.cat((wrong, torch.argsort(sure, stable=True)[: max(0, len(sure) - len(wrong))]))[:SINGLES]
    nines = [places for places in torch.split(wrong, NEAR) if len(places) == NEAR][:BATCHES]
    return [Question(made.tests.rows(places)) for places in (*torch.split(single, 1), *nines)]


def judged(method: Method, made: Made) -> Tally:
    """Ask the method everything, and hold its answers against the truth."""
    scene, asked = made.scene, questions(made)
    answers = [method.answer(question) for question in asked]
    tampered = torch.from_numpy(scene.poisoned | scene.cover | scene.mislabelled)
    view = None if made.triggered else method.labels()
    tally = Tally(
        asked=len(answers),
        unsure=sum(not answer.named for answer in answers),
        falsely=sum(not set(answer.named) <= _guilty(scene) for answer in answers),
        precision_at_9=_mean([float(tampered[answer.nearest].float().mean()) for answer in answers])
        if tampered.any()
        else None,
    )
    if scene.culprits and answers:
        tally = msgspec.structs.replace(tally, **_of_poison(scene, answers[0]))
    if view is not None:
        tally = msgspec.structs.replace(tally, **_of_labels(scene, view))
    return tally


def _guilty(scene: Scene) -> set[int]:
    """Who may be named: culprits of a backdoor, and whoever has wrong labels."""
    return set(scene.culprits) | set(np.flatnonzero(scene.rates > 0).tolist())


def _of_poison(scene: Scene, answer: Answer) -> dict[str, float | None]:
    poisoned, planted = torch.from_numpy(scene.poisoned), torch.from_numpy(scene.poisoned | scene.cover)
    found = answer.suspects
    return {
        "poison_precision": float(planted[found].float().mean()) if len(found) else None,
        "poison_recall": float(poisoned[found].sum() / poisoned.sum()),
        "right": float(set(answer.named) == set(scene.culprits)),
    }


def _of_labels(scene: Scene, view: LabelView) -> dict[str, float | None]:
    rates = torch.from_numpy(scene.rates)
    found: dict[str, float | None] = {}
    if scene.mislabelled.any():
        found["average_precision"] = average_precision(torch.from_numpy(scene.mislabelled), view.suspicion)
    if view.shares is not None:
        found["rate_error"] = float((view.shares.double() - rates).abs().max())
        found["ranked"] = float(_ranked(view.shares.double(), rates)) if scene.mislabelled.any() else None
    if view.low is not None and view.high is not None:
        found["covered"] = float(((view.low <= rates + 1e-9) & (rates <= view.high + 1e-9)).double().mean())
        found["width"] = float((view.high - view.low).mean())
    return found


def _ranked(shares: Tensor, rates: Tensor) -> bool:
    """Whether whoever has the larger share of wrong labels is said to, for every two that differ."""
    return bool(((rates[:, None] <= rates) | (shares[:, None] > shares)).all())


def average_precision(truth: Tensor, score: Tensor) -> float:
    """Mean precision at each true record (N,), by falling score; records of one score count together."""
    from sklearn.metrics import average_precision_score  # noqa: PLC0415  # two seconds, only where it is needed

    return float(average_precision_score(truth.numpy(), score.double().numpy()))


def _joined(parts: Sequence[Seen]) -> Seen:
    return Seen(torch.cat([p.features for p in parts]), torch.cat([p.probabilities for p in parts]))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
