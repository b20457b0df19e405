"""Where the CenterNet may compute: what the plan allows and the machine has; bf16 on the CPU gives finite float32."""

from __future__ import annotations

import socket
from typing import cast

import msgspec
import pytest
import torch

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import ANSWERS
from caltrain.boundary.tensors import Role, TensorHead, layout_of
from caltrain.errors import ConfigError
from caltrain.host.center import Center
from caltrain.host.device import Choice, Device
from caltrain.plan import Plan
from caltrain.training.spec import CenterSpec
from support.samples import refused
from support.wire import memory_socketpair
from support.world import World

PLAN = World(head=2).plan
IR = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(1))
GRAD = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(2))
RUN = "ab" * 16


def plan_of(center: CenterSpec) -> Plan:
    """The plan with another word on the center."""
    return msgspec.structs.replace(PLAN, center=center)


ANY, BF16 = CenterSpec(device="any"), CenterSpec(device="any", precision="bf16")


@pytest.mark.parametrize(
    ("choice", "center", "present", "expected"),
    [
        ("auto", CenterSpec(), True, Device("cpu")),
        ("auto", CenterSpec(), False, Device("cpu")),
        ("auto", ANY, True, Device("cuda")),
        ("auto", ANY, False, Device("cpu")),
        ("auto", BF16, True, Device("cuda", bf16=True)),
        ("auto", BF16, False, Device("cpu", bf16=True)),
        ("cpu", ANY, True, Device("cpu")),
        ("cpu", CenterSpec(), True, Device("cpu")),
        ("cpu", BF16, True, Device("cpu", bf16=True)),
        ("cuda", ANY, True, Device("cuda")),
        ("cuda", BF16, True, Device("cuda", bf16=True)),
    ],
)
def test_an_accelerator_is_taken_where_there_is_one_and_the_plan_allows_it(
    monkeypatch: pytest.MonkeyPatch, choice: Choice, center: CenterSpec, present: bool, expected: Device
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert Device.choose(choice, plan_of(center)) == expected


@pytest.mark.parametrize(
    ("center", "present", "code"),
    [
        (CenterSpec(), True, "device.not-allowed"),
        (CenterSpec(), False, "device.not-allowed"),
        (ANY, False, "device.none"),
        (BF16, False, "device.none"),
    ],
)
def test_an_accelerator_that_is_not_there_or_not_allowed_is_refused(
    monkeypatch: pytest.MonkeyPatch, center: CenterSpec, present: bool, code: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    with refused(ConfigError, code):
        Device.choose("cuda", plan_of(center))


class Seat:
    """A center on some device, and the enclave's end of its channel."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self.center = Center(plan, seed=bytes(32), records=27, device=device)
        self.host, self.enclave = (Channel(cast(socket.socket, end)) for end in memory_socketpair())

    def step(self, role: Role, answer: Role, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """What it answers to one tensor."""
        self.center.take(TensorHead(role, RUN, 0, number, (layout_of(tensor),)), (tensor,), self.host)
        got = self.enclave.receive_tensors(role=answer, run=RUN, epoch=0, step=number, or_message=ANSWERS)
        assert isinstance(got, tuple)
        (out,) = got
        return out

    def run(self, steps: int) -> list[torch.Tensor]:
        """Some steps: all that came back."""
        found = []
        for number in range(steps):
            found.append(self.step("ir", "center-out", IR, number))
            found.append(self.step("center-grad", "ir-grad", GRAD, number))
        return [*found, self.step("eval-ir", "eval-out", IR, steps)]


def test_bf16_on_the_cpu_gives_other_bits_that_are_near_and_finite_and_float32() -> None:
    half, full = Seat(plan_of(BF16), Device("cpu", bf16=True)), Seat(plan_of(BF16), Device.cpu())
    for near, exact in zip(half.run(3), full.run(3), strict=True):
        assert near.dtype == torch.float32
        assert bool(near.isfinite().all())
        assert not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, rtol=0.1, atol=0.1)
    weights, exact_weights = (seat.center.zone.state() for seat in (half, full))
    assert {value.dtype for value in weights.values()} == {torch.float32}, "what is stepped stays in full precision"
    for name, value in weights.items():
        assert bool(value.isfinite().all())
        torch.testing.assert_close(value, exact_weights[name], rtol=0.1, atol=0.1)


def test_full_precision_is_untouched_by_mixed_precision_before_it() -> None:
    before = Seat(PLAN, Device.cpu()).run(2)
    Seat(plan_of(BF16), Device("cpu", bf16=True)).run(2)
    assert all(torch.equal(a, b) for a, b in zip(before, Seat(PLAN, Device.cpu()).run(2), strict=True))
