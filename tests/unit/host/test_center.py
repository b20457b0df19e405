"""The CenterNet outside: what it answers to each tensor, and that it answers nothing to what has no place."""

from __future__ import annotations

import socket
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import ANSWERS
from caltrain.boundary.tensors import Role, TensorHead, head_of
from caltrain.crypto.digests import to_raw
from caltrain.errors import ProtocolError
from caltrain.host.center import Center
from caltrain.models.network import build, set_draws, zone_ranges
from caltrain.models.weights import decode_state, model_digest, state_of
from caltrain.plan import Plan
from caltrain.training.seeds import Draws, initialise
from support.wire import MemorySocket, memory_socketpair
from support.world import World

SEED, RUN, RECORDS = bytes(range(32)), "ab" * 16, 27
IR = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
GRAD = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(2))


class Bench:
    """A center, and the enclave's end of its channel."""

    def __init__(self, head: int, *, seed: bytes = SEED) -> None:
        self.plan: Plan = World(head=head).plan
        self.center = Center(self.plan, seed=seed, records=RECORDS)
        self.end: MemorySocket
        ours, self.end = memory_socketpair()
        self.host, self.enclave = (Channel(cast(socket.socket, end)) for end in (ours, self.end))

    def take(self, role: Role, tensor: Tensor, *, epoch: int = 1, step: int = 2) -> list[tuple[TensorHead, Tensor]]:
        """Hand it one tensor; what it sent back."""
        head = head_of(tensor, role=role, run=RUN, epoch=epoch, step=step, slot=None)
        self.center.take(head, tensor, self.host)
        sent = []
        while self.end.inbox:
            got = self.enclave.receive_any(ANSWERS)
            assert isinstance(got, tuple)
            sent.append(got)
        return sent

    def refuses(self, role: Role, tensor: Tensor) -> None:
        """It raises and sends nothing, and its weights are as they were."""
        before = self.center.commitment()
        with pytest.raises(ProtocolError) as raised:
            self.take(role, tensor)
        assert raised.value.code == "tensor.malformed"
        assert not self.end.inbox
        assert self.center.commitment() == before

    def reference(self) -> tuple[torch.nn.Sequential, Tensor, Tensor]:
        """The same layers in plain torch, the IR as a leaf, and its output."""
        zone = build(
            self.plan.model,
            input_shape=self.plan.data.shape,
            layers=zone_ranges(self.plan.model, self.plan.partition)[1],
        )
        initialise(zone, SEED)
        set_draws(zone, Draws(SEED, 1, 2))
        leaf = IR.clone().requires_grad_()
        return zone, leaf, zone(leaf)


def places(sent: list[tuple[TensorHead, Tensor]]) -> list[tuple[str, str, int, int]]:
    return [(head.role, head.run, head.epoch, head.step) for head, _ in sent]


def test_two_way_it_answers_labels_with_the_loss_and_the_gradient_of_the_ir() -> None:
    bench = Bench(head=0)
    assert bench.take("ir", IR) == []
    sent = bench.take("labels", LABELS)
    assert places(sent) == [("loss", RUN, 1, 2), ("ir-grad", RUN, 1, 2)]
    _, leaf, out = bench.reference()
    loss = F.cross_entropy(out, LABELS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(sent[0][1], loss.detach()[None])
    torch.testing.assert_close(sent[1][1], leaf.grad)


def test_ternary_it_answers_the_ir_with_its_output_and_a_gradient_with_a_gradient() -> None:
    bench = Bench(head=2)
    forward = bench.take("ir", IR)
    backward = bench.take("center-grad", GRAD)
    assert places(forward + backward) == [("center-out", RUN, 1, 2), ("ir-grad", RUN, 1, 2)]
    _, leaf, out = bench.reference()
    out.backward(GRAD)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(forward[0][1], out.detach())
    torch.testing.assert_close(backward[0][1], leaf.grad)


@pytest.mark.parametrize(
    ("head", "role"),
    [
        *((0, role) for role in ("center-grad", "center-out", "ir-grad", "loss")),
        *((2, role) for role in ("labels", "center-out", "ir-grad", "loss")),
    ],
)
def test_a_tensor_that_has_no_place_in_the_form_is_refused(head: int, role: Role) -> None:
    bench = Bench(head=head)
    bench.take("ir", IR)
    bench.refuses(role, LABELS if role == "labels" else GRAD)


@pytest.mark.parametrize(("head", "role", "tensor"), [(0, "labels", LABELS), (2, "center-grad", GRAD)])
def test_a_backward_pass_needs_its_own_forward_pass(head: int, role: Role, tensor: Tensor) -> None:
    bench = Bench(head=head)
    bench.refuses(role, tensor)
    bench.take("ir", IR)
    assert bench.take(role, tensor)
    bench.refuses(role, tensor)


@pytest.mark.parametrize(("head", "role", "tensor"), [(0, "labels", LABELS), (2, "center-grad", GRAD)])
def test_its_commitment_is_of_the_weights_that_it_would_hand_over(head: int, role: Role, tensor: Tensor) -> None:
    bench = Bench(head=head)
    commitments = [bench.center.commitment()]
    bench.take("ir", IR)
    bench.take(role, tensor)
    commitments.append(bench.center.commitment())
    assert commitments[0] != commitments[1]
    handed_over = decode_state(bench.center.weights(), step="test")
    assert to_raw(model_digest(bench.plan.model, handed_over)) == commitments[1]


def test_its_first_weights_are_those_of_its_seed() -> None:
    bench = Bench(head=2)
    zone, _, _ = bench.reference()
    first = decode_state(bench.center.weights(), step="test")
    assert all(torch.equal(value, first[name]) for name, value in state_of(zone).items())
    assert first.keys() == state_of(zone).keys()
    assert Bench(head=2, seed=bytes(32)).center.commitment() != bench.center.commitment()


def test_it_computes_with_the_plans_number_of_threads() -> None:
    torch.set_num_threads(2)
    Bench(head=2)
    assert torch.get_num_threads() == 1
