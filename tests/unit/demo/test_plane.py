"""The plane that fingerprints are shown in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from caltrain.boundary.sealed import LEFT_OUT, SuspicionReport
from caltrain.demo import space
from caltrain.demo.compare import Finished
from caltrain.demo.evaluate import Lineage, suspicion
from caltrain.demo.scenario import TRIALS, Holding, Scenario
from caltrain.models.network import Network
from caltrain.provenance.verdict import SuspectRecords
from caltrain.records.commitment import RecordRef
from caltrain.records.readers import Dataset
from support.results import NOBODY, said

SHARD = "a" * 32


def two_groups(*, dims: int = 40, apart: float = 3.0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Forty points, the last ten of which lie `apart` along the last number."""
    points = np.random.default_rng(0).normal(size=(40, dims))
    suspects = np.arange(40) >= 30
    points[suspects, -1] += apart
    return points, suspects


def test_the_first_axis_goes_from_the_rest_to_the_suspects() -> None:
    points, suspects = two_groups()
    center, axes = space.plane(points, suspects)
    first = ((points - center) @ axes)[:, 0]
    between = points[suspects].mean(0) - points[~suspects].mean(0)
    assert axes[:, 0] == pytest.approx(between / np.linalg.norm(between))
    assert first[suspects].mean() > 0 > first[~suspects].mean()
    assert axes.T @ axes == pytest.approx(np.eye(2), abs=1e-9)


def test_the_second_axis_shows_most_of_what_differs_beside_the_first() -> None:
    points, suspects = two_groups(dims=6, apart=9.0)
    points[:, 0] = np.tile((20, -20), 20)  # as much in either group
    _, axes = space.plane(points, suspects)
    assert axes[0, 1] > 0.99


@pytest.mark.parametrize("everybody", [True, False])
def test_with_nothing_to_tell_apart_both_axes_are_principal(everybody: bool) -> None:
    points, _ = two_groups(dims=6)
    points[:, 1] *= 20
    points[:, 4] *= -10
    _, axes = space.plane(points, np.full(40, everybody))
    assert axes[1, 0] > 0.98
    assert axes[4, 1] > 0.98
    assert not space.parts(np.full(40, everybody))


def test_the_plane_is_the_same_whatever_the_sign_of_a_component() -> None:
    points, suspects = two_groups()
    one, other = space.plane(points, suspects)[1], space.plane(points[::-1], suspects[::-1])[1]
    assert one == pytest.approx(other)


def test_suspects_where_the_others_are_give_no_direction_and_no_error() -> None:
    points = np.tile(np.random.default_rng(0).normal(size=(5, 4)), (2, 1))
    _, axes = space.plane(points, np.arange(10) < 5)
    assert np.isfinite(axes).all()


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (7, 7), (1600, 1600), (5000, 1600)])
def test_at_most_so_many_records_are_drawn_evenly_and_the_same_each_time(count: int, shown: int) -> None:
    rows = space._sample(count)
    assert len(set(rows.tolist())) == shown
    assert (np.diff(rows) > 0).all()
    assert (rows == space._sample(count)).all()
    if count == 5000:
        assert 2300 < rows.mean() < 2700


def reported(**scores: list[int]) -> SuspicionReport:
    by_scan = {scan: {SHARD: np.array(own, "<u2").tobytes()} for scan, own in scores.items()}
    return SuspicionReport(model="sha256:" + "0" * 64, scores=cast(Any, by_scan))


def test_suspicion_is_the_highest_score_of_the_scans_asked_for() -> None:
    hunts = {"ann": reported(labels=[100, 900, 0], clusters=[200, LEFT_OUT, LEFT_OUT]), "bob": reported(labels=[50])}
    hunts["bob"].scores["clusters"] = {}
    refs = [RecordRef("ann", SHARD, leaf) for leaf in range(3)]
    assert suspicion(hunts, ["labels"]) == {refs[0]: 0.1, refs[1]: 0.9, refs[2]: 0.0, RecordRef("bob", SHARD, 0): 0.05}
    assert suspicion(hunts, ["clusters"]) == {refs[0]: 0.2}
    assert suspicion(hunts, ["labels", "clusters"])[refs[0]] == 0.2


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Finished:
    """Two parties with five records each; a fingerprint is the brightness of two pixels."""

    def embed(_model: object, _plan: object, images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], None]:
        return images[:, 0, :2, 0].astype(np.float64), None

    monkeypatch.setattr(space, "embed", embed)
    holdings = tuple(
        Holding(
            name,
            np.arange(5, dtype=np.uint8)[:, None, None, None] * 10 + np.full((5, 1, 8, 8), i, np.uint8),
            np.array([7, 7, 7, 1, 7]),
            np.array([False, False, i == 1, False, False]),
            np.zeros(5, bool),
        )
        for i, name in enumerate(("ann", "bob"))
    )
    refs = {RecordRef(h.name, SHARD, row): (h, row) for h in holdings for row in range(5)}
    test = Dataset(np.full((4, 1, 8, 8), 9, np.uint8), np.array([1, 2, 3, 4]), tuple("0123456789"))
    suspects = SuspectRecords(party="bob", shard=SHARD, leaves=(2,), commitments="A" * 43 + "=")
    hunts = {"ann": reported(labels=[0] * 5, clusters=[0] * 5), "bob": reported(labels=[0] * 5, clusters=[500] * 5)}
    plan = SimpleNamespace(data=SimpleNamespace(classes=test.class_names))
    told = SimpleNamespace(
        project=SimpleNamespace(plan=plan),
        scenario=Scenario(holdings, test, TRIALS["digits"].attack),
        manifest=SimpleNamespace(references=lambda: iter(refs)),
        lineage=Lineage(refs),
        verdict=msgspec.structs.replace(said(), suspects=(suspects,)),
        traced_inputs=np.array([3, 1, 0]),
        suspicion_of=lambda *scans: suspicion(hunts, scans),
    )
    return cast(Finished, told)


def test_what_is_shown_is_the_class_that_most_inputs_are_taken_for(finished: Finished) -> None:
    found = space.flatten(finished, cast(Network, None))
    assert (found.label, found.of, found.parted) == ("7", 8, True)
    assert [p.party for p in found.records] == ["ann"] * 4 + ["bob"] * 4
    assert [p.suspect for p in found.records] == [p.planted for p in found.records] == [False] * 6 + [True, False]
    assert [p.suspicion for p in found.records] == [0.0] * 4 + [0.5] * 4
    assert len(found.inputs) == 2  # the third is taken for a 1


def test_records_and_inputs_are_in_one_plane(finished: Finished) -> None:
    found = space.flatten(finished, cast(Network, None))
    # All fingerprints lie on a line, at 0, 10, 20, 40 and one more for bob; the inputs' two pixels are 9.
    places = [p.x for p in found.records]
    step = (places[1] - places[0]) / 10
    assert [x for x, _ in found.inputs] == pytest.approx([places[0] + 9 * step] * 2)
    assert places[4:] == pytest.approx([x + step for x in places[:4]])


def test_without_suspects_the_space_is_shown_all_the_same(finished: Finished) -> None:
    told = cast(Any, finished)
    told.verdict = NOBODY
    found = space.flatten(finished, cast(Network, None))
    assert not found.parted
    assert not any(p.suspect for p in found.records)
