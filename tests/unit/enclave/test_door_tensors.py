"""Tensors of a step: what is due is taken, as what it is; anything else is refused before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import REPLIES_AND_CALLS, Answer, CallFailed, Data, Done, Message, Stop
from caltrain.boundary.tensors import Role
from caltrain.enclave.door import Door
from caltrain.errors import EnvironmentFault, ProtocolError
from caltrain.models.layers import Shape
from caltrain.training.zone import At
from support.ends import ends

RUN = "ab" * 16
AT = At(1, 2, 10)
FULL = EnvironmentFault("storage.full", "the disk is full", step="write", fix="Free space.").diagnostics()


def answer(
    host: Channel, *tensors: Tensor, role: Role = "ir-grad", run: str = RUN, epoch: int = 1, step: int = 2
) -> None:
    host.send_tensors(tensors, role=role, run=run, epoch=epoch, step=step)


def exchange(
    enclave: Channel,
    outgoing: dict[Role, list[Tensor]] | None = None,
    *,
    shapes: Sequence[Shape] = ((2, 3),),
    max_rms: float = 1e4,
) -> Tensors:
    return Door(enclave, max_rms=max_rms).exchange(outgoing or {}, due="ir-grad", shapes=shapes, run=RUN, at=AT)


@pytest.mark.parametrize("slot_bytes", [None, 24, 8])
def test_tensors_go_out_in_order_and_the_one_that_is_due_comes_in(slot_bytes: int | None) -> None:
    with ends(slot_bytes=slot_bytes) as (host, enclave):
        answer(host, torch.arange(6.0).reshape(2, 3))
        (got,) = exchange(enclave, {"ir": [torch.ones(2, 2), torch.zeros(1)], "labels": [torch.tensor([3, 4])]})
        assert torch.equal(got, torch.arange(6.0).reshape(2, 3))
        sent: list[Any] = [host.receive_any(REPLIES_AND_CALLS) for _ in range(2)]
    assert [(h.role, h.run, h.epoch, h.step) for h, _ in sent] == [("ir", RUN, 1, 2), ("labels", RUN, 1, 2)]
    assert [[x.tolist() for x in tensors] for _, tensors in sent] == [[[[1, 1], [1, 1]], [0]], [[3, 4]]]


def test_several_tensors_that_are_due_come_in_together_and_in_order() -> None:
    with ends() as (host, enclave):
        answer(host, torch.ones(2, 3), torch.zeros(4))
        one, other = exchange(enclave, shapes=[(2, 3), (4,)])
    assert torch.equal(one, torch.ones(2, 3))
    assert torch.equal(other, torch.zeros(4))


def test_strides_come_in_as_they_were_sent() -> None:
    with ends() as (host, enclave):
        answer(host, torch.arange(6.0).reshape(3, 2).t())
        (got,) = exchange(enclave)
    assert got.stride() == (1, 2)
    assert torch.equal(got, torch.arange(6.0).reshape(3, 2).t())


def spoilt(value: float) -> Tensor:
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("slot_bytes", [None, 64])
@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(3, 2)],
        [torch.zeros(6)],
        [torch.zeros(1, 2, 3)],
        [torch.zeros(2, 4)],
        [torch.zeros((2, 3), dtype=torch.int64)],
        [torch.zeros(2, 3), torch.zeros(2, 3)],
        [torch.zeros(2, 3), torch.zeros(1)],
    ],
    ids=lambda ts: " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in ts),
)
def test_tensors_that_are_not_float32_of_the_due_shapes_are_refused(
    tensors: list[Tensor], slot_bytes: int | None
) -> None:
    with ends(slot_bytes=slot_bytes) as (host, enclave):
        answer(host, *tensors)
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*expected float32 of \[\(2, 3\)\]"):
            exchange(enclave)


@pytest.mark.parametrize("tensors", [[torch.zeros(2, 3)], [torch.zeros(4), torch.zeros(2, 3)]])
def test_fewer_tensors_or_another_order_are_refused(tensors: list[Tensor]) -> None:
    with ends() as (host, enclave):
        answer(host, *tensors)
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*expected float32"):
            exchange(enclave, shapes=[(2, 3), (4,)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 2.5e4])
def test_a_tensor_that_is_not_finite_or_too_large_is_refused(value: float) -> None:
    with ends() as (host, enclave):
        answer(host, spoilt(value))
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*root mean square is above 10000"):
            exchange(enclave)


def test_each_of_several_tensors_is_measured() -> None:
    with ends() as (host, enclave):
        answer(host, torch.zeros(2, 3), torch.tensor([torch.nan]))
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*not finite"):
            exchange(enclave, shapes=[(2, 3), (1,)])


@pytest.mark.parametrize(("value", "passes"), [(1.999, True), (2.001, False)])
def test_the_bound_is_the_root_mean_square_that_the_plan_gives(value: float, passes: bool) -> None:
    with ends() as (host, enclave):
        answer(host, torch.full((2, 3), value))
        if passes:
            exchange(enclave, max_rms=2.0)
        else:
            with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*above 2 "):
                exchange(enclave, max_rms=2.0)


@pytest.mark.parametrize(
    "place", [{"role": "center-out"}, {"run": "cd" * 16}, {"epoch": 0}, {"step": 1}, {"step": 3}], ids=str
)
def test_a_tensor_of_another_place_is_refused(place: dict[str, Any]) -> None:
    with ends() as (host, enclave):
        answer(host, torch.zeros(2, 3), **place)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
            exchange(enclave)


@pytest.mark.parametrize(
    ("instead", "error"),
    [
        (CallFailed(FULL), r"^storage\.full: the disk is full"),
        (Data(bytes(24)), r"^tensor\.malformed: .*data where a tensor was due"),
        (CallFailed({}), r"^protocol\.unreadable-error: "),
        (Stop(), r"^door\.unexpected: "),
        (Done(), r"^door\.unexpected: "),
    ],
    ids=["failure", "data", "unreadable failure", "a request", "a reply"],
)
def test_a_message_in_place_of_the_tensor_is_an_error(instead: Answer | Message, error: str) -> None:
    with ends() as (host, enclave):
        host.send(instead)
        with pytest.raises((ProtocolError, EnvironmentFault), match=error):
            exchange(enclave)
