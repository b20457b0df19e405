"""The audit's chance: a single cheat is found as often as the rate says, and the host cannot tell before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.enclave.audit import Audit, Crossing
from caltrain.enclave.run import State, present
from caltrain.training.zone import At
from support.recovery import ends_as_if_undisturbed, planned
from support.tampering import one_element, tamper
from support.wire import Crossing as Crossed
from support.world import World

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
DRAWS = 400


def drawing(world: World, draw: Callable[[], float]) -> World:
    present(world.run.audit).draw = draw
    return world


def found(rate: float, cheat: int, *, runs: int, seed: int) -> bool:
    """Whether a cheat in one short run is among the repeated ones."""
    audit, repeated = Audit(rate, 1, draw=random.Random(seed).random), []
    for number in range(runs):
        audit.note(Crossing(At(0, number, runs), (), ()))
        repeated += [crossing.at.step for crossing in audit.end()]
    assert (audit.runs, audit.audited) == (runs, len(repeated))
    return cheat in repeated


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_a_single_cheat_is_among_the_repeated_steps_as_often_as_the_rate_says(rate: float) -> None:
    share = sum(found(rate, seed % 7, runs=7, seed=seed) for seed in range(DRAWS)) / DRAWS
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / DRAWS)


@pytest.mark.parametrize(("rate", "all_or_none"), [(0.0, False), (1.0, True)])
def test_at_the_ends_of_the_scale_none_or_all_are_repeated(rate: float, all_or_none: bool) -> None:
    assert {found(rate, 0, runs=3, seed=seed) for seed in range(50)} == {all_or_none}


def test_the_draws_of_a_run_are_the_operating_systems() -> None:
    draw = Audit(0.5, 1).draw
    assert isinstance(getattr(draw, "__self__", None), random.SystemRandom)


@FORMS
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_in_a_real_run_a_cheat_is_found_if_and_only_if_its_run_was_drawn(head: int, rate: float) -> None:
    outcomes = []
    for seed in range(8):
        world = World(head=head, epochs=1, change=planned(rate=rate, length=1)).run_to(State.READY)
        drawing(world, random.Random(seed).random)
        tamper(world, "ir-grad", one_element(), step=seed % 3)
        drawn = [random.Random(seed)] * 3
        chosen = [rng.random() < rate for rng in drawn][seed % 3]
        reply = world.send(m.Train(0))
        outcomes.append(isinstance(reply, m.Failed))
        assert outcomes[-1] is chosen
        if isinstance(reply, m.Failed):
            assert reply.error["code"] == "audit.other-result"
    assert set(outcomes) == {True, False}


@FORMS
def test_a_cheat_in_a_run_that_is_not_repeated_passes_and_shows_in_the_weights(head: int) -> None:
    world = drawing(World(head=head, change=planned(rate=0.5)).run_to(State.READY), lambda: 0.9)
    ends_as_if_undisturbed(world)
    cheated = drawing(World(head=head, change=planned(rate=0.5)).run_to(State.READY), lambda: 0.9)
    tamper(cheated, "ir-grad", one_element(1.0))
    with pytest.raises(AssertionError):
        ends_as_if_undisturbed(cheated)
    assert [e.body for e in cheated.chain() if e.kind == "audit"][-1] == {"rate": 0.5, "runs": 4, "repeated": 0}


def seen(crossing: Crossed) -> object:
    """What the host sees of one thing that came out, without names that differ in every run."""
    if crossing.head is not None:
        head = crossing.head
        return (head.role, head.epoch, head.step, head.parts, [x.tolist() for x in crossing.tensors])
    if isinstance(crossing.message, m.Write):
        return (crossing.message.name, crossing.message.offset, len(crossing.message.data))
    return crossing.message


@FORMS
@pytest.mark.parametrize("run", [0, 1])
def test_up_to_its_commitment_a_host_cannot_tell_whether_a_run_is_repeated(head: int, run: int) -> None:
    logs = []
    for chosen in (False, True):
        world = World(head=head, change=planned(rate=0.5)).run_to(State.READY)
        world.host.log.clear()
        draws = iter([0.9, 0.9])
        drawing(world, lambda draws=draws, chosen=chosen: 0.1 if next(draws) and chosen else 0.9)  # type: ignore[misc]
        if run:  # only the second short run differs
            order = iter([0.9, 0.1 if chosen else 0.9])
            drawing(world, order.__next__)
        world.train()
        logs.append([seen(c) for c in world.host.log if c.way == "out"])
    plain, repeated = logs
    shown = next(i for i, what in enumerate(repeated) if isinstance(what, m.ShowCenter))
    assert repeated[:shown] == plain[:shown]
    assert repeated[shown - 1] == (m.CommitCenter(0, 2) if run == 0 else m.CommitCenter(1, 0, durable=True))
    assert not [what for what in plain if isinstance(what, m.ShowCenter)]


@FORMS
def test_what_a_run_kept_for_the_audit_is_what_crossed(head: int) -> None:
    world = World(head=head, epochs=1, change=planned(rate=1.0, length=3)).run_to(State.READY)
    audit = present(world.run.audit)
    kept: list[Crossing] = []
    end = audit.end

    def keeping() -> Sequence[Crossing]:
        crossed = end()
        kept.extend(crossed)
        return crossed

    setattr(audit, "end", keeping)  # noqa: B010  # a type checker lets nobody replace a method
    world.train()
    assert len(kept) == 3
    out = [(c.head.step, c.head.role, c.tensors) for c in world.host.log if c.head is not None]
    for step, crossing in enumerate(kept):
        assert crossing.at == At(0, step, 3)
        sent = {role: tensors for at, role, tensors in out if at == step}
        assert all(torch.equal(a, b) for a, b in zip(crossing.ir, sent["ir"], strict=True))
        if head:
            assert all(torch.equal(a, b) for a, b in zip(crossing.out_grad, sent["center-grad"], strict=True))
        else:
            assert torch.equal(present(crossing.labels), sent["labels"][0])
    assert not audit.crossed


@FORMS
def test_what_crossed_is_kept_whether_it_will_be_repeated_or_not(head: int) -> None:
    """Memory that grows for chosen runs only would tell the host in the middle of one."""
    sizes = []
    for draw in (0.0, 0.99):
        world = World(head=head, epochs=1, change=planned(rate=0.5, length=3)).run_to(State.READY)
        held: list[int] = []
        audit = present(drawing(world, lambda draw=draw: draw).run.audit)  # type: ignore[misc]
        commit = world.host.commit

        def noting(
            call: m.CommitCenter, audit: Audit = audit, held: list[int] = held, commit: Any = commit
        ) -> m.Answer:
            held.append(len(audit.crossed))
            answer: m.Answer = commit(call)
            return answer

        world.host.on_commit = noting
        world.train()
        sizes.append(held)
    assert sizes[0] == sizes[1]
    assert max(sizes[0]) == 3
