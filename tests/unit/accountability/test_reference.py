"""Clean queries: what share of them is as far, and how far a distance is told to be."""

from __future__ import annotations

import pytest

from caltrain.accountability.reference import NOTHING, Reference, in_steps

# Three queries, two ranks each.
REFERENCE = Reference.of("held-out", [[0.3, 0.5], [0.1, 0.2], [0.2, 0.9]], step=0.1)


@pytest.mark.parametrize(
    ("rank", "steps", "share"),
    [(1, 0, 0.0), (1, 1, 0.33), (1, 2, 0.67), (1, 3, 1.0), (1, 9, 1.0), (2, 1, 0.0), (2, 2, 0.33), (2, 8, 0.67)],
)
def test_the_share_is_of_neighbours_of_the_same_rank_that_are_at_most_as_far(
    rank: int, steps: int, share: float
) -> None:
    assert REFERENCE.unusual(rank, steps) == share


def test_a_rank_that_no_clean_query_has_is_compared_with_nothing() -> None:
    assert REFERENCE.unusual(3, 1) is None
    assert NOTHING.unusual(1, 0) is None
    assert (NOTHING.basis, NOTHING.count, REFERENCE.count) == ("none", 0, 3)


@pytest.mark.parametrize(
    ("rank", "steps", "floor", "told"),
    [
        (1, 0, 0.0, 0),
        (1, 0, 0.01, 1),
        (1, 0, 1 / 3, 1),
        (1, 0, 0.5, 2),
        (1, 0, 1.0, 3),
        (1, 7, 1.0, 7),
        (2, 0, 0.5, 5),
        (3, 0, 0.5, 5),
    ],
)
def test_a_distance_hides_among_a_share_of_clean_queries(rank: int, steps: int, floor: float, told: int) -> None:
    assert REFERENCE.told(rank, steps, floor=floor, most=20) == told


def test_where_there_is_nothing_to_hide_among_nothing_is_told() -> None:
    assert NOTHING.told(1, 0, floor=0.5, most=20) == 20
    assert NOTHING.told(1, 4, floor=0.0, most=20) == 4


@pytest.mark.parametrize(("distance", "steps"), [(0.0, 0), (0.04, 0), (0.06, 1), (2.0, 20)])
def test_a_distance_is_rounded_to_a_step(distance: float, steps: int) -> None:
    assert in_steps(distance, 0.1) == steps
