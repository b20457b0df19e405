"""The hunt: before the model leaves, each party learns what is suspicious of its own records, and of no other's."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from caltrain.accountability import witness
from caltrain.accountability.cases import Dossier, Links
from caltrain.accountability.labels import LabelFindings, examine
from caltrain.accountability.quality import Shares
from caltrain.accountability.regression import out_of_fold
from caltrain.accountability.scans import activation_clusters, spectral
from caltrain.accountability.witness import PatchFeatures, RidgeWitness, WitnessBuilder
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import Scan, SuspicionReport, open_for
from caltrain.enclave import contents, hunt, pool
from caltrain.enclave.run import State, present
from caltrain.errors import IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.plan import Plan
from support.oracle import known_records, released_model
from support.world import PARTIES, World


def reports(world: World) -> dict[str, SuspicionReport]:
    """What each party reads."""
    context = world.run.vault.run
    return {
        name: open_for(party.data_key, "suspicion/v1", world.suspicion[name], SuspicionReport, context=context, step="")
        for name, party in world.parties.items()
    }


def scores(world: World, scan: Scan) -> list[int | None]:
    """Of all records in the manifest's order."""
    found = reports(world)
    return [
        score
        for name, party in world.parties.items()
        for shard in party.shards
        if not shard.entry.held_out
        for score in found[name].of(shard.header.shard, scan=scan)
    ]


def predictions(world: World) -> torch.Tensor:
    """Class probabilities (N, 3) of all records in the manifest's order, as each party reads its own; NaN: unknown."""
    found = reports(world)
    own = [
        np.frombuffer(found[name].out_of_fold[shard.header.shard], "<f2").reshape(-1, 3)
        for name, party in world.parties.items()
        for shard in party.shards
        if not shard.entry.held_out
    ]
    return torch.from_numpy(np.concatenate(own)).float()


def test_parties_have_their_reports_before_the_model_leaves() -> None:
    world = World().run_to(State.HUNTED)
    assert set(world.suspicion) == set(PARTIES)
    assert world.released == {}
    assert [event.kind for event in world.chain()][-1] == "hunt"
    assert world.chain()[-1].body == {
        "model": world.run.model_digest,
        "records": 27,
        "scans": ["clusters", "disagreement", "labels", "spectral"],
    }


def test_no_model_is_released_without_a_hunt() -> None:
    world = World().run_to(State.TRAINED)
    world.refused(m.Release(), "session.not-now", fatal=False)


def test_each_record_has_the_score_of_each_scan_over_all_records() -> None:
    world = World().run_to(State.HUNTED)
    passed = present(world.run.passed)
    links = Links(passed.fingerprints, passed.labels, passed.sources, PARTIES)
    witnesses = witnesses_of(world)
    outlying = spectral(links)
    expected: dict[Scan, torch.Tensor] = {
        "labels": examine(Dossier(links, witnesses), passed.probabilities).suspicion,
        "spectral": outlying / (1 + outlying),
        "clusters": activation_clusters(links),
    }
    place = {reference: row for row, (reference, _) in enumerate(passed.lines)}
    order = [
        place[reference]
        for reference in sorted(place, key=lambda r: (PARTIES.index(r.party), shard_number(world, r.shard), r.leaf))
    ]
    for scan, values in expected.items():
        thousandths = [round(float(value) * 1000) for value in values[order]]
        np.testing.assert_allclose(np.array(scores(world, scan), float), thousandths, atol=1)
    assert len(set(scores(world, "labels"))) > 5


def test_each_record_has_the_predictions_of_fits_that_have_not_seen_it() -> None:
    """Worked out again outside, from the released model, in the order in which the pool has the records."""
    world = World().run_to(State.HUNTED)
    place = {reference: row for row, (reference, _) in enumerate(present(world.run.passed).lines)}
    world.run_to(State.LINKED)
    known = known_records(world, released_model(world))
    order = torch.tensor([place[k.reference] for k in known])
    labels, prints = torch.empty(27, dtype=torch.int64), torch.empty(27, len(known[0].fingerprint))
    labels[order] = torch.tensor([k.label for k in known])
    prints[order] = torch.from_numpy(np.stack([k.fingerprint for k in known])).float()
    sources = torch.empty(27, dtype=torch.int64)
    sources[order] = torch.tensor([PARTIES.index(k.reference.party) for k in known])
    said = Dossier(Links(prints, labels, sources, PARTIES), witnesses_of(world)).said
    given = F.one_hot(labels, 3).float()
    heard = [out_of_fold(rows, given, decay=1e-4) for rows in (said.clamp_min(1e-9).log(), prints)]
    expected = (heard[0] + heard[1]).softmax(1)[order]
    found = predictions(world)
    # A few dozen steps of an ill-conditioned fit make more of the last bits of a fingerprint than float16 loses.
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=0.03)
    assert float((found.roll(1, 0) - expected).abs().max()) > 0.5, "in another order they are not the same"


@pytest.mark.parametrize("room", [378, 377])
def test_there_are_no_predictions_in_a_run_that_is_too_large_for_them(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hunt, "_ROOM", room)  # 27 records, four scans and three classes, two bytes each
    world = World().run_to(State.HUNTED)
    assert {len(report.out_of_fold) for report in reports(world).values()} == {2 if room == 378 else 0}
    assert None not in scores(world, "labels")


def shard_number(world: World, shard: str) -> int:
    ids = [s.header.shard for party in world.parties.values() for s in party.shards]
    return ids.index(shard)


def test_a_report_is_as_long_as_its_partys_records_make_it() -> None:
    world = World().run_to(State.HUNTED)
    held = reports(world)
    for name, party in world.parties.items():
        for by_shard in held[name].scores.values():
            assert {s: len(raw) for s, raw in by_shard.items()} == {
                s.header.shard: 2 * len(s.records) for s in party.shards
            }
        assert {s: len(raw) for s, raw in held[name].out_of_fold.items()} == {
            s.header.shard: 2 * 3 * len(s.records) for s in party.shards
        }
        for other in set(PARTIES) - {name}:
            with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: "):
                open_for(
                    world.parties[other].data_key,
                    "suspicion/v1",
                    world.suspicion[name],
                    SuspicionReport,
                    context=world.run.vault.run,
                    step="",
                )


def shared(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, share_quality=True))


def test_a_party_learns_its_own_share_of_wrong_labels_and_that_of_others_only_where_the_plan_says_so() -> None:
    private, public = (reports(World(change=change).run_to(State.HUNTED)) for change in (lambda plan: plan, shared))
    for name in PARTIES:
        assert set(private[name].wrong_labels) == {name}
        assert set(public[name].wrong_labels) == set(PARTIES)
        own = private[name].wrong_labels[name]
        assert 0 <= own.low <= own.value <= own.high <= 1
        assert own.n == 9
    assert public["alpha"].wrong_labels == public["beta"].wrong_labels


def test_held_out_records_are_not_hunted() -> None:
    world = World(held_out=1).run_to(State.HUNTED)
    report = reports(world)["alpha"]
    first, last = world.parties["alpha"].shards
    assert set(report.scores["labels"]) == {first.header.shard}
    assert report.wrong_labels["alpha"].n == len(first.records)
    assert last.header.shard not in report.scores["spectral"]
    assert set(report.out_of_fold) == {first.header.shard}


def witnesses_of(world: World) -> tuple[RidgeWitness, ...]:
    """Those of a run that has hunted, by the pool's rows."""
    return present(world.run.contents).in_order(torch.arange(27))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("held", [0, 0.6, 1], ids=["nothing", "some", "all"])
def test_what_the_witnesses_say_does_not_depend_on_how_much_of_it_is_kept(
    held: float, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "_PATCH", {1: 6, 2: 2}[views])
    monkeypatch.setattr(witness, "_ROWS_AT_ONCE", 5)
    dims = 2 * 8 * 4 + 1
    monkeypatch.setattr(contents, "_HELD", int(27 * held) * 2 * dims * views)
    monkeypatch.setattr(pool.PoolShape, "fit", classmethod(lambda cls, records, size: cls(records, size, 4, 8)))
    world = World().run_to(State.HUNTED)
    assert len(present(world.run.contents).held) == int(27 * held)
    rows = torch.tensor([26, 0, 5, 13, 13, 7, 1])
    monkeypatch.setattr(contents, "_HELD", 1 << 30)
    whole = witnesses_of(World().run_to(State.HUNTED))
    assert len(whole) == views
    for own, expected in zip(witnesses_of(world), whole, strict=True):
        said, wanted = (w.testify(rows, without=frozenset({1}), forget=torch.tensor([3, 20])) for w in (own, expected))
        assert said.shape == (7, 3)
        torch.testing.assert_close(said, wanted, atol=5e-3, rtol=0)


def test_records_are_forgotten_once_however_they_are_left_out() -> None:
    (heard,) = witnesses_of(World().run_to(State.HUNTED))
    rows, own = torch.arange(27), (heard.sources == 1).nonzero().squeeze(1)
    without = heard.testify(rows, without=frozenset({1}))
    assert torch.equal(heard.testify(rows, without=frozenset({1}), forget=own[:4]), without)
    torch.testing.assert_close(heard.testify(rows, forget=own), without, atol=6e-2, rtol=0)  # from half precision
    assert not torch.allclose(heard.testify(rows), without, atol=6e-2)


def test_the_pool_behind_what_is_kept_is_read_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.PoolShape, "fit", classmethod(lambda cls, records, size: cls(records, size, 4, 8)))
    monkeypatch.setattr(contents, "_HELD", 0)
    world = World().run_to(State.HUNTED)
    (heard,) = witnesses_of(world)

    def reads(rows: list[int]) -> list[int]:
        before = len(world.host.log)
        heard.testify(torch.tensor(rows))
        return [c.message.offset for c in world.host.log[before:] if isinstance(c.message, m.Read)]

    first = reads([26])
    assert first == sorted(first)
    assert len(first) == 7
    assert reads([0, 9]) == first


def test_a_record_whose_contents_overflow_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World().run_to(State.TRAINED)
    features = WitnessBuilder.add
    monkeypatch.setattr(WitnessBuilder, "add", lambda *given: features(*given) * torch.inf)
    world.refused(m.Hunt(), "hunt.not-finite")


def test_filters_that_cannot_be_drawn_stop_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchFeatures, "draw", fails)
    World().run_to(State.TRAINED).refused(m.Hunt(), "hunt.not-finite")


def fails(*_given: object, **_more: object) -> Any:
    raise RuntimeError("no convergence")


SCANS: dict[str, Scan] = {"examine": "labels", "spectral": "spectral", "activation_clusters": "clusters"}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_that_cannot_be_worked_out_costs_nobody_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"caltrain.enclave.hunt.{name}", fails)
    world = World(change=shared).run_to(State.HUNTED)
    lengths = {party: len(sealed) for party, sealed in world.suspicion.items()}
    assert scores(world, SCANS[name]) == [None] * 27
    assert None not in scores(world, "disagreement")
    assert bool(predictions(world).isnan().all()) is (name == "examine")
    shares = reports(world)["beta"].wrong_labels
    assert (set(shares.values()) == {Estimate(0.0, 0.0, 1.0, 9)}) is (name == "examine")
    monkeypatch.undo()
    whole = World(change=shared).run_to(State.LINKED)
    assert {party: len(sealed) for party, sealed in whole.suspicion.items()} == lengths


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_figures_that_are_no_numbers_are_told_as_unknown(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(dossier: Dossier, probabilities: torch.Tensor) -> LabelFindings:
        found = examine(dossier, probabilities)
        found.suspicion[3] = value
        third = torch.full((3,), 1 / 3)
        found.view[20, 1] = value
        return LabelFindings(
            found.suspicion, Shares(torch.tensor([value, 0.25, 0.5]), third / 2, third * 2), found.view
        )

    monkeypatch.setattr("caltrain.enclave.hunt.examine", strange)
    world = World(change=shared).run_to(State.HUNTED)
    assert scores(world, "labels") == [None] * 27
    assert bool(predictions(world).isnan().all())
    shares = reports(world)["beta"].wrong_labels
    assert shares["alpha"] == Estimate(0.0, 0.0, 1.0, 9)
    assert shares["beta"] == Estimate(0.25, 0.167, 0.667, 9)


def test_a_run_that_is_taken_up_after_the_hunt_hunts_again_and_notes_it_once() -> None:
    world = World(epochs=1).run_to(State.HUNTED)
    before = reports(world)
    world.take_up()
    world.run_to(State.LINKED)
    assert [event.kind for event in world.chain()].count("hunt") == 1
    assert reports(world) == before
