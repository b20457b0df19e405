"""p-values of neighbourhoods: by hand, and under the null that blame falls by share of data."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.accountability.scan import SMALLEST, Look, holm, orders, scan, strongest

ALL = torch.ones(40, dtype=torch.bool)


def at_least(own: int, *, total: int, share: int, size: int) -> float:
    """The chance that `size` of `total` records, drawn without replacement, hold `own` or more of `share`."""
    ways = sum(comb(share, k) * comb(total - share, size - k) for k in range(own, min(share, size) + 1))
    return ways / comb(total, size)


def row_of(sources: str) -> Tensor:
    return torch.tensor([int(each) for each in sources])


def test_the_strongest_neighbourhood_and_its_chance_are_those_counted_by_hand() -> None:
    """Records in order of nearness; 40 of them, 10 of contributor 1, of which the nearest five are all its own."""
    sources = row_of("11111" + "0" * 30 + "11111")
    nearness = torch.arange(40.0)
    look = scan((nearness,), ALL, sources, contributors=2)[1]
    sizes = (5, 7, 11, 16, 25, 37)  # 5, each half as large again
    assert (look.contributor, look.size, look.own) == (1, 5, 5)
    assert look.p_value == pytest.approx(len(sizes) * at_least(5, total=40, share=10, size=5))


def test_every_neighbourhood_that_was_looked_at_and_every_order_is_paid_for() -> None:
    sources = row_of("0" * 20 + "1" * 20)
    nearness = torch.arange(40.0)
    once = scan((nearness,), ALL, sources, contributors=2)[0]
    twice = scan((nearness, -nearness), ALL, sources, contributors=2)
    assert (once.size, once.own) == (16, 16)
    assert once.p_value == pytest.approx(6 * at_least(16, total=40, share=20, size=16))
    assert twice[0].p_value == pytest.approx(2 * once.p_value)
    assert twice[1].own == 16, "the second order was not looked at"


def test_only_suspected_records_count_but_shares_are_of_all() -> None:
    sources = row_of("1" * 5 + "0" * 5 + "1" * 10 + "0" * 20)
    suspected = torch.zeros(40, dtype=torch.bool)
    suspected[5:10], suspected[10:15] = True, True
    looks = scan((torch.arange(40.0),), suspected, sources, contributors=2)
    assert (looks[0].size, looks[0].own) == (5, 5)
    assert looks[0].p_value == pytest.approx(2 * at_least(5, total=40, share=25, size=5))


@pytest.mark.parametrize("count", [0, 1, SMALLEST - 1])
def test_too_few_suspected_records_prove_nothing(count: int) -> None:
    suspected = torch.arange(40) < count
    looks = scan((torch.arange(40.0),) * 2, suspected, row_of("1" * 20 + "0" * 20), contributors=3)
    assert looks == tuple(Look(c, 0, 0, 1.0) for c in range(3))


def test_a_contributor_without_records_and_one_who_has_all_are_not_unlikely() -> None:
    looks = scan((torch.arange(40.0),), ALL, torch.zeros(40, dtype=torch.int64), contributors=2)
    assert [look.p_value for look in looks] == [1.0, 1.0]


def test_of_equally_near_records_the_first_come_first() -> None:
    """So that the same links have the same verdict."""
    sources = row_of("0" * 5 + "1" * 35)
    looks = scan((torch.zeros(40),), ALL, sources, contributors=2)
    assert (looks[0].size, looks[0].own) == (5, 5)


def test_under_the_null_p_values_are_below_a_level_at_most_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws, records = 1000, 120
    sources = row_of("0" * 60 + "1" * 36 + "2" * 18 + "3" * 6)
    order = tuple(torch.rand((2, records), generator=generator))
    suspected = torch.rand(records, generator=generator) < 0.5
    found = np.array(
        [
            [
                look.p_value
                for look in scan(
                    order, suspected, sources[torch.randperm(records, generator=generator)], contributors=4
                )
            ]
            for _ in range(draws)
        ]
    )
    for level in (0.01, 0.05, 0.2):
        slack = 3 * (level * (1 - level) / draws) ** 0.5
        assert ((found <= level).mean(0) <= level + slack).all()
        adjusted = np.array([holm(each) for each in found])
        assert (adjusted.min(1) <= level).mean() <= level + slack
    assert ((found <= 0.2).mean(0) > 0).all(), "p-values that are never small are no test"


def test_the_nearest_by_distance_come_first() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, rows = torch.randn((4, 6), generator=generator), torch.randn((50, 6), generator=generator)
    distances = np.sqrt(((rows[:, None] - queries[None]).double().numpy() ** 2).sum(2))
    expected = np.sort(distances, axis=1)[:, :3].mean(1)
    assert np.allclose(orders(queries, rows)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_queries_than_neighbours_are_all_counted(count: int) -> None:
    queries, rows = torch.eye(8)[:count], torch.eye(8)
    expected = torch.stack([(rows - query).norm(dim=1) for query in queries]).mean(0)
    assert torch.allclose(orders(queries, rows)[0], expected, atol=1e-5)


def test_the_second_order_finds_what_leans_towards_the_queries_in_a_direction_without_much_spread() -> None:
    """The queries differ most in a direction in which all records do; some records lean their way in a quiet one."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn((200, 8), generator=generator) * torch.tensor([2.0] + [1.0] * 6 + [0.2])
    rows[:20, 7] += 1.0
    queries = torch.zeros((5, 8))
    queries[:, 0], queries[:, 7] = 2.0, 1.0
    by_distance, by_direction = (set(torch.argsort(values)[:20].tolist()) for values in orders(queries, rows))
    assert len(by_direction & set(range(20))) >= 15
    assert len(by_distance & set(range(20))) <= 10


@pytest.mark.parametrize("rows", [torch.zeros((0, 8)), torch.ones((1, 8)), torch.ones((9, 8))])
def test_orders_of_no_record_one_and_equal_ones_have_a_value_for_each(rows: Tensor) -> None:
    for values in orders(torch.eye(8)[:2], rows):
        assert values.shape == (len(rows),)
        assert bool(values.isfinite().all())


def test_the_strongest_of_several_scans_is_corrected_for_their_number() -> None:
    first = (Look(0, 5, 3, 0.4), Look(1, 7, 7, 0.01))
    second = (Look(0, 7, 5, 0.1), Look(1, 5, 5, 0.02))
    third = (Look(0, 5, 1, 1.0), Look(1, 0, 0, 1.0))
    best = strongest([first, second, third])
    assert [(look.contributor, look.size, look.own) for look in best] == [(0, 7, 5), (1, 7, 7)]
    assert [look.p_value for look in best] == pytest.approx([0.3, 0.03])
    assert strongest([(Look(0, 5, 3, 0.9),)] * 3)[0].p_value == 1.0


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # By hand: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
        ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)),
        ((0.5, 0.4), (0.8, 0.8)),
        ((0.9, 0.8, 0.7), (1.0, 1.0, 1.0)),
        ((0.02,), (0.02,)),
    ],
)
def test_holms_correction_is_that_of_an_example_by_hand(
    p_values: tuple[float, ...], adjusted: tuple[float, ...]
) -> None:
    assert holm(np.array(p_values)).tolist() == pytest.approx(adjusted)
