"""A host that gives another CenterNet before the release, and a model that must not leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.enclave.run import State, present
from caltrain.models.weights import decode_state, encode_state, state_of
from support.recovery import recovers
from support.tampering import commits_to, shows
from support.world import World

Weights = dict[str, torch.Tensor]


def refused(world: World, code: str) -> None:
    """The hunt stops, and there is no model; from the last checkpoint the run can still be hunted and released."""
    world.refused(m.Hunt(), code)
    assert world.run.model is None
    assert world.run.model_digest == ""
    recovers(world)


def nudged(raw: bytes) -> bytes:
    state = decode_state(raw, step="test")
    state["2.conv.bias"][0] += 1e-6
    return encode_state(state)


def test_a_center_that_was_changed_after_the_last_epoch_is_refused() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    world.host.the_center.zone.module.get_parameter("2.conv.bias").data[0] += 1e-6
    refused(world, "center.other-state")


def test_a_center_that_is_not_the_one_committed_to_is_refused() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    shows(world, nudged)
    refused(world, "center.other-shown")


def test_the_center_of_an_earlier_epoch_is_refused() -> None:
    world = World().run_to(State.READY)
    world.train()
    earlier = world.host.the_center.committed(1, 0)
    world.train()
    shows(world, lambda _raw: earlier)
    refused(world, "center.other-shown")


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing but zeros": lambda raw: bytes(len(raw)),
    "no header": lambda raw: raw[8:] + bytes(8),
    "a header without end": lambda raw: b"\xff" * 8 + raw[8:],
    "a pickle": lambda raw: b"\x80\x04." + raw[3:],
    "cut short": lambda raw: raw[:-1],
    "empty": lambda _raw: b"",
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_weights_are_refused(name: str) -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    shows(world, BYTES[name])
    refused(world, "weights.malformed")


def test_a_center_larger_than_the_plans_is_not_even_read() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    world.host.on_show = lambda _call: m.Data((1 << 21).to_bytes(8, "big"))
    refused(world, "center.too-large")


@pytest.mark.parametrize("length", [1, 100])
def test_a_center_that_is_not_there_stops_the_run(length: int) -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    world.host.on_show = lambda _call: m.Data(length.to_bytes(8, "big"))
    refused(world, "storage.missing")


def test_a_center_that_ends_before_its_length_stops_the_run() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    shows(world, lambda raw: raw)
    honest = world.host.on_show

    def longer(call: m.ShowCenter) -> m.Answer:
        honest(call)
        return m.Data((len(world.host.storage["center-state"]) + 1).to_bytes(8, "big"))

    world.host.on_show = longer
    refused(world, "storage.short")


def committed_to(change: Callable[[World, Weights], Weights], *, head: int = 2) -> World:
    """A trained world whose host committed to another CenterNet, which it will also show."""
    world = World(head=head, epochs=1).run_to(State.READY)
    commits_to(world, lambda state: change(world, state))
    return world.run_to(State.TRAINED)


def with_value(value: float) -> Callable[[World, Weights], Weights]:
    return lambda _world, state: state | {"2.conv.bias": torch.full((4,), value)}


def with_front(world: World, state: Weights) -> Weights:
    """The CenterNet, and a FrontNet that the host knows."""
    front = state_of(present(world.run.front).module)
    return state | {name: torch.zeros_like(value) for name, value in front.items()}


def with_head(world: World, state: Weights) -> Weights:
    return state | {name: torch.zeros_like(v) for name, v in state_of(present(world.run.head).module).items()}


COMMITTED: dict[str, Callable[[World, Weights], Weights]] = {
    "NaN": with_value(torch.nan),
    "infinity": with_value(torch.inf),
    "a tensor less": lambda _w, state: {n: v for n, v in state.items() if n != "2.conv.weight"},
    "a tensor more": lambda _w, state: state | {"9.conv.bias": torch.zeros(4)},
    "another shape": lambda _w, state: state | {"2.conv.bias": torch.zeros(5)},
    "another type": lambda _w, state: state | {"2.conv.bias": torch.zeros(4, dtype=torch.float64)},
    "a name that is no layer's": lambda _w, state: state | {"evil": torch.zeros(4)},
    "our FrontNet replaced": with_front,
    "our HeadNet replaced": with_head,
}


@pytest.mark.parametrize("name", COMMITTED)
def test_a_center_that_does_not_fit_is_refused_even_where_the_host_committed_to_it(name: str) -> None:
    world = committed_to(COMMITTED[name])
    world.refused(m.Hunt(), "weights.malformed")
    assert world.run.model is None


def test_the_same_way_round_an_honest_center_is_taken() -> None:
    world = committed_to(lambda _world, state: state)
    world.done(m.Hunt())


@pytest.mark.parametrize("zone", ["front", "head"])
def test_inner_weights_that_are_not_finite_are_not_released(zone: str) -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    inner = {"front": world.run.front, "head": world.run.head}[zone]
    next(present(inner).module.parameters()).data[0] = torch.inf
    refused(world, "weights.malformed")


def test_a_finite_center_that_overflows_is_not_released() -> None:
    world = committed_to(lambda _world, state: state | {"2.conv.weight": torch.full((4, 4, 3, 3), 3e38)})
    world.refused(m.Hunt(), "hunt.not-finite")
    assert world.run.passed is None
