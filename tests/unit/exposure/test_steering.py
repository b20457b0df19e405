"""A host that steers: what it knows, how loud it is, what it gains, and that the audit catches it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.tensors import TensorHead
from caltrain.enclave.run import State
from caltrain.exposure.attacks.steering import HijackBudget, Hijacker
from caltrain.exposure.measures import ssim
from caltrain.exposure.subject import Live
from caltrain.models.layers import Conv, Flatten, Linear, Shortcut
from caltrain.models.spec import ModelSpec
from caltrain.presets import PRESETS
from caltrain.records.readers import load
from caltrain.records.schema import DataSchema
from caltrain.training.batches import normalise
from caltrain.training.spec import Augment
from caltrain.training.zone import At, Zone
from support.recovery import planned
from support.tampering import Tampering
from support.world import World

DATA = DataSchema(shape=(1, 4, 4), classes=("cat", "dog"), mean=(0.5,), std=(0.25,))
MODEL = ModelSpec(layers=(Conv(filters=16, activation="none"), Flatten(), Linear(units=2)))
STEPS = 60
SHORT = HijackBudget(rehearsal=2, width=4, batch=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int, *, seed: int) -> Tensor:
    """Three numbers say all of one, brightness and a slope down and across, and none is as often low as high."""
    light, down, across = torch.rand((3, count, 1, 1, 1), generator=torch.Generator().manual_seed(seed)) ** 3 - 0.3
    ramp = torch.linspace(-0.5, 0.5, 4)
    found: Tensor = (0.5 + light + down * ramp[:, None] + across * ramp).clamp(0, 1)
    return found


def hijacker(*, spec: ModelSpec = MODEL, budget: HijackBudget = SHORT, max_rms: float = 1e4, seed: int = 3) -> Hijacker:
    public = pictures(200, seed=7)
    return Hijacker(spec, DATA, spec.layers.index(Flatten()), public, budget=budget, max_rms=max_rms, seed=seed)


def crossed(count: int = 4, *, seed: int = 0) -> Live:
    return (torch.randn((count, 16, 4, 4), generator=torch.Generator().manual_seed(seed)),)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# --- what it sends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "bound", "sent"), [(1e-3, 1e4, 1e-3), (50.0, 2.0, 2.0)])
def test_a_gradient_has_the_size_asked_for_and_never_more_than_the_plan_bears(
    asked: float, bound: float, sent: float
) -> None:
    budget = HijackBudget(rms=asked, settle=2, rehearsal=1, width=4, batch=4)
    host, live = hijacker(budget=budget, max_rms=bound), crossed()
    for share in (1, 2 / 3, 1 / 2):
        (grad,) = host.gradients(live)
        assert grad.shape == live[0].shape
        assert grad.dtype == torch.float32
        assert not grad.requires_grad
        assert rms(grad) == pytest.approx(share * sent, rel=1e-3)


def test_several_tensors_that_cross_together_each_get_theirs() -> None:
    layers = (
        Conv(filters=4),
        Conv(filters=4, stride=2),
        Conv(filters=4),
        Shortcut(source=1),
        Flatten(),
        Linear(units=2),
    )
    host = Hijacker(ModelSpec(layers=layers), DATA, 3, pictures(50, seed=1), budget=SHORT, max_rms=1e4, seed=0)
    live = torch.rand(4, 4, 2, 2), torch.rand(4, 4, 2, 2)
    grads = host.gradients(live)
    assert [grad.shape for grad in grads] == [x.shape for x in live]
    assert all(rms(grad) == pytest.approx(SHORT.rms, rel=1e-3) for grad in grads)
    assert host.reconstruct(live).shape == (4, 1, 4, 4)


def test_what_it_sends_follows_from_its_seed_and_what_crossed_alone() -> None:
    """It is given no weight, record or label of the parties, nor does the global stream of random numbers matter."""
    assert list(inspect.signature(Hijacker.gradients).parameters) == ["self", "live"]
    live = crossed()
    before = live[0].clone()
    sent = [hijacker().gradients(live)[0] for _ in range(2)]
    assert torch.equal(*sent)
    assert torch.equal(live[0], before)
    assert not torch.equal(sent[0], hijacker(seed=4).gradients(live)[0])
    assert not torch.equal(sent[0], hijacker().gradients(crossed(seed=1))[0])


def test_pictures_come_back_in_their_shape_and_range_and_the_rehearsal_is_told() -> None:
    told: list[tuple[int, int]] = []
    host = Hijacker(
        MODEL, DATA, 1, pictures(50, seed=1), budget=SHORT, max_rms=1e4, seed=0, on_step=lambda *at: told.append(at)
    )
    found = host.reconstruct((100 * crossed(300)[0],))
    assert found.shape == (300, 1, 4, 4)
    assert (float(found.min()), float(found.max())) >= (0.0, 0.0)
    assert float(found.max()) <= 1.0
    assert told == [(1, 2), (2, 2)]


def test_its_own_pictures_are_varied_as_the_plan_varies_records() -> None:
    plain, varied, again = (
        Hijacker(MODEL, DATA, 1, pictures(50, seed=1), budget=SHORT, max_rms=1e4, seed=0, varied=Augment(shift=shift))
        for shift in (0, 2, 2)
    )
    live = crossed()
    sent = [host.gradients(live)[0] for host in (plain, varied, again)]
    assert not torch.equal(sent[0], sent[1])
    assert torch.equal(sent[1], sent[2])


# --- what it gains --------------------------------------------------------------------------------------------------


def test_a_front_that_is_steered_shows_pictures_and_one_that_is_not_shows_none() -> None:
    preset, split = PRESETS["digits"], load("digits", None, download=False)
    public, theirs = (torch.from_numpy(part.images[:320]).float() / 255 for part in (split.train, split.test))
    budget = HijackBudget(rehearsal=150, width=16)
    host = Hijacker(preset.model, preset.data, 2, public, budget=budget, max_rms=1e4, seed=3)
    training = msgspec.structs.replace(preset.training, schedule="constant")
    front = Zone(preset.model, range(2), input_shape=preset.data.shape, training=training, seed=bytes(32))
    x = normalise(theirs * 255, preset.data, channels_last=True)

    def likeness() -> float:
        return float(ssim(host.reconstruct(front.infer([x])), theirs).mean())

    unsteered = likeness()
    for step in range(STEPS):
        rows = torch.arange(32 * step, 32 * step + 32) % len(x)
        live = front.forward([x[rows]], at=At(0, step, STEPS), needs_input_grad=False)
        front.backward(host.gradients(live), at=At(0, step, STEPS))
    guess = float(ssim(public.mean(0, keepdim=True).expand_as(theirs), theirs).mean())
    assert unsteered < 0.1
    assert likeness() > guess + 0.05


# --- the audit ------------------------------------------------------------------------------------------------------


def steer(world: World) -> list[Tensors]:
    """From now on the host's own gradients come back; returned as they were sent."""
    plan, host, sent = world.plan, world.host, list[Tensors]()
    public = pictures(50, seed=5)
    own = Hijacker(
        plan.model, plan.data, plan.partition.front, public, budget=SHORT, max_rms=plan.center.max_rms, seed=0
    )

    def take(head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        if head.role == "ir":
            sent.append(own.gradients(tensors))
        place = ("ir-grad", head.epoch, head.step)
        host.take(head, tensors, Tampering(channel, place, lambda to, _, at: to.send_tensors(sent[-1], **at)))

    host.on_tensor = take
    return sent


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
@pytest.mark.parametrize("length", [1, 2])
def test_an_audited_host_that_steers_is_caught_in_its_first_short_run_and_nothing_is_released(
    head: int, length: int
) -> None:
    world = World(head=head, change=planned(rate=1.0, length=length)).run_to(State.READY)
    sent = steer(world)
    world.refused(m.Train(0, 0), "audit.other-result")
    assert len(sent) == length
    world.refused(m.Release(), "session.not-now", fatal=False)
    assert world.run.model is None
    assert not world.released


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
def test_without_an_audit_nobody_notices(head: int) -> None:
    """Plain norm bounds do not: the run ends, and the statement says that nothing was audited."""
    world = World(head=head, change=planned(rate=0.0)).run_to(State.READY)
    sent = steer(world)
    world.run_to(State.RELEASED)
    assert len(sent) == 2 * 3
    assert [e.body["audit_rate"] for e in world.chain() if e.kind == "release"] == [0.0]
