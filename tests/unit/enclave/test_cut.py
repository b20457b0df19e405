"""The cut moves between epochs: same bits, deeper at any time, shallower only as every party has signed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.enclave.run import State, present
from caltrain.models.weights import decode_state, encode_state
from caltrain.plan import CutApproval
from caltrain.training.zone import of_layers
from support.recovery import DEEP, ends_as_if_undisturbed, planned, recovers
from support.tampering import commits_to, shows
from support.world import PARTIES, World

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
Weights = dict[str, torch.Tensor]


def deep(head: int = 2, *, epochs: int = 4, rate: float = 0.0, deepen: tuple[tuple[int, int], ...] = ()) -> World:
    """A run after its first epoch."""
    world = World(head=head, epochs=epochs, change=planned(model=DEEP, rate=rate, deepen=deepen)).run_to(State.READY)
    world.train()
    return world


def move(world: World, front: int, approvals: dict[str, Envelope] | None = None) -> None:
    """Move the cut on both sides."""
    before = world.course.front
    done = world.done(m.MoveCut(front, approvals or {}))
    assert (done.front, done.at) == (front, (world.course.epoch, 0))
    moved: Weights = {}
    if front < before:
        raw = bytes(world.host.storage["center-moved"])
        moved = decode_state(raw[8 : 8 + int.from_bytes(raw[:8], "big")], step="test")
    world.host.the_center.recut(front, moved)


def approval(world: World, name: str, cut: int, **changes: object) -> Envelope:
    honest = CutApproval(run=world.run.vault.run, head=world.run.chain.head, party=name, front=cut)
    return world.parties[name].signer.sign("move-cut", msgspec.structs.replace(honest, **changes))


def all_approve(world: World, front: int) -> dict[str, Envelope]:
    return {party: approval(world, party, front) for party in PARTIES}


# --- deeper -------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_cut_that_deepens_by_the_schedule_leaves_the_bits_as_they_are(head: int, rate: float) -> None:
    change = planned(model=DEEP, rate=rate, deepen=((1, 3), (3, 5)))
    world = World(head=head, epochs=4, change=change)
    ends_as_if_undisturbed(world)
    noted = [event.body for event in world.chain() if event.kind == "cut"]
    assert noted == [{"epoch": 1, "before": 2, "front": 3}, {"epoch": 3, "before": 3, "front": 5}]


@FORMS
def test_a_cut_that_the_host_deepens_leaves_the_bits_as_they_are(head: int) -> None:
    world = deep(head)
    move(world, 3)
    world.train()
    move(world, 4)
    move(world, 5)
    ends_as_if_undisturbed(world, cuts={1: 3, 2: 5, 3: 5})


@FORMS
def test_the_layers_come_in_with_what_the_optimiser_remembers_of_them(head: int) -> None:
    world = deep(head)
    before = present(world.run.front).state()
    center = world.host.the_center.zone.state()
    assert {n for n in center if n.startswith("momentum/2.")}
    move(world, 4)
    front = present(world.run.front).state()
    expected = {**before, **of_layers(center, range(2, 4))}
    assert front.keys() == expected.keys()
    assert all(torch.equal(front[name], value) for name, value in expected.items())
    assert of_layers(world.host.the_center.zone.state(), range(4)) == {}


@FORMS
@pytest.mark.parametrize("again", [True, False])
def test_killed_after_the_cut_has_moved_a_run_ends_with_the_same_bits(head: int, again: bool) -> None:
    world = deep(head)
    move(world, 3)
    if not again:
        world.train()
    world.take_up()
    if again:  # the checkpoint is from before; the chain says that the cut must be as deep as it was
        assert world.course.front == 2
        move(world, 3)
    assert world.course.front == 3
    ends_as_if_undisturbed(world, cuts={1: 3, 2: 3, 3: 3})


def test_after_a_restart_training_is_not_taken_up_with_a_shallower_front() -> None:
    world = deep()
    move(world, 4)
    world.take_up()
    assert world.course.front == 2
    world.refused(m.Train(1), "train.too-shallow")


def test_a_restart_does_not_undo_a_deeper_cut_without_every_partys_signature() -> None:
    world = deep()
    move(world, 4)
    world.take_up()
    world.refused(m.MoveCut(3), "cut.not-agreed")
    world.take_up()
    move(world, 3, all_approve(world, 3))
    ends_as_if_undisturbed(world, cuts={1: 3, 2: 3, 3: 3})


# --- refused ------------------------------------------------------------------------------------------------------


def test_the_cut_does_not_move_before_the_first_epoch() -> None:
    world = World(epochs=2, change=planned(model=DEEP)).run_to(State.READY)
    world.refused(m.MoveCut(3), "cut.not-now")
    recovers(world)


def test_the_cut_does_not_move_within_an_epoch() -> None:
    world = World(epochs=2, change=planned(model=DEEP, steps=1)).run_to(State.READY)
    for _ in range(4):
        world.train()
    world.refused(m.MoveCut(3), "cut.not-now")
    recovers(world)


@pytest.mark.parametrize(
    ("front", "code"),
    [
        (2, "cut.not-now"),
        (6, "model.partition"),
        (7, "model.partition"),
        (500, "model.partition"),
        (0, "model.cut-at-input"),
    ],
    ids=["the same", "no CenterNet", "into the HeadNet", "beyond the end", "the records themselves"],
)
def test_a_cut_that_leaves_no_three_zones_is_refused(front: int, code: str) -> None:
    world = deep()
    before = world.run.front
    world.refused(m.MoveCut(front, all_approve(world, front)), code)
    assert world.run.front is before
    assert "center-moved" not in world.host.storage
    recovers(world)


def test_a_center_without_weights_is_no_center() -> None:
    world = World(epochs=2).run_to(State.READY)  # its center is a convolution and a dropout
    world.train()
    world.refused(m.MoveCut(3), "model.partition")
    recovers(world)


def test_an_epoch_with_a_shallower_cut_than_the_schedules_is_refused() -> None:
    world = deep(deepen=((1, 3),))
    sent = len(world.host.out())
    world.refused(m.Train(1), "train.too-shallow")
    assert len(world.host.out()) == sent
    recovers(world)


def test_not_even_all_parties_take_the_cut_above_the_schedule_of_the_plan_that_they_signed() -> None:
    world = deep(deepen=((1, 3),))
    move(world, 4)
    world.refused(m.MoveCut(2, all_approve(world, 2)), "cut.not-now")
    assert "center-moved" not in world.host.storage


def nudged(state: Weights) -> Weights:
    return state | {"2.conv.bias": state["2.conv.bias"] + 1}


def test_a_host_that_shows_another_center_than_it_committed_to_is_refused() -> None:
    world = deep()
    before = world.run.front
    shows(world, lambda raw: encode_state(nudged(decode_state(raw, step="test"))))
    world.refused(m.MoveCut(3), "center.other-shown")
    assert world.run.front is before
    recovers(world)


def test_a_host_that_commits_to_another_center_than_before_is_refused() -> None:
    world = deep()
    commits_to(world, nudged)
    world.refused(m.MoveCut(3), "center.other-state")
    recovers(world)


HOSTILE: dict[str, Callable[[World, Weights], Weights]] = {
    "our FrontNet replaced": lambda w, s: s | {n: v * 0 for n, v in present(w.run.front).state().items()},
    "one layer of our FrontNet": lambda w, s: s | {"0.conv.weight": torch.zeros(4, 1, 3, 3)},
    "our momentum": lambda w, s: s | {"momentum/0.conv.weight": torch.zeros(4, 1, 3, 3)},
    "our HeadNet": lambda w, s: s | {n: v * 0 for n, v in present(w.run.head).state().items()},
    "a name that is no layer's": lambda _w, s: s | {"evil": torch.zeros(1)},
    "a tensor less": lambda _w, s: {n: v for n, v in s.items() if n != "2.conv.bias"},
    "another shape": lambda _w, s: s | {"2.conv.bias": torch.zeros(5)},
    "NaN": lambda _w, s: s | {"2.conv.bias": torch.full((4,), torch.nan)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_host_committed_to_does_not_come_in_where_it_does_not_belong(name: str) -> None:
    """At audit rate 0 a host may commit to whatever it likes, from the first step on."""
    world = World(epochs=2, change=planned(model=DEEP)).run_to(State.READY)
    commits_to(world, lambda state: HOSTILE[name](world, state))
    present(world.run.course).center = b""
    world.train()
    before = present(world.run.front).state()
    frozen = {name: value.clone() for name, value in before.items()}
    commits = [HOSTILE[name](world, dict(world.host.the_center.zone.state()))]
    commits_to(world, lambda _state: commits[0])
    world.course.center = b""
    world.refused(m.MoveCut(3), "weights.malformed")
    after = present(world.run.front).state()
    assert all(torch.equal(after[n], value) for n, value in frozen.items())
    assert world.course.front == 2


# --- shallower ----------------------------------------------------------------------------------------------------


@FORMS
def test_a_cut_that_every_party_lets_rise_leaves_the_bits_as_they_are(head: int) -> None:
    world = deep(head)
    move(world, 5)
    world.train()
    move(world, 3, all_approve(world, 3))
    world.take_up() if head else None
    if head:
        move(world, 3, all_approve(world, 3))
    ends_as_if_undisturbed(world, cuts={1: 5, 2: 3, 3: 3})


def test_only_the_layers_that_were_let_out_come_out() -> None:
    world = deep()
    move(world, 5)
    world.train()
    inside = present(world.run.front).state()
    move(world, 3, all_approve(world, 3))
    raw = bytes(world.host.storage["center-moved"])
    moved = decode_state(raw[8:], step="test")
    expected = of_layers(inside, range(3, 5))
    assert moved.keys() == expected.keys()
    assert all(torch.equal(moved[name], value) for name, value in expected.items())


def without(party: str) -> Callable[[World], dict[str, Envelope]]:
    return lambda w: {p: e for p, e in all_approve(w, 2).items() if p != party}


def forged(party: str) -> Callable[[World], dict[str, Envelope]]:
    def approvals(world: World) -> dict[str, Envelope]:
        due = CutApproval(run=world.run.vault.run, head=world.run.chain.head, party=party, front=2)
        return all_approve(world, 2) | {party: SigningKey().sign("move-cut", due)}

    return approvals


def another(**changes: object) -> Callable[[World], dict[str, Envelope]]:
    return lambda w: all_approve(w, 2) | {"beta": approval(w, "beta", 2, **changes)}


def older_head(world: World) -> dict[str, Envelope]:
    return all_approve(world, 2) | {"beta": approval(world, "beta", 2, head=world.chain_of_host()[-2].digest())}


def in_anothers_name(world: World) -> dict[str, Envelope]:
    approvals = all_approve(world, 2)
    return approvals | {"beta": approvals["alpha"]}


CONSENT: dict[str, tuple[Callable[[World], dict[str, Envelope]], str]] = {
    "nobody": (lambda _w: {}, "cut.not-agreed"),
    **{f"{party} has not signed": (without(party), "cut.not-agreed") for party in PARTIES},
    **{f"{party}'s signature is forged": (forged(party), "signature.invalid") for party in PARTIES},
    "for another cut": (another(front=3), "cut.other-approval"),
    "for another run": (another(run="ab" * 16), "cut.other-approval"),
    "for another place of the chain": (older_head, "cut.other-approval"),
    "of another party": (another(party="alpha"), "cut.other-approval"),
    "signed by another party": (in_anothers_name, "signature.invalid"),
    "the approval of the plan": (
        lambda w: all_approve(w, 2) | {"beta": w.parties["beta"].approve(w.plan)},
        "signature.invalid",
    ),
}


@pytest.mark.parametrize("name", CONSENT)
def test_without_the_signature_of_every_party_nothing_comes_out(name: str) -> None:
    approvals, code = CONSENT[name]
    world = deep()
    move(world, 4)
    world.train()
    world.refused(m.MoveCut(2, approvals(world)), code)
    assert "center-moved" not in world.host.storage
    world.take_up()
    assert world.course.front == 4
    ends_as_if_undisturbed(world, cuts={1: 4, 2: 4, 3: 4})


def test_approvals_that_were_used_do_not_serve_again() -> None:
    world = deep()
    move(world, 4)
    approvals = all_approve(world, 3)
    move(world, 3, approvals)
    move(world, 4)
    world.refused(m.MoveCut(3, approvals), "cut.other-approval")
