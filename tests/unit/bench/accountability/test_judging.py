"""The figures of a method on a run, from answers that are given by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.bench.accountability.figures import figures, interval
from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.planting import case, plant
from caltrain.bench.accountability.questions import (
    BATCHES,
    NEAR,
    SINGLES,
    Answer,
    LabelView,
    Question,
    Tally,
    average_precision,
    judged,
    questions,
)
from caltrain.bench.accountability.scene import Pool, Scene

RunOf = Callable[[Scene], Made]


class Said:
    """Answers the same whatever is asked."""

    def __init__(self, named: tuple[int, ...] = (), suspects: Tensor | None = None, view: LabelView | None = None):
        self.named, self.view = named, view
        self.suspects = torch.empty(0, dtype=torch.int64) if suspects is None else suspects

    def answer(self, question: Question) -> Answer:
        near = self.suspects[:NEAR] if len(self.suspects) >= NEAR else torch.zeros(NEAR, dtype=torch.int64)
        return Answer(self.named, self.suspects, near.expand(len(question.predicted), NEAR))

    def labels(self) -> LabelView | None:
        return self.view


def scene_of(pool: Pool, name: str, share: float | None = 0.05) -> Scene:
    return plant(pool, case(name, share), seed=3, outlook=lambda: np.full((len(pool.labels), 4), 0.25))


def test_a_verdict_that_is_right_has_full_marks(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "patch"))
    tally = judged(Said(made.scene.culprits, torch.from_numpy(np.flatnonzero(made.scene.poisoned))), made)
    found = figures([tally])
    assert (found.poison_precision, found.poison_recall, found.precision_at_9) == (1, 1, 1)
    assert (found.contributor_accuracy, found.false_accusation_rate, found.cannot_tell_rate) == (1, 0, 0)
    assert (found.mislabel_average_precision, found.noise_rate_error, found.verdicts) == (None, None, 1)


def test_half_the_poison_and_as_many_honest_records_are_half_right(pool: Pool, run_of: RunOf) -> None:
    scene = scene_of(pool, "patch")
    bad, good = np.flatnonzero(scene.poisoned)[:10], np.flatnonzero(~scene.poisoned)[:10]
    tally = judged(Said(scene.culprits, torch.from_numpy(np.concatenate((bad, good)))), run_of(scene))
    assert (tally.poison_precision, tally.poison_recall) == (0.5, 0.5)


def test_cover_counts_as_planted_but_not_as_missed(pool: Pool, run_of: RunOf) -> None:
    scene = scene_of(pool, "adaptive")
    cover = torch.from_numpy(np.flatnonzero(scene.cover))
    tally = judged(Said(scene.culprits, cover), run_of(scene))
    assert (tally.poison_precision, tally.poison_recall) == (1, 0)
    whole = judged(Said(scene.culprits, torch.from_numpy(np.flatnonzero(scene.poisoned))), run_of(scene))
    assert (whole.poison_precision, whole.poison_recall) == (1, 1)


@pytest.mark.parametrize(
    ("named", "right", "falsely", "unsure"), [("all", 1, 0, 0), ("one", 0, 0, 0), ("wrong", 0, 1, 0), ("none", 0, 0, 1)]
)
def test_all_culprits_and_nobody_else_are_right(
    pool: Pool, run_of: RunOf, named: str, right: int, falsely: int, unsure: int
) -> None:
    scene = scene_of(pool, "collusion")
    honest = next(p for p in range(4) if p not in scene.culprits)
    who = {"all": scene.culprits, "one": scene.culprits[:1], "wrong": (scene.culprits[0], honest), "none": ()}[named]
    tally = judged(Said(who), run_of(scene))
    assert (tally.right, tally.falsely, tally.unsure) == (right, falsely, unsure)
    assert tally.poison_precision is None
    assert tally.poison_recall == 0


def test_whoever_is_named_where_nobody_did_anything_is_falsely_accused(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "clean", None))
    asked = len(questions(made))
    assert judged(Said((0,)), made).falsely == asked
    assert judged(Said(()), made).falsely == 0
    assert judged(Said(()), made).unsure == asked


def test_only_those_without_wrong_labels_are_innocent_of_noise(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "symmetric", 0.05))
    culprit = int(made.scene.rates.argmax())
    assert judged(Said((culprit,)), made).falsely == 0
    assert judged(Said((culprit, (culprit + 1) % 4)), made).falsely > 0


def test_clean_answers_are_asked_singly_and_in_nines_the_wrong_ones_first(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "clean", None))
    flipped = torch.tensor([3, 5, 7, 20, 30, 40, 50, 60, 70, 80, 90])
    made.tests.probabilities[flipped] = made.tests.probabilities[flipped].roll(1, 1)
    assert made.wrong.tolist() == flipped.tolist()
    found = questions(made)
    singles = [q for q in found if len(q.predicted) == 1]
    nines = [q for q in found if len(q.predicted) == NEAR]
    assert (len(singles), len(nines)) == (SINGLES, len(found) - SINGLES) == (SINGLES, 1)
    assert len(nines) <= BATCHES
    keys = {tuple(row.tolist()) for row in made.tests.features[flipped]}
    assert {tuple(q.queries.features[0].tolist()) for q in singles[: len(flipped)]} <= keys


def test_a_trigger_that_never_works_leaves_nothing_to_ask(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "patch"))
    none = made.triggered[0].rows(torch.empty(0, dtype=torch.int64))
    failed = Made(**{**made.__dict__, "triggered": (none,)})
    assert questions(failed) == []
    tally = judged(Said((0,)), failed)
    assert (tally.asked, tally.right, tally.poison_recall) == (0, None, None)
    found = figures([tally])
    assert (found.false_accusation_rate, found.cannot_tell_rate, found.false_accusation_high) == (None, None, None)


def test_labels_are_judged_by_suspicion_shares_and_intervals(pool: Pool, run_of: RunOf) -> None:
    made = run_of(scene_of(pool, "symmetric", None))
    rates = torch.from_numpy(made.scene.rates)
    suspicion = torch.from_numpy(made.scene.mislabelled).float()
    sure = LabelView(suspicion, rates, rates - 0.01, rates + 0.02)
    tally = judged(Said(view=sure), made)
    assert (tally.average_precision, tally.rate_error, tally.ranked, tally.covered) == (1, 0, 1, 1)
    assert tally.width == pytest.approx(0.03)
    off = LabelView(suspicion, rates + 0.05, rates + 0.01, rates + 0.02)
    tally = judged(Said(view=off), made)
    assert tally.rate_error == pytest.approx(0.05)
    assert (tally.ranked, tally.covered) == (1, 0)
    tied = LabelView(suspicion, torch.full((4,), 0.1))
    assert judged(Said(view=tied), made).ranked == 0


def test_average_precision_counts_ties_together() -> None:
    truth = torch.tensor([True, False, True, False])
    assert average_precision(truth, torch.tensor([4.0, 3, 2, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(truth, torch.ones(4)) == 0.5


def test_runs_are_put_together_verdict_by_verdict() -> None:
    found = figures([Tally(asked=90, falsely=1, unsure=80, right=1.0), Tally(asked=10, falsely=0, unsure=10)])
    assert (found.false_accusation_rate, found.cannot_tell_rate, found.contributor_accuracy) == (0.01, 0.9, 1)
    assert (found.false_accusation_low, found.false_accusation_high) == interval(1, 100)
    assert found.verdicts == 100


def test_intervals_are_exact() -> None:
    low, high = interval(0, 1000)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 1000))
    assert interval(0, 0) == (None, None)
