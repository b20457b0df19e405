"""`weights_identical` compares what the enclave and its host trained with the independent plain loop.

It must be true for the same run, and become false when one thing of the run is flipped: a pixel of one record, one
draw, one element of one gradient, a byte of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from caltrain.boundary.tensors import Role
from caltrain.demo.evaluate import same_weights
from caltrain.enclave.run import State
from caltrain.models.weights import state_of
from caltrain.training import plain
from caltrain.training.batches import augment
from caltrain.training.seeds import Draws, RunSeeds
from caltrain.training.spec import Augment
from support.world import World

Weights = dict[str, Tensor]
FORMS = {"two-way": 0, "ternary": 2}


def protected(world: World) -> Weights:
    """The joined model of a run through enclave, door and host."""
    world.run_to(State.RELEASED)
    assert world.run.model is not None
    return state_of(world.run.model)


def plainly(world: World, *, pixels: Tensor | None = None, seed: bytes | None = None) -> Weights:
    """The model of the plain loop on the same records and run seed, with what is given in their place."""
    own_pixels, labels = world.data()
    plan, seeds = world.plan, RunSeeds.from_run_seed(world.run.seed if seed is None else seed)
    model = plain.train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=own_pixels if pixels is None else pixels,
        labels=labels,
        seeds=seeds,
    )
    return state_of(model)


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest) -> tuple[World, Weights]:
    """A finished run in either form."""
    world = World(head=FORMS[request.param])
    return world, protected(world)


def test_the_same_records_and_draws_give_the_same_weights(trained: tuple[World, Weights]) -> None:
    world, ours = trained
    assert same_weights(ours, plainly(world))


@pytest.mark.parametrize("record", [0, 13, 26])
def test_one_pixel_of_one_record_makes_another_model(record: int, trained: tuple[World, Weights]) -> None:
    world, ours = trained
    pixels, _ = world.data()
    pixels[record, 0, 2, 2] ^= 0x80
    assert not same_weights(ours, plainly(world, pixels=pixels))


@pytest.mark.parametrize("byte", [0, 31])
def test_one_bit_of_the_run_seed_makes_another_model(byte: int, trained: tuple[World, Weights]) -> None:
    world, ours = trained
    seed = bytearray(world.run.seed)
    seed[byte] ^= 1
    assert not same_weights(ours, plainly(world, seed=bytes(seed)))


@pytest.mark.parametrize("name", ["front", "center", "head", "order", "augment"])
def test_one_bit_of_any_sub_seed_that_is_used_makes_another_model(
    name: str, trained: tuple[World, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ours = trained
    honest = RunSeeds.from_run_seed

    def flipped(seed: bytes) -> RunSeeds:
        seeds = {field: getattr(honest(seed), field) for field in ("front", "center", "head", "order", "augment")}
        return RunSeeds(**seeds | {name: bytes([seeds[name][0] ^ 1]) + seeds[name][1:]})

    monkeypatch.setattr(RunSeeds, "from_run_seed", flipped)
    unused = name == "head" and not world.plan.partition.head  # the two-way form has no HeadNet
    assert same_weights(ours, plainly(world)) is unused


def test_one_draw_of_one_step_makes_another_model(
    trained: tuple[World, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ours = trained
    changed: list[int] = []

    def other_shift(pixels: Tensor, spec: Augment, draws: Draws, *, size: tuple[int, int] | None = None) -> Tensor:
        out = augment(pixels, spec, draws, size=size)
        if (draws.epoch, draws.step) == (1, 1):
            changed.append(1)
            out = torch.cat([out[:1].roll(1, dims=3), out[1:]])
        return out

    monkeypatch.setattr(plain, "augment", other_shift)
    assert not same_weights(ours, plainly(world))
    assert changed == [1]


def flip_once(world: World, role: Role) -> Callable[[], int]:
    """Have the host change one element of the first tensor of that role that it sends; returns how often it did."""
    send, flips = world.host.channel.send_tensors, 0

    def sends(tensors: Sequence[Tensor], *, role: Role, run: str, epoch: int, step: int) -> None:
        nonlocal flips
        if role == wanted and not flips:
            flips += 1
            (first, *others) = tensors
            first = first.clone(memory_format=torch.preserve_format)
            first[torch.unravel_index(first.abs().argmax(), first.shape)] *= -1
            tensors = [first, *others]
        send(tensors, role=role, run=run, epoch=epoch, step=step)

    wanted: Role = role
    world.host.channel.send_tensors = sends  # type: ignore[method-assign]
    return lambda: flips


@pytest.mark.parametrize("form", FORMS)
def test_one_element_of_one_gradient_makes_another_model(form: str) -> None:
    world = World(head=FORMS[form])
    flips = flip_once(world, "ir-grad")
    ours = protected(world)
    assert flips() == 1
    assert not same_weights(ours, plainly(world))


def test_a_run_that_was_not_disturbed_by_the_same_means_is_the_same() -> None:
    world = World()
    flips = flip_once(world, "labels")  # the host never sends labels
    ours = protected(world)
    assert flips() == 0
    assert same_weights(ours, plainly(world))
