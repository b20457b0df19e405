"""The pictures of an assessment: whose they are, which are drawn, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure.material import LEAST_TARGETS, Material, gather
from support.exposed import subject
from support.samples import refused

SUBJECT = subject()
Records = tuple[Tensor, Tensor]


def records(count: int, *, value: int) -> Records:
    """Each record has its number in its middle, `value` elsewhere in the crop, and its number (modulo 4) as label."""
    elements = torch.full((count, 1, 10, 10), value, dtype=torch.uint8)
    elements[:, 0, 5, 5] = torch.arange(count)
    return elements, torch.arange(count) % 4


OWN, OTHERS = records(60, value=10), records(90, value=200)


def numbers(pictures: Tensor) -> list[int]:
    return [round(v) for v in (pictures[:, 0, 4, 4] * 255).tolist()]


def drawn(
    own: Records = OWN,
    others: Records = OTHERS,
    *,
    targets: int = 12,
    candidates: int = 40,
    most: int = 30,
    seed: int = 0,
) -> Material:
    return gather(SUBJECT, own, others, targets=targets, candidates=candidates, most_own=most, seed=seed)


def test_own_and_others_are_never_mixed() -> None:
    found = drawn()
    for pictures, value in ((found.own, 10), (found.targets, 200), (found.candidates, 200)):
        assert pictures.shape[1:] == SUBJECT.shape == (1, 8, 8)
        assert (pictures[:, 0, 0, 0] * 255).round().unique().tolist() == [value]


def test_targets_are_the_first_candidates_and_nothing_is_drawn_twice() -> None:
    found = drawn()
    assert (len(found.targets), len(found.candidates), len(found.own)) == (12, 40, 30)
    assert torch.equal(found.targets, found.candidates[:12])
    for pictures in (found.candidates, found.own):
        assert len(set(numbers(pictures))) == len(pictures)


def test_labels_stay_with_their_records() -> None:
    found = drawn()
    assert found.target_labels.tolist() == [n % 4 for n in numbers(found.targets)]
    assert found.own_labels.tolist() == [n % 4 for n in numbers(found.own)]


def test_all_of_ones_own_are_taken_where_there_are_no_more() -> None:
    assert sorted(numbers(drawn(most=1000).own)) == list(range(60))


def test_every_target_is_a_candidate_even_if_fewer_were_asked_for() -> None:
    assert len(drawn(targets=12, candidates=3).candidates) == 12


def test_the_draw_comes_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (numbers(drawn(seed=seed).candidates) for seed in (1, 1, 2))
    assert first == same != other
    assert first != sorted(first)
    assert torch.equal(torch.get_rng_state(), before)


TOO_FEW = {
    "targets": lambda: drawn(targets=LEAST_TARGETS - 1),
    "others for the candidates": lambda: drawn(candidates=91),
    "others for the targets": lambda: drawn(targets=91, candidates=8),
    "own": lambda: drawn((OWN[0][:7], OWN[1][:7])),
}


@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few_are_refused(case: str) -> None:
    with refused(DataError, "exposure.too-few"):
        TOO_FEW[case]()


def test_just_enough_is_enough() -> None:
    found = drawn((OWN[0][:8], OWN[1][:8]), (OTHERS[0][:8], OTHERS[1][:8]), targets=8, candidates=8)
    assert (len(found.own), len(found.targets), len(found.candidates)) == (8, 8, 8)


@pytest.mark.parametrize("side", ["own", "others"])
def test_records_of_another_schema_are_refused(side: str) -> None:
    other = torch.zeros(60, 1, 9, 10, dtype=torch.uint8), torch.zeros(60, dtype=torch.int64)
    with refused(DataError, "exposure.schema"):
        drawn(**{side: other})  # type: ignore[arg-type]
