"""The cut is judged before an epoch: by figures measured inside, by the parties' votes, and nothing leaves before."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.sealed import ReleasedPart, open_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.enclave.run import State, present
from caltrain.exposure.inside import Figures, measure_inside
from caltrain.exposure.policy import Bound, Policy
from caltrain.exposure.subject import Subject
from caltrain.models.weights import decode_state, model_digest
from caltrain.plan import ExposureSpec, Plan, possible_cuts
from caltrain.provenance.statements import AssessedModel
from support.recovery import DEEP, ends_as_if_undisturbed, planned
from support.world import World

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
ATTACK = Bound(measure="ssim", at_most=0.3)
LOOSE = Bound(measure="channel_correlation", at_most=1.0)
STRICT = Bound(measure="channel_correlation", at_most=0.0)


def judged(*bounds: Bound, every: int = 1, rate: float = 0.0, head: int = 2, held_out: int = 1) -> World:
    """A run with a policy for the cut, taken in, before its first epoch."""

    def change(plan: Plan) -> Plan:
        spec = ExposureSpec(policy=Policy(bounds=bounds), every=every, sample=8)
        return msgspec.structs.replace(planned(model=DEEP, rate=rate)(plan), exposure=spec)

    return World(change=change, head=head, epochs=4, held_out=held_out).run_to(State.READY)


def called(world: World) -> m.Done:
    """The run waits for the parties' votes."""
    done = world.done(m.Assess())
    assert done.signed is not None
    world.statements["assessed-model"] = done.signed
    return done


# --- what is due --------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_votes_deepen_the_cut_twice_and_the_bits_stay_as_they_are(head: int, rate: float) -> None:
    world = judged(ATTACK, head=head, rate=rate)
    world.wants = {("beta", 1): 3, ("alpha", 3): 5, ("gamma", 3): 4}
    ends_as_if_undisturbed(world, cuts={1: 3, 2: 3, 3: 5})
    cuts = [event.body for event in world.chain() if event.kind == "cut"]
    assert cuts == [{"epoch": 1, "before": 2, "front": 3}, {"epoch": 3, "before": 3, "front": 5}]


def test_a_vote_deepens_the_cut_before_the_first_epoch() -> None:
    world = judged(ATTACK)
    world.wants = {("beta", 0): 4}
    ends_as_if_undisturbed(world, cuts=dict.fromkeys(range(4), 4))


def test_figures_that_need_no_attack_decide_inside_without_votes() -> None:
    world = judged(LOOSE)
    done = world.assess()
    assert (done.due, done.sealed, world.run.state) == (2, {}, State.READY)
    signed = world.statement("assessed-model", AssessedModel)
    assert set(signed.figures) == {2, 3, 4, 5}
    assert all(0 < table["channel_correlation"].value <= 1 for table in signed.figures.values())
    assert (signed.front, signed.epoch, signed.sample, signed.simulated) == (2, 0, 8, True)
    named = [event.body for event in world.chain() if event.kind == "assess"][-1]
    assert named["statement"] == digest("assessed-model/v1", canonical_json(signed))
    world.done(m.Train(0, 0))


def test_kl_is_measured_inside_by_the_model_itself() -> None:
    world = judged(Bound(measure="kl_ratio", at_least=0.0))
    world.assess()
    figures = world.statement("assessed-model", AssessedModel).figures
    assert all(set(table) == {"kl_ratio"} for table in figures.values())


@pytest.mark.parametrize("held_out", [0, 1, 3], ids=["none", "too few", "enough"])
def test_the_sample_is_held_out_or_of_the_pool(held_out: int) -> None:
    world = judged(LOOSE, held_out=held_out)
    read = len(world.host.log)
    world.assess()
    assert world.statement("assessed-model", AssessedModel).sample == 8
    names = {c.message.name for c in world.host.log[read:] if isinstance(c.message, m.Read)}
    assert any(name.startswith("held-out") for name in names) == (held_out == 3)


def test_nobody_chooses_the_sample_and_reading_it_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    world = judged(LOOSE, held_out=0)
    samples, reads = [], []

    def seen(subject: Subject, cuts: tuple[int, ...], pictures: Tensor, **asked: Any) -> dict[int, Figures]:
        samples.append(pictures)
        return measure_inside(subject, cuts, pictures, **asked)

    monkeypatch.setattr("caltrain.enclave.assess.measure_inside", seen)
    for _ in range(2):
        world.run.assessment, before = None, len(world.host.log)
        world.assess()
        reads.append([c.message for c in world.host.log[before:] if isinstance(c.message, m.Read)])
    assert any(read.name.startswith("pool") for read in reads[0])
    assert reads[0] == reads[1]
    assert not torch.equal(samples[0], samples[1])
    assert len(torch.unique(samples[0], dim=0)) == 8


def test_where_the_figures_allow_no_cut_nobody_votes_and_nobody_gets_the_model() -> None:
    done = judged(STRICT, ATTACK).done(m.Assess())
    assert (done.due, done.sealed) == (0, {})


def test_only_every_second_epoch_is_judged_where_the_plan_says_so() -> None:
    world = judged(ATTACK, every=2)
    world.run_to(State.TRAINED)
    assert [event.body["epoch"] for event in world.chain() if event.kind == "assess"] == [0, 2]


def test_the_parties_get_the_semi_trained_model_of_the_statement() -> None:
    world = judged(ATTACK)
    world.train()
    done = called(world)
    signed = world.statement("assessed-model", AssessedModel)
    center = decode_state(world.host.the_center.weights(), step="test")
    for name, party in world.parties.items():
        part = open_for(
            party.data_key, "semi-trained/v1", done.sealed[name], ReleasedPart, context=signed.run, step="test"
        )
        joined = decode_state(part.weights, step="test") | center
        assert part.model == signed.model == model_digest(world.plan.model, joined)
        assert part.run_seed == b""


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_epoch_whose_cut_was_not_judged_does_not_begin() -> None:
    world = judged(ATTACK)
    world.refused(m.Train(0, 0), "exposure.not-assessed")


def test_the_judgement_of_one_epoch_is_not_that_of_the_next() -> None:
    world = judged(ATTACK)
    world.train()
    world.refused(m.Train(1, 0), "exposure.not-assessed")


def test_a_run_does_not_train_while_votes_are_due() -> None:
    world = judged(ATTACK)
    world.done(m.Assess())
    world.refused(m.Train(0, 0), "session.not-now", fatal=False)


def test_a_cut_that_the_figures_do_not_allow_ends_the_run_before_anything_leaves() -> None:
    world = judged(STRICT)
    assert world.assess().due == 0
    error = world.refused(m.Train(0, 0), "exposure.no-cut")
    assert "the enclave's own figures" in error["what"]


def test_one_party_that_accepts_no_cut_ends_the_run() -> None:
    world = judged(ATTACK)
    world.wants = {("gamma", 0): 0, ("alpha", 0): 5}
    assert world.assess().due == 0
    assert "votes of gamma" in world.refused(m.Train(0, 0), "exposure.no-cut")["what"]


def test_a_cut_shallower_than_what_was_voted_is_refused() -> None:
    world = judged(ATTACK)
    world.wants = {("gamma", 0): 4}
    assert world.assess().due == 4
    world.done(m.MoveCut(3))
    world.host.the_center.recut(3, {})
    world.refused(m.Train(0, 0), "train.too-shallow")


def test_a_model_is_judged_once_and_only_between_epochs() -> None:
    world = judged(LOOSE)
    world.assess()
    world.refused(m.Assess(), "assess.not-now")


def test_a_model_is_not_judged_in_the_middle_of_an_epoch() -> None:
    def change(plan: Plan) -> Plan:
        spec = ExposureSpec(policy=Policy(bounds=(LOOSE,)), sample=8)
        return msgspec.structs.replace(planned(model=DEEP, steps=1)(plan), exposure=spec)

    world = World(change=change).run_to(State.READY)
    world.train()
    assert (world.course.epoch, world.course.step) == (0, 1)
    world.run.assessment = None
    world.refused(m.Assess(), "assess.not-now")


def test_a_model_is_not_judged_more_often_than_the_plan_says() -> None:
    """Each judgement gives the FrontNet to every party, and so to a host that one of them is in league with."""
    world = judged(ATTACK, every=2)
    world.train()
    world.refused(m.Assess(), "assess.not-now")
    assert set(world.semi_trained) == {"alpha", "beta", "gamma"}


def test_a_run_without_a_policy_has_nothing_to_judge() -> None:
    World(change=planned(model=DEEP)).run_to(State.READY).refused(m.Assess(), "assess.not-now")


def test_without_a_judgement_the_first_cut_cannot_be_moved() -> None:
    judged(ATTACK).refused(m.MoveCut(3), "cut.not-now")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": digest("test/v1", b"other")},
        {"epoch": 1},
        {"run": "0" * 32},
        {"party": "beta"},
    ],
    ids=["model", "epoch", "run", "party"],
)
def test_a_vote_on_anything_else_is_refused_and_counts_for_nothing(changes: dict[str, object]) -> None:
    world = judged(ATTACK)
    called(world)
    world.refused(world.vote("alpha", **changes), "vote.not-this")


def test_a_second_vote_is_refused() -> None:
    world = judged(ATTACK)
    called(world)
    world.done(world.vote("alpha"))
    world.refused(world.vote("alpha", front=3), "vote.not-this")
    assert present(world.run.assessment).votes == {"alpha": 2}


@pytest.mark.parametrize("front", [1, 6, 8])
def test_a_vote_for_a_cut_that_the_plan_cannot_have_is_refused(front: int) -> None:
    world = judged(ATTACK)
    called(world)
    world.refused(world.vote("alpha", front=front), "vote.no-such-cut")


def test_a_vote_in_another_partys_name_is_refused() -> None:
    world = judged(ATTACK)
    called(world)
    forged = m.Vote("alpha", world.vote("beta").envelope)
    world.refused(forged, "signature.invalid")


def test_a_run_that_is_taken_up_between_epochs_is_judged_again() -> None:
    world = judged(ATTACK)
    world.train()
    world.wants = {("beta", 1): 3}
    world.assess()
    world.take_up()
    world.refused(m.Train(1, 0), "exposure.not-assessed")


def test_a_run_that_was_taken_up_ends_as_if_nothing_had_been() -> None:
    world = judged(ATTACK)
    world.wants = {("beta", 1): 3}
    world.train()
    world.assess()
    world.take_up()
    ends_as_if_undisturbed(world, cuts={1: 3, 2: 3, 3: 3})


def test_possible_cuts_are_those_of_the_plan_from_here_on() -> None:
    plan = judged(ATTACK).plan
    assert possible_cuts(plan, 2) == (2, 3, 4, 5)
    assert possible_cuts(plan, 4) == (4, 5)
