"""The nearest rows are exactly those of a scan in float64, whatever the data; what is stored comes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caltrain.accountability import planes, search
from caltrain.accountability.planes import GRID, Planes, stored
from caltrain.accountability.search import nearest
from caltrain.errors import DataError

KINDS = ("scattered", "close", "closer than the grid", "on two axes", "few directions", "twins", "zero")


def rows_of(kind: str, n: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of length one as a class may have them, and queries of that kind: (n, dims) stored, (3, dims)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 3, dims, generator=draw)
    match kind:
        case "close":
            x = x + 5 * torch.randn(dims, generator=draw)
        case "closer than the grid":
            x = 1e-5 * x + torch.randn(dims, generator=draw)
        case "on two axes":
            x = torch.nn.functional.one_hot(torch.randint(0, min(2, dims), (n + 3,), generator=draw), dims).float()
            x[::2] *= -1
        case "few directions":
            x = (x[:, : min(3, dims)] @ torch.randn(min(3, dims), dims, generator=draw) + 0.5).relu()
        case "twins":
            x = x[torch.randint(0, 2, (n + 3,), generator=draw)]
        case "zero":
            x = x * 0
    x = torch.nn.functional.normalize(x, dim=1)
    return stored(x[3:]), x[:3]


def by_brute_force(query: Tensor, rows: Tensor, k: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    squares = (rows.double() - query.double()).square().sum(1)
    if keep is not None:
        squares[~keep] = torch.inf
    order = torch.argsort(squares, stable=True)[: min(k, int(keep.sum()) if keep is not None else k)]
    return order, squares[order]


cases = {
    "kind": st.sampled_from(KINDS),
    "n": st.integers(1, 400),
    "dims": st.sampled_from([1, 2, 7, 32, 33, 64, 200]),
    "k": st.sampled_from([1, 2, 9, 50]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=120, deadline=None)
@given(**cases)
def test_the_nearest_are_those_of_a_scan_in_float64(kind: str, n: int, dims: int, k: int, seed: int) -> None:
    rows, queries = rows_of(kind, n, dims, seed)
    cut = n // 3
    parts = [Planes.of(rows[:cut]), Planes.of(rows[cut:])]
    for query, found in zip(queries, nearest(queries, parts, k=k), strict=True):
        places, squares = by_brute_force(query, rows, k)
        assert torch.equal(found.places, places)
        assert torch.equal(found.squares, squares)
        assert torch.equal(found.distances, squares.sqrt())


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_of_rows_that_are_kept_the_nearest_are_found(kind: str, n: int, dims: int, k: int, seed: int) -> None:
    rows, queries = rows_of(kind, n, dims, seed)
    keep = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    for query, found in zip(queries, nearest(queries, [Planes.of(rows)], k=k, keep=[keep]), strict=True):
        places, squares = by_brute_force(query, rows, k, keep)
        assert torch.equal(found.places, places)
        assert torch.equal(found.squares, squares)


@pytest.mark.parametrize("kind", ["scattered", "close", "few directions"])
def test_blocks_and_several_looks_do_not_show_in_the_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = rows_of(kind, 3000, 64, 7)
    monkeypatch.setattr(search, "_BLOCK", 512)
    monkeypatch.setattr(search, "_AT_ONCE", 2)
    monkeypatch.setattr(search, "_LOOK", 100)
    monkeypatch.setattr(search, "_PASS", 1024)
    monkeypatch.setattr(planes, "_CHUNK", 128)
    for query, found in zip(queries, nearest(queries, [Planes.of(rows)], k=9), strict=True):
        assert torch.equal(found.places, by_brute_force(query, rows, 9)[0])


def test_few_rows_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be right, and slow."""
    rows, queries = rows_of("few directions", 20_000, 64, 3)
    looked: list[int] = []
    exact = Planes.exact

    def counted(self: Planes, index: Tensor) -> Tensor:
        looked.append(len(index))
        return exact(self, index)

    monkeypatch.setattr(Planes, "exact", counted)
    nearest(queries[:1], [Planes.of(rows)], k=9)
    assert sum(looked) < 200


@settings(max_examples=80, deadline=None)
@given(kind=cases["kind"], n=cases["n"], dims=cases["dims"], seed=cases["seed"])
def test_what_is_stored_comes_back_bit_for_bit(kind: str, n: int, dims: int, seed: int) -> None:
    rows, _ = rows_of(kind, n, dims, seed)
    split = Planes.of(rows)
    assert torch.equal(split.rows(), rows)
    gone = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    left = split.without(gone)
    assert len(left) == int((~gone).sum())
    assert torch.equal(left.rows(), rows[~gone])


@settings(max_examples=80, deadline=None)
@given(kind=cases["kind"], n=cases["n"], dims=cases["dims"], seed=cases["seed"])
def test_the_bounds_of_the_planes_hold(kind: str, n: int, dims: int, seed: int) -> None:
    rows, _ = rows_of(kind, n, dims, seed)
    split = Planes.of(rows)
    center = split.center.double() * GRID
    first = ((split._first(torch.arange(n))[:, :dims] - 7.5) * split.step[:, None] * GRID).double()
    away = rows.double() - center
    assert bool(((away - first).norm(dim=1) <= split.spread.double()).all())
    assert bool((first.norm(dim=1) <= split.reach).all())
    torch.testing.assert_close(split.energy.double(), away.square().sum(1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [3, 64, 250, 4096])
def test_no_bound_is_above_the_distance_that_it_bounds(kind: str, dims: int) -> None:
    rows, queries = rows_of(kind, 300, dims, 11)
    split, width = Planes.of(rows), -(-dims // 32) * 32
    for query in (*queries.double(), rows[0].double(), -rows[0].double()):
        true = (rows.double() - query).square().sum(1)
        look, score = search._Look(query, split), torch.empty(300)
        group = next(size for size in (256, 128, 64, 32) if width % size == 0)
        scales = search._scales(width // group, len(split.high))
        product = torch._weight_int4pack_mm_for_cpu(look.coarse[None], split.high, group, scales)[0]
        look.score(slice(0, 300), product[:300], score)
        bound = torch.add(score, split.spread, alpha=-2 * look.length)
        assert bool((bound.double() <= true + look.margin).all())


def test_memory_is_two_bytes_a_number_and_little_more() -> None:
    rows, _ = rows_of("scattered", 2000, 256, 0)
    assert Planes.of(rows).nbytes / 2000 <= 2 * 256 + 16


def test_what_is_stored_is_float16_close_to_what_was_given() -> None:
    x = torch.nn.functional.normalize(torch.randn(50, 30, generator=torch.Generator().manual_seed(1)), dim=1)
    kept = stored(x)
    assert kept.dtype is torch.float16
    assert torch.equal((kept.double() / GRID).round() * GRID, kept.double())
    assert torch.equal(stored(kept.float()), kept)
    assert bool(((kept.float() - x).abs() <= GRID / 2 + x.abs() * 2.0**-11).all())


@pytest.mark.parametrize(
    "x", [torch.full((1, 3), float("nan")), torch.full((1, 3), 1.1), torch.zeros(3), torch.zeros(2, 0)]
)
def test_what_is_no_fingerprint_is_not_stored(x: Tensor) -> None:
    with pytest.raises(DataError) as raised:
        stored(x)
    assert raised.value.code == "fingerprint.not-unit"


def test_too_many_dimensions_are_not_stored() -> None:
    with pytest.raises(DataError) as raised:
        stored(torch.zeros(1, planes.MAX_DIMS + 1))
    assert raised.value.code == "fingerprint.not-unit"


@pytest.mark.parametrize("value", [2.0**-15, 1.5, float("nan"), float("inf"), -2.0])
def test_rows_off_the_grid_are_not_indexed(value: float) -> None:
    rows = torch.zeros((70, 4), dtype=torch.float16)
    rows[69, 3] = value
    with pytest.raises(DataError) as raised:
        Planes.of(rows)
    assert raised.value.code == "fingerprint.not-stored"


@pytest.mark.parametrize(
    ("query", "k", "code"),
    [
        (torch.zeros(1, 5), 1, "search.query"),
        (torch.zeros(4), 1, "search.query"),
        (torch.full((1, 4), float("nan")), 1, "search.query"),
        (torch.full((1, 4), 1.1), 1, "search.query"),
        (torch.zeros(1, 4), 0, "search.bounds"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(query: Tensor, k: int, code: str) -> None:
    with pytest.raises(DataError) as raised:
        nearest(query, [Planes.of(torch.zeros((3, 4), dtype=torch.float16))], k=k)
    assert raised.value.code == code


def test_of_no_rows_none_is_found() -> None:
    empty = Planes.of(torch.zeros((0, 4), dtype=torch.float16))
    assert len(empty.rows()) == 0
    assert len(nearest(torch.zeros(1, 4), [empty], k=3)[0].places) == 0
    assert len(nearest(torch.zeros(1, 4), [], k=3)[0].places) == 0
    assert len(Planes.of(torch.zeros((3, 4), dtype=torch.float16)).without(torch.ones(3, dtype=torch.bool))) == 0
