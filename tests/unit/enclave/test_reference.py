"""The clean queries that a traced distance is compared with, and what a trace says of small and empty classes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave import reference
from caltrain.enclave.run import State
from caltrain.models.network import features_and_logits
from caltrain.plan import Plan
from support.members import Pixels
from support.oracle import fingerprint, known_records, released_model
from support.world import World, pictures


def tracing(**spec: Any) -> Any:
    return lambda plan: msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, **spec))


def linked(*, change: Any = tracing(distance_step=0.001, distance_floor=0.0), **options: Any) -> World:  # noqa: B008
    return World(**({"epochs": 1, "budget": 100, "change": change} | options)).run_to(State.LINKED)


def traced(world: World, inputs: Pixels, **question: Any) -> list[TraceStatement]:
    asked = world.question("trace", inputs, **question)
    given = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    key = world.run.vault.signing.public
    return [open_envelope(envelope, "trace", key, TraceStatement, step="test") for envelope in given.traces]


def class_distances(world: World, query: Any, label: int, *, without: Any = None) -> list[float]:
    known = [f.numpy() for r, (own, _, f) in world.linked().items() if own == label and r != without]
    return sorted(float(np.linalg.norm(f.astype(np.float64) - query)) for f in known)


def test_without_held_out_records_they_are_the_class_each_without_itself() -> None:
    world = linked(records=12)
    records = known_records(world, released_model(world))
    for label, found in world.run.references.items():
        own = [class_distances(world, k.fingerprint, label, without=k.reference) for k in records if k.label == label]
        ranks = min(5, len(own) - 1)
        expected = np.sort(np.round(np.array(own)[:, :ranks] / 0.001), axis=0).T
        assert found.basis == "leave-one-out"
        assert np.abs(found.steps - expected).max() <= 2  # what is stored is rounded
        assert found.count == len(own)


def test_held_out_records_are_compared_in_the_class_that_they_are_predicted_as(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "ENOUGH", 3)
    monkeypatch.setattr(reference, "_BATCH", 4)
    world = linked(records=15, held_out=3)
    model = released_model(world)
    pixels, _ = world.data(held_out=True)
    seen = [fingerprint(model, world.plan, x) for x in pixels]
    bases = set()
    for label, found in world.run.references.items():
        own = [class_distances(world, f, label) for f, odds in seen if int(np.argmax(odds)) == label]
        if len(own) < 3:
            assert found.basis == "leave-one-out"
            continue
        expected = np.sort(np.round(np.array([row[:5] for row in own]) / 0.001), axis=0).T
        assert (found.basis, found.count) == ("held-out", len(own))
        assert np.abs(found.steps - expected).max() <= 2
        bases.add(label)
    assert bases
    for statement in traced(world, pictures(4, seed=8)):
        told = world.run.references[statement.predicted]
        assert (statement.basis, statement.references) == (told.basis, told.count)


def test_a_sample_of_each_class_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ENOUGH", 1)
    monkeypatch.setattr(reference, "SAMPLE", 2)
    world = linked(records=15, held_out=2)
    assert {found.count for found in world.run.references.values()} == {2}
    assert {found.basis for found in world.run.references.values()} >= {"held-out"}


def test_held_out_records_that_could_not_be_asked_about_are_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ENOUGH", 1)
    world = World(epochs=1, held_out=3).run_to(State.RELEASED)

    def broken(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = (part.clone() for part in features_and_logits(*given))
        features[0], features[1], logits[2] = torch.nan, 0.0, torch.inf
        return features, logits

    monkeypatch.setattr(reference, "features_and_logits", broken)
    world.link()
    held_out = [found.count for found in world.run.references.values() if found.basis == "held-out"]
    assert sum(held_out) == world.manifest.records(held_out=True) - 3


def test_how_unusual_a_distance_is_follows_from_what_is_told_of_it() -> None:
    world = linked(records=12, change=tracing(distance_step=0.05, distance_floor=0.5))
    for statement in traced(world, pictures(6, seed=4)):
        found = world.run.references[statement.predicted]
        for n in statement.neighbours:
            assert n.distance is not None
            assert n.unusual == found.unusual(n.rank, round(n.distance / 0.05))
            assert n.unusual is None or n.unusual >= 0.5  # the floor


def test_a_record_that_was_trained_on_is_not_told_from_one_that_is_merely_alike() -> None:
    exact, hidden = linked(records=12), linked(records=12, change=tracing(distance_step=0.001, distance_floor=1.0))
    own, _ = exact.data()
    near = [s for s in traced(exact, own.numpy()) if s.neighbours[0].distance == 0]
    assert len(near) > 5  # those that are predicted as their label
    for statement in traced(hidden, own.numpy()):
        floor = hidden.run.references[statement.predicted].steps[:, -1] * 0.001
        told = [n.distance for n in statement.neighbours if n.distance is not None]
        assert told == sorted(told)
        assert all(distance >= least - 1e-9 for distance, least in zip(told, floor, strict=False))


# --- few records, or none -------------------------------------------------------------------------------------------


def only(world: World, label: int, *, keep: int) -> None:
    """Leave `keep` records of a class in the store."""
    store = world.run.linkage
    assert store is not None
    gone = [record for record, (own, _, _) in world.linked().items() if own == label][keep:]
    store.remove(gone, model=world.run.model_digest, time=0)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_class_with_fewer_records_than_are_asked_for_names_all_of_them(keep: int) -> None:
    world = linked(records=12)
    inputs = pictures(6, seed=5)
    label = traced(world, inputs)[0].predicted
    only(world, label, keep=keep)
    left = {record for record, (own, _, _) in world.linked().items() if own == label}
    assert len(left) == keep
    for statement in traced(world, inputs):
        if statement.predicted == label:
            assert {n.record for n in statement.neighbours} == left
        else:
            assert len(statement.neighbours) == 5


def labelled(world: World, sizes: dict[int, int]) -> World:
    """All parties seal records of these labels instead."""
    labels = [label for label, size in sizes.items() for _ in range(size)]
    for seed, party in enumerate(world.parties.values()):
        party.shards.clear()
        own = labels[seed :: len(world.parties)]
        party.seal(world.plan.data, pictures(len(own), seed=seed), own, shard_records=50)
    return world


@pytest.mark.parametrize(("single", "basis"), [(0, "none"), (1, "none"), (2, "leave-one-out")])
def test_a_class_without_records_to_compare_with_tells_no_distance(single: int, basis: str) -> None:
    world = labelled(World(epochs=1, change=tracing(neighbours=3)), {0: 12, 1: 12, 2: single}).run_to(State.LINKED)
    assert world.run.model is not None
    world.run.model.get_parameter("5.linear.bias").data[2] = 1e6  # whatever is asked is of the last class
    (statement,) = traced(world, pictures(1, seed=5))
    assert (statement.predicted, len(statement.neighbours), statement.basis) == (2, single, basis)
    if single == 1:
        assert [(n.distance, n.unusual) for n in statement.neighbours] == [(2.0, None)]
    if single == 2:  # each has one neighbour but itself
        assert [n.unusual is None for n in statement.neighbours] == [False, True]


def test_copies_of_a_record_are_neighbours_of_it_and_it_is_not_its_own() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    rows[4] = rows[7] = rows[2]
    (found,) = reference._distances(rows[2:3], rows, k=4)
    others = sorted(float((row - rows[2]).norm()) for row in rows)
    assert found[:3] == [0.0, 0.0, 0.0]
    assert found == pytest.approx(others[:4])


@pytest.mark.parametrize(("at_once", "products"), [(64, 1 << 24), (2, 1 << 24), (64, 20)])
def test_distances_are_exact_however_many_are_worked_out_at_once(
    at_once: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    monkeypatch.setattr(reference, "_PRODUCTS", products)
    draw = torch.Generator().manual_seed(1)
    rows, queries = (torch.nn.functional.normalize(torch.randn(n, 8, generator=draw), dim=1) for n in (30, 7))
    expected = torch.cdist(queries.double(), rows.double()).sort(dim=1).values[:, :5]
    assert torch.tensor(reference._distances(queries, rows, k=5)).numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert [len(row) for row in reference._distances(queries, rows[:3], k=5)] == [3] * 7


# --- filters --------------------------------------------------------------------------------------------------------

FILTERS = tracing(filters=True, distance_step=0.001, distance_floor=0.0, neighbours=7)


def test_the_nearest_of_any_class_are_found() -> None:
    world = linked(records=12, change=FILTERS)
    known = known_records(world, released_model(world))
    inputs = pictures(3, seed=5)
    for x, statement in zip(torch.from_numpy(inputs), traced(world, inputs, any_label=True), strict=True):
        own = fingerprint(released_model(world), world.plan, x)[0]
        nearest = sorted(known, key=lambda k: float(np.linalg.norm(k.fingerprint - own)))[:7]
        assert {n.record for n in statement.neighbours} == {k.reference for k in nearest}
        labels = {k.reference: k.label for k in known}
        assert all(n.label == labels[n.record] for n in statement.neighbours)
        assert (statement.any_label, statement.contributors, statement.basis) == (True, (), "none")
        assert {n.unusual for n in statement.neighbours} == {None}


def test_the_nearest_of_a_contributor_are_found() -> None:
    world = linked(records=12, change=FILTERS)
    inputs = pictures(4, seed=5)
    everything = traced(world, inputs, any_label=True, contributors=("alpha", "beta", "gamma"))
    for statement, of_all in zip(traced(world, inputs, contributors=("beta",)), everything, strict=True):
        assert {n.record.party for n in statement.neighbours} == {"beta"}
        assert {n.label for n in statement.neighbours} == {statement.predicted}
        count = sum(label == statement.predicted and r.party == "beta" for r, (label, _, _) in world.linked().items())
        assert len(statement.neighbours) == min(7, count)
        assert (statement.contributors, statement.basis, statement.references) == (("beta",), "none", 0)
        assert of_all.contributors == ("alpha", "beta", "gamma")


def test_a_contributor_that_only_holds_out_has_no_record_to_name() -> None:
    world = World(epochs=1, change=FILTERS)
    for shard in world.parties["beta"].shards:
        shard.listed["held_out"] = True
    world.run_to(State.LINKED)
    (alone,) = traced(world, pictures(1, seed=5), contributors=("beta",))
    assert alone.neighbours == ()
    (both,) = traced(world, pictures(1, seed=5), contributors=("beta", "alpha"))
    assert {n.record.party for n in both.neighbours} == {"alpha"}


def test_a_filter_does_not_get_around_the_floor() -> None:
    change = tracing(filters=True, distance_step=0.001, distance_floor=1.0)
    world = linked(records=12, change=change)
    own, _ = world.data()
    for statement in traced(world, own.numpy()[:9], any_label=True):
        least = world.run.references[statement.predicted].steps[0, -1] * 0.001
        assert all(n.distance is not None and n.distance >= least - 1e-9 for n in statement.neighbours)


def unfiltered(plan: Plan) -> Plan:
    return plan


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "any class, where the plan does not allow it": (unfiltered, {"any_label": True}, "query.filters"),
    "a contributor, where the plan does not allow it": (unfiltered, {"contributors": ("beta",)}, "query.filters"),
    "a prediction of any class": (FILTERS, {"kind": "predict", "any_label": True}, "query.filters"),
    "a prediction of a contributor": (FILTERS, {"kind": "predict", "contributors": ("beta",)}, "query.filters"),
    "an unknown contributor": (FILTERS, {"contributors": ("beta", "delta")}, "party.unknown"),
    "a user": (FILTERS, {"contributors": ("una",)}, "party.unknown"),
    "no name": (FILTERS, {"contributors": ("../beta",)}, "sealed.malformed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_filter_that_is_not_allowed_or_means_nothing_is_refused_and_costs_nothing(what: str) -> None:
    change, question, code = REFUSED[what]
    world = linked(change=change)
    kind = question.get("kind", "trace")
    asked = world.question(kind, pictures(1, seed=1), **{k: v for k, v in question.items() if k != "kind"})
    world.refused(m.Query("una", asked.envelope), code)
    assert world.run.spent == {}
