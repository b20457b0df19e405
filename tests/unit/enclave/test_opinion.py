"""Second opinions: the methods' own on the run's model and records, ranks alone, only where the plan has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.accountability import attribution
from caltrain.accountability.attribution import Attribution, GradientDot, Records, Seen, Trak
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.digests import to_text
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave import opinion
from caltrain.enclave.run import State, present
from caltrain.plan import Method, Plan
from caltrain.records.commitment import RecordRef
from support.members import Pixels
from support.oracle import fingerprint, known_records, released_model
from support.world import Change, World, pictures

METHODS: dict[Method, Callable[[Records], Attribution]] = {"gradient": GradientDot, "trak": partial(Trak, ridge=1.0)}
ALL: tuple[Method, ...] = ("fingerprint", "gradient", "trak")
INPUTS = pictures(6, seed=5)


def tracing(**spec: Any) -> Change:
    return lambda plan: msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, **spec))


OPEN = tracing(methods=ALL, filters=True)


def linked(**options: Any) -> World:
    given: dict[str, Any] = {"budget": 100, "records": 12, "change": OPEN}
    return World(**(given | options)).run_to(State.LINKED)


def traced(world: World, inputs: Pixels = INPUTS, **question: Any) -> list[TraceStatement]:
    asked = world.question("trace", inputs, **question)
    given = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    key = world.run.vault.signing.public
    return [open_envelope(envelope, "trace", key, TraceStatement, step="test") for envelope in given.traces]


def failed(world: World, code: str, **question: Any) -> None:
    """The question is charged and is no event; the run goes on."""
    head, spent = world.run.chain.head, world.run.spent.get("una", 0)
    reply = world.send(m.Query("una", world.question("trace", INPUTS, **question).envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == (code, False)
    assert (world.run.chain.head, world.run.spent, world.run.state) == (head, {"una": spent + 6}, State.LINKED)


# --- what a method says ---------------------------------------------------------------------------------------------


def outside(world: World, inputs: Tensor) -> Seen:
    """What the released model makes of records or inputs, as a party can work it out."""
    features: list[Tensor] = []
    model, odds = released_model(world), []
    for x in inputs:
        hook = list(model.children())[-1].register_forward_pre_hook(lambda _, given: features.append(given[0][0]))
        odds.append(fingerprint(model, world.plan, x)[1])
        hook.remove()
    probabilities = torch.from_numpy(np.stack(odds)).float()
    return Seen(torch.stack(features), probabilities, probabilities.argmax(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filters", [{}, {"any_label": True}, {"contributors": ("alpha", "gamma")}], ids=str)
def test_the_ranking_is_that_of_the_method_on_the_runs_own_model_and_records(
    method: Method, filters: dict[str, Any]
) -> None:
    world = linked()
    pixels, labels = world.data()
    records, asked = outside(world, pixels), outside(world, torch.from_numpy(INPUTS.copy()))
    scores = METHODS[method](Seen(records.features, records.probabilities, labels)).scores(asked)
    known = known_records(world, released_model(world))
    row_of = {k.reference: row for row, k in enumerate(known)}
    parties = filters.get("contributors", ("alpha", "beta", "gamma"))
    ours = torch.tensor([k.reference.party in parties for k in known])
    for own, label, said in zip(scores, asked.labels, traced(world, method=method, **filters), strict=True):
        counts = ours if filters.get("any_label") else ours & (labels == label)
        ranked = [row for row in own.argsort(descending=True).tolist() if counts[row] and own[row] > 0]
        rows = [row_of[n.record] for n in said.neighbours]
        assert len(rows) == len(set(rows)) == min(5, len(ranked))
        # What is kept is rounded, so two records may change places whose scores are the same to three digits.
        np.testing.assert_allclose(own[rows], own[ranked[:5]], rtol=5e-3, atol=1e-6)
        assert len(rows) > 1
        for neighbour, row in zip(said.neighbours, rows, strict=True):
            assert neighbour.commitment == to_text(known[row].commitment)
            assert neighbour.label == int(labels[row])


def test_the_methods_do_not_say_the_same() -> None:
    world = linked()
    rankings = [[[n.record for n in said.neighbours] for said in traced(world, method=method)] for method in ALL]
    assert rankings[0] != rankings[1] != rankings[2] != rankings[0]


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_matter_how_much_is_worked_out_at_once(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    world = linked()
    whole = [said.neighbours for said in traced(world, method=method)]
    monkeypatch.setattr(opinion, "_SCORES", 2 * world.run.records + 1)
    monkeypatch.setattr(opinion, "AT_ONCE", 5)
    monkeypatch.setattr(attribution, "AT_ONCE", 5)
    present(world.run.evidence).opinions.clear()
    assert [said.neighbours for said in traced(world, method=method)] == whole


def test_a_second_opinion_names_its_method_and_tells_no_score() -> None:
    world = linked()
    spec, keys = world.plan.trace, {"rank", "record", "label", "distance", "commitment", "unusual"}
    assert spec.distance_floor == 0.5
    for index, said in enumerate(traced(world, method="trak")):
        assert (said.method, said.basis, said.references) == ("trak", "none", 0)
        assert (said.index, said.user, said.model) == (index, "una", world.run.model_digest)
        assert {(n.distance, n.unusual) for n in said.neighbours} == {(None, None)}
        assert [n.rank for n in said.neighbours] == [*range(1, len(said.neighbours) + 1)]
        assert set(msgspec.to_builtins(said.neighbours[0])) == keys
    for said in traced(world):
        assert (said.method, said.basis) == ("fingerprint", "leave-one-out")
        assert all(n.distance is not None for n in said.neighbours)


class Scripted:
    """A method with scores of its own."""

    def __init__(self, scores: Callable[[int], Tensor]) -> None:
        self._scores = scores

    def __call__(self, records: Records) -> Attribution:
        """Made for records."""
        self._records = sum(len(block) for block in records.blocks())
        return self

    def scores(self, asked: Seen) -> Tensor:
        """As `Attribution.scores`."""
        return self._scores(self._records).expand(len(asked), -1)


def scripted(patch: pytest.MonkeyPatch, scores: Callable[[int], Tensor]) -> None:
    patch.setitem(opinion._MADE, "trak", Scripted(scores))


def test_records_that_speak_against_a_prediction_are_not_named_and_ties_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = linked()
    table = present(world.run.linkage).table(world.run.model_digest, limit=1 << 20)
    scripted(monkeypatch, lambda n: torch.tensor([2.0, -1, 3, 0, 2, 2, 3, *[-5] * (n - 7)]))
    (said,) = traced(world, INPUTS[:1], method="trak", any_label=True)
    assert [n.record for n in said.neighbours] == [table.record(row) for row in (2, 6, 0, 4, 5)]
    scripted(monkeypatch, lambda n: torch.tensor([2.0, -1, 0, 1, *[-5] * (n - 4)]))
    present(world.run.evidence).opinions.clear()
    (said,) = traced(world, INPUTS[:1], method="trak", any_label=True)
    assert [n.record for n in said.neighbours] == [table.record(row) for row in (0, 3)]


# --- when the links change, when the enclave does --------------------------------------------------------------------


def removed(world: World, records: list[RecordRef]) -> None:
    present(world.run.linkage).remove(records, model=world.run.model_digest, time=99)


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_was_withdrawn_is_named_no_more(method: Method) -> None:
    world = linked()
    gone = list(dict.fromkeys(n.record for said in traced(world, method=method) for n in said.neighbours))
    removed(world, gone)
    assert not {n.record for said in traced(world, method=method) for n in said.neighbours} & {*gone}
    removed(world, [*world.linked()])
    assert [said.neighbours for said in traced(world, method=method)] == [()] * 6


def test_a_contributor_that_only_holds_out_speaks_for_nothing() -> None:
    world = World(change=OPEN)
    for shard in world.parties["beta"].shards:
        shard.listed["held_out"] = True
    world.run_to(State.LINKED)
    (said,) = traced(world, INPUTS[:1], contributors=("beta",), method="gradient")
    assert (said.contributors, said.neighbours) == (("beta",), ())


def test_an_enclave_that_takes_the_run_up_has_the_same_opinions() -> None:
    world = linked()
    before = [said.neighbours for said in traced(world, method="trak")]
    world.take_up()
    assert world.run.outputs is None
    world.run_to(State.LINKED)
    again = traced(world, method="trak")
    assert [said.neighbours for said in again] == before
    assert world.run.spent == {"una": 12}


def test_what_a_method_makes_of_all_records_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world, made = linked(), 0

    def counted(records: Records) -> Attribution:
        nonlocal made
        made += 1
        return Trak(records)

    monkeypatch.setitem(opinion._MADE, "trak", counted)
    traced(world, method="trak")
    traced(world, method="trak")
    assert made == 1
    removed(world, [next(iter(world.linked()))])
    traced(world, method="trak")
    assert made == 2


# --- who gets none --------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Change, dict[str, Any], str]] = {
    "a method that the plan does not have": (tracing(), {"method": "gradient"}, "query.method"),
    "another than those that it has": (
        tracing(methods=("fingerprint", "trak")),
        {"method": "gradient"},
        "query.method",
    ),
    "fingerprints, where it has others alone": (tracing(methods=("trak",)), {}, "query.method"),
    "a prediction": (OPEN, {"kind": "predict", "method": "trak"}, "query.method"),
    "a verdict": (OPEN, {"kind": "verdict", "method": "gradient"}, "query.method"),
    "an unknown method": (OPEN, {"method": "magic"}, "sealed.malformed"),
    "a filter that the plan does not have": (
        tracing(methods=ALL),
        {"method": "trak", "any_label": True},
        "query.filters",
    ),
    "an unknown contributor": (OPEN, {"method": "trak", "contributors": ("delta",)}, "party.unknown"),
    "who may only predict": (OPEN, {"method": "trak", "user": "pat"}, "user.may-not"),
    "more than the budget": (OPEN, {"method": "trak", "budget": 5}, "user.budget-spent"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_plan_does_not_have_is_refused_and_costs_nothing(what: str) -> None:
    change, question, code = REFUSED[what]
    world = linked(change=change, epochs=1, budget=question.get("budget", 100))
    kind, more = question.get("kind", "trace"), {k: v for k, v in question.items() if k not in {"kind", "budget"}}
    asked = world.question(kind, INPUTS, **more)
    world.refused(m.Query(asked.user, asked.envelope), code)
    assert (world.run.spent, world.run.evidence) == ({}, None)
    assert [event.kind for event in world.chain()][-1] == "link"


def test_the_pace_is_that_of_traces() -> None:
    def slow(plan: Plan) -> Plan:
        users = tuple(msgspec.structs.replace(user, per_hour=8) for user in plan.users)
        return msgspec.structs.replace(OPEN(plan), users=users)

    world = linked(change=slow, epochs=1)
    assert len(traced(world, method="gradient")) == 6
    asked = world.question("trace", INPUTS, method="gradient")
    world.refused(m.Query("una", asked.envelope), "user.too-fast")
    assert world.run.spent == {"una": 6}


def test_the_chain_notes_a_trace_whatever_its_method() -> None:
    world = linked(epochs=1)
    traced(world, method="trak")
    body = world.chain()[-1].body
    assert (body["user"], body["kind"], body["inputs"], set(body)) == (
        "una",
        "trace",
        6,
        {"user", "kind", "inputs", "model", "answer"},
    )


# --- what is kept for them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [msgspec.UNSET, ("fingerprint",)])
def test_nothing_is_kept_for_a_plan_without_second_opinions(methods: Any) -> None:
    assert linked(change=tracing(methods=methods), epochs=1).run.outputs is None


def test_little_is_kept_of_each_record_and_it_tells_how_sure_the_model_is() -> None:
    world = World(epochs=1, change=OPEN).run_to(State.HUNTED)
    passed = present(world.run.passed)
    passed.probabilities[0] = torch.tensor([1 - 1e-5, 1e-5, 0])
    expected = passed.probabilities.clone()
    world.run_to(State.LINKED)
    kept = present(world.run.outputs)
    assert sum(x.numel() * x.element_size() for x in (kept.lengths, kept.logarithms)) == 27 * (4 + 2 * 3)
    found = kept.logarithms.float().exp()
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-6)
    assert float(1 - found[0, 0]) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("room", [0, -1])
def test_a_run_that_is_too_large_gives_no_second_opinions(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opinion, "MOST_BYTES", 36 * (4 * 16 + 4 + 2 * 3) + room)
    world = linked(epochs=1)
    if room == 0:
        assert len(traced(world, method="trak")) == 6
        return
    asked = world.question("trace", INPUTS, method="trak")
    world.refused(m.Query("una", asked.envelope), "opinion.too-large")
    assert world.run.spent == {}
    assert len(traced(world)) == 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_a_named_error(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    world = linked(epochs=1)
    with monkeypatch.context() as patch:
        scripted(patch, lambda n: torch.ones(n).index_fill(0, torch.tensor([n - 1]), value))
        failed(world, "opinion.not-computable", method="trak")
    present(world.run.evidence).opinions.clear()
    traced(world, method="trak")


def test_a_method_that_fails_is_a_named_error_and_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_records: Records) -> Attribution:
        raise RuntimeError("not positive definite")

    world = linked(epochs=1)
    with monkeypatch.context() as patch:
        patch.setitem(opinion._MADE, "trak", fails)
        failed(world, "opinion.not-computable", method="trak")
    traced(world, method="trak")


def test_features_of_a_record_whose_length_overflows_cost_nobody_the_model_or_a_trace() -> None:
    world = World(epochs=1, budget=100, change=OPEN).run_to(State.HUNTED)
    present(world.run.passed).lengths[3] = torch.inf
    world.run_to(State.LINKED)
    failed(world, "opinion.not-computable", method="gradient")
    failed(world, "opinion.not-computable", method="trak")
    assert len(traced(world)) == 6
