"""The CenterNet outside: what it answers to each tensor, and that it answers nothing to what has no place."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import ANSWERS
from caltrain.boundary.tensors import Role, TensorHead, layout_of
from caltrain.crypto.digests import to_raw
from caltrain.enclave.run import State
from caltrain.errors import EnvironmentFault, IntegrityError, ProtocolError
from caltrain.host.center import Center
from caltrain.models.layers import Conv, Flatten, Linear, Shortcut
from caltrain.models.network import Network, build, lay_out, set_draws
from caltrain.models.spec import Deepen, ModelSpec, Partition, zone_ranges
from caltrain.models.weights import decode_state, model_digest, state_of
from caltrain.plan import Plan
from caltrain.training.plain import train_plain
from caltrain.training.seeds import Draws, RunSeeds, initialise
from caltrain.training.spec import InitialWeights
from caltrain.training.zone import MOMENTUM
from support.samples import refused
from support.wire import MemorySocket, memory_socketpair
from support.world import World

SEED, RUN, RECORDS = bytes(range(32)), "ab" * 16, 27
IR = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
GRAD = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(2))


class Bench:
    """A center, and the enclave's end of its channel."""

    def __init__(self, head: int, *, seed: bytes = SEED, change: Callable[[Plan], Plan] = lambda plan: plan) -> None:
        self.plan: Plan = World(head=head, change=change).plan
        self.center = Center(self.plan, seed=seed, records=RECORDS)
        self.end: MemorySocket
        ours, self.end = memory_socketpair()
        self.host, self.enclave = (Channel(cast(socket.socket, end)) for end in (ours, self.end))

    def take(self, role: Role, *tensors: Tensor, epoch: int = 1, step: int = 2) -> list[tuple[TensorHead, Tensors]]:
        """Hand it tensors that crossed together; what it sent back."""
        head = TensorHead(role, RUN, epoch, step, tuple(map(layout_of, tensors)))
        self.center.take(head, tensors, self.host)
        sent = []
        while self.end.inbox:
            got = self.enclave.receive_any(ANSWERS)
            assert isinstance(got, tuple)
            sent.append(got)
        return sent

    def refuses(self, role: Role, *tensors: Tensor) -> None:
        """It raises and sends nothing, and its weights are as they were."""
        before = self.center.commit(1, 2)
        with pytest.raises(ProtocolError) as raised:
            self.take(role, *tensors)
        assert raised.value.code == "tensor.malformed"
        assert not self.end.inbox
        assert self.center.commit(1, 2) == before

    def reference(self) -> tuple[Network, Tensor, Tensor]:
        """The same layers in plain torch, the IR as a leaf, and its output."""
        zone = build(
            self.plan.model,
            input_shape=self.plan.data.shape,
            layers=zone_ranges(self.plan.model, self.plan.partition)[1],
        )
        initialise(zone, SEED)
        lay_out(zone, channels_last=True)
        set_draws(zone, Draws(SEED, 1, 2))
        leaf = IR.clone().requires_grad_()
        return zone, leaf, zone(leaf)


def places(sent: list[tuple[TensorHead, Tensors]]) -> list[tuple[str, str, int, int]]:
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
    torch.testing.assert_close(sent[0][1], (loss.detach()[None],))
    torch.testing.assert_close(sent[1][1], (leaf.grad,))


def test_ternary_it_answers_the_ir_with_its_output_and_a_gradient_with_a_gradient() -> None:
    bench = Bench(head=2)
    forward = bench.take("ir", IR)
    backward = bench.take("center-grad", GRAD)
    assert places(forward + backward) == [("center-out", RUN, 1, 2), ("ir-grad", RUN, 1, 2)]
    _, leaf, out = bench.reference()
    out.backward(GRAD)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(forward[0][1], (out.detach(),))
    torch.testing.assert_close(backward[0][1], (leaf.grad,))


@pytest.mark.parametrize(
    ("head", "role"),
    [
        *((0, role) for role in ("center-grad", "center-out", "ir-grad", "loss", "eval-out")),
        *((2, role) for role in ("labels", "center-out", "ir-grad", "loss", "eval-out")),
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


@pytest.mark.parametrize(
    ("head", "role", "tensor"),
    [(0, "ir", IR), (2, "ir", IR), (2, "eval-ir", IR), (0, "labels", LABELS), (2, "center-grad", GRAD)],
)
@pytest.mark.parametrize("count", [0, 2])
def test_more_or_fewer_tensors_than_cross_there_are_refused(head: int, role: Role, tensor: Tensor, count: int) -> None:
    bench = Bench(head=head)
    if role in {"labels", "center-grad"}:
        bench.take("ir", IR)
    bench.refuses(role, *[tensor] * count)


def test_a_center_that_is_frozen_sends_gradients_and_stays_as_it_is() -> None:
    initial = InitialWeights(sha256="sha256:" + "0" * 64, frozen=4)

    def frozen(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, initial=initial))

    bench, learning = Bench(head=2, change=frozen), Bench(head=2)
    before = bench.center.commit(0, 0)
    for one in (bench, learning):
        one.take("ir", IR)
    ((head, (grad,)),), _ = bench.take("center-grad", GRAD), learning.take("center-grad", GRAD)
    assert (head.role, grad.shape, bool(grad.any())) == ("ir-grad", IR.shape, True)
    assert bench.center.commit(0, 1) == before != learning.center.commit(0, 1)


@pytest.mark.parametrize(("head", "role", "tensor"), [(0, "labels", LABELS), (2, "center-grad", GRAD)])
def test_its_commitment_is_of_the_weights_and_the_momentum_that_it_would_show(
    head: int, role: Role, tensor: Tensor
) -> None:
    bench = Bench(head=head)
    commitments = [bench.center.commit(1, 2)]
    bench.take("ir", IR)
    bench.take(role, tensor)
    commitments.append(bench.center.commit(1, 3))
    assert commitments[0] != commitments[1]
    for commitment, place in zip(commitments, [(1, 2), (1, 3)], strict=True):
        shown = decode_state(bench.center.committed(*place), step="test")
        assert to_raw(model_digest(bench.plan.model, shown)) == commitment
    handed_over = decode_state(bench.center.weights(), step="test")
    assert shown.keys() - handed_over.keys() == {f"{MOMENTUM}{name}" for name in handed_over}
    assert all(torch.equal(value, shown[name]) for name, value in handed_over.items())


def step(bench: Bench, number: int) -> None:
    """One ternary step."""
    bench.take("ir", IR, epoch=0, step=number)
    bench.take("center-grad", GRAD, epoch=0, step=number)


def test_the_last_two_states_are_kept_as_they_were_and_no_other() -> None:
    bench, shown = Bench(head=2), []
    for number in range(3):
        bench.center.commit(0, number)
        shown.append(bench.center.committed(0, number))
        step(bench, number)
    assert len(set(shown)) == 3
    assert [bench.center.committed(0, number) for number in (1, 2)] == shown[1:]
    for place in ((0, 0), (0, 3), (1, 2), (1, 1)):
        with refused(EnvironmentFault, "center.not-kept"):
            bench.center.committed(*place)


def test_to_commit_again_to_a_place_keeps_the_one_before_it() -> None:
    bench = Bench(head=2)
    first = bench.center.commit(0, 0)
    step(bench, 0)
    commitments = [bench.center.commit(0, 1) for _ in range(4)]
    assert len(set(commitments)) == 1
    kept = decode_state(bench.center.committed(0, 0), step="test")
    assert to_raw(model_digest(bench.plan.model, kept)) == first


# --- taken up, and cut elsewhere ------------------------------------------------------------------------------------


def test_a_restored_center_goes_on_as_if_nothing_had_happened() -> None:
    bench, other = Bench(head=2), Bench(head=2, seed=SEED)
    step(bench, 0)
    bench.center.commit(0, 1)
    other.center.restore(decode_state(bench.center.committed(0, 1), step="test"))
    for one in (bench, other):
        step(one, 1)
    assert bench.center.commit(0, 2) == other.center.commit(0, 2)


def test_to_restore_forgets_what_was_committed_to() -> None:
    bench = Bench(head=2)
    bench.center.commit(0, 0)
    bench.center.restore(decode_state(bench.center.committed(0, 0), step="test"))
    with refused(EnvironmentFault, "center.not-kept"):
        bench.center.committed(0, 0)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
PlanChange = Callable[[Plan], Plan]
FOREIGN: dict[str, Change] = {
    "nothing": lambda _: {},
    "a name less": lambda state: {n: v for n, v in state.items() if n != "2.conv.bias"},
    "a name more": lambda state: state | {"9.weight": torch.zeros(1)},
    "another shape": lambda state: state | {"2.conv.weight": torch.zeros(4, 4, 1, 1)},
    "another type": lambda state: state | {"2.conv.bias": state["2.conv.bias"].double()},
    "no number": lambda state: state | {"2.conv.bias": state["2.conv.bias"] * float("nan")},
    "momentum of nothing": lambda state: state | {f"{MOMENTUM}9.weight": torch.zeros(1)},
    "momentum of another shape": lambda state: state | {f"{MOMENTUM}2.conv.bias": torch.zeros(5)},
    "momentum without end": lambda state: state | {f"{MOMENTUM}2.conv.bias": torch.full((4,), float("inf"))},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_state_is_refused_and_nothing_of_it_is_taken(change: Change) -> None:
    bench = Bench(head=2)
    step(bench, 0)
    before = bench.center.commit(0, 1)
    state = decode_state(bench.center.committed(0, 1), step="test")
    assert "2.conv.bias" in state
    with refused(IntegrityError, "weights.malformed"):
        bench.center.restore(change({name: value + 1 for name, value in state.items()}))
    assert bench.center.commit(0, 1) == before


def deepening(front: int, *more: Deepen) -> PlanChange:
    def change(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, partition=Partition(front=2, deepen=(Deepen(epoch=1, front=front), *more)))

    return change


@pytest.mark.parametrize(
    "change",
    [deepening(3), deepening(4), deepening(3, Deepen(epoch=2, front=4))],
    ids=["a layer with weights", "and the dropout", "twice"],
)
def test_a_recut_center_trains_as_the_plain_loop_with_the_same_cuts(change: PlanChange) -> None:
    # Dropout (layer 3) stays in the center or goes: its draws have the key of the zone that it is in.
    world = World(head=0, epochs=3, change=change).run_to(State.LINKED)
    plan, (pixels, labels) = world.plan, world.data()
    fixed = msgspec.structs.replace(plan.partition, deepen=())
    cuts = {epoch: plan.partition.front_at(epoch) for epoch in range(3)}
    assert set(cuts.values()) > {2}
    seeds = RunSeeds.from_run_seed(world.run.seed)
    assert world.run.model is not None
    ours = state_of(world.run.model)
    arguments: dict[str, Any] = {"pixels": pixels, "labels": labels, "seeds": seeds}
    plain = state_of(train_plain(plan.model, fixed, plan.data, plan.training, cuts=cuts, **arguments))
    never = state_of(train_plain(plan.model, fixed, plan.data, plan.training, **arguments))
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())
    if cuts[2] == 4:
        assert any(not torch.equal(value, never[name]) for name, value in ours.items()), "dropout has another key"


def test_a_recut_keeps_weights_and_momentum_and_takes_what_came_out() -> None:
    bench = Bench(head=2)
    step(bench, 0)
    before = bench.center.zone.state()
    whole = Center(bench.plan, seed=SEED, records=RECORDS, front=0).zone.state()
    entered = {name: torch.ones_like(value) for name, value in whole.items() if name.startswith("0.")}
    bench.center.commit(0, 1)
    bench.center.recut(0, entered)
    assert_same(bench.center.zone.state(), before | entered)
    with refused(EnvironmentFault, "center.not-kept"):
        bench.center.committed(0, 1)
    bench.center.recut(2, {})
    assert_same(bench.center.zone.state(), before)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_recut_without_the_layers_that_came_out_is_refused_and_the_center_stays() -> None:
    bench = Bench(head=2)
    before, zone = bench.center.commit(0, 0), bench.center.zone
    with refused(IntegrityError, "weights.malformed"):
        bench.center.recut(0, {})
    assert bench.center.zone is zone
    assert bench.center.commit(0, 0) == before


# --- measured on held-out records -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [0, 2])
def test_to_measure_changes_nothing(head: int) -> None:
    bench, undisturbed = Bench(head=head), Bench(head=head)
    before = bench.center.commit(1, 2)
    first = bench.take("eval-ir", IR)
    second = bench.take("eval-ir", IR, step=9)
    assert bench.center.commit(1, 2) == before
    assert places(first + second) == [("eval-out", RUN, 1, 2), ("eval-out", RUN, 1, 9)]
    torch.testing.assert_close(
        first[0][1], second[0][1], rtol=0, atol=0
    )  # no draw of dropout, no statistics of a batch
    for one in (bench, undisturbed):
        one.take("ir", IR)
        one.take("labels" if head == 0 else "center-grad", LABELS if head == 0 else GRAD)
    assert bench.center.commit(1, 3) == undisturbed.center.commit(1, 3)


def test_what_it_measures_with_is_the_mode_of_inference() -> None:
    bench = Bench(head=2)
    zone, _, _ = bench.reference()
    zone.eval()
    with torch.inference_mode():
        torch.testing.assert_close(bench.take("eval-ir", IR)[0][1], (zone(IR),))


# --- several tensors at a cut ---------------------------------------------------------------------------------------

JOINED = ModelSpec(
    layers=(
        Conv(filters=4),
        Conv(filters=4),
        Shortcut(source=0),
        Conv(filters=4),
        Flatten(),
        Linear(units=3),
    )
)


def joined(plan: Plan) -> Plan:
    """A model of which two tensors are live behind the second layer."""
    return msgspec.structs.replace(plan, model=JOINED, partition=Partition(front=2, head=2))


def test_several_tensors_that_are_live_at_the_cut_come_together_and_so_do_their_gradients() -> None:
    bench = Bench(head=2, change=joined)
    ir = [torch.randn((8, 4, 4, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    grad = torch.randn((8, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    (out,), (back,) = bench.take("ir", *ir), bench.take("center-grad", grad)
    zone = build(JOINED, input_shape=bench.plan.data.shape, layers=range(2, 4))
    initialise(zone, SEED)
    leaves = [x.clone().requires_grad_() for x in ir]
    expected, _ = zone.through(leaves)
    torch.autograd.backward(expected, (grad,))
    torch.testing.assert_close(out[1], tuple(x.detach() for x in expected))
    torch.testing.assert_close(back[1], tuple(leaf.grad for leaf in leaves))
    assert len(bench.take("eval-ir", *ir)[0][1]) == 1


def test_its_first_weights_are_those_of_its_seed() -> None:
    bench = Bench(head=2)
    zone, _, _ = bench.reference()
    assert_same(decode_state(bench.center.weights(), step="test"), state_of(zone))
    assert Bench(head=2, seed=bytes(32)).center.commit(0, 0) != bench.center.commit(0, 0)


def test_it_computes_with_the_plans_number_of_threads() -> None:
    torch.set_num_threads(2)
    Bench(head=2)
    assert torch.get_num_threads() == 1
