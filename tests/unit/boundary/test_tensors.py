"""Tensor frames: bytes and strides arrive as they left, or the frame is refused."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from caltrain.boundary import tensors
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.messages import ANSWERS, Data
from caltrain.boundary.tensors import Element, Role, TensorHead, restore
from caltrain.errors import EnvironmentFault, ProtocolError
from support.ends import ends, frame, hear, tensor_frame

RUN = "ab" * 16
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def across(tensor: Tensor) -> Tensor:
    """The tensor after a journey through both channels."""
    with ends() as (near, far):
        near.send_tensor(tensor, role="ir", run=RUN, epoch=1, step=2)
        got = far.receive_tensor(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS)
    assert isinstance(got, Tensor)
    return got


def head(
    *,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    dtype: Element = "f32",
    slot: int | None = None,
) -> TensorHead:
    return TensorHead("ir", RUN, 1, 2, dtype, shape, strides, slot)


@st.composite
def dense_tensors(draw: st.DrawFn) -> Tensor:
    """Any permutation of the axes of a dense block; axes of size 1 with any stride at all."""
    shape = draw(SHAPES)
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = draw(st.integers(0, 1000)) if shape[axis] == 1 else step
        step *= shape[axis]
    dtype = draw(st.sampled_from([torch.float32, torch.int64]))
    return torch.arange(step, dtype=dtype).as_strided(shape, strides)


def same(got: Tensor, sent: Tensor) -> bool:
    return got.dtype == sent.dtype and got.shape == sent.shape and torch.equal(got, sent)


# --- what passes -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(dense_tensors())
def test_every_dense_layout_keeps_its_values_and_its_strides(sent: Tensor) -> None:
    got = across(sent)
    assert same(got, sent)
    assert got.stride() == sent.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (4, 3, 1, 1), (1, 1, 1, 1)])
def test_a_batch_of_images_keeps_its_memory_format(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    got = across(sent)
    assert same(got, sent)
    assert got.stride() == sent.stride()
    assert got.is_contiguous(memory_format=layout)


BLOCK = torch.arange(24.0).reshape(4, 6)
NOT_DENSE = {
    "a column": BLOCK[:, 2],
    "every other row": BLOCK[::2],
    "a window": BLOCK[1:3, 1:4],
    "a repeated row": BLOCK[:1].expand(3, 6),
    "a repeated number": torch.tensor(5.0).expand(2, 3),
    "overlapping windows": BLOCK.as_strided((3, 4), (1, 1)),
}


@pytest.mark.parametrize("sent", NOT_DENSE.values(), ids=NOT_DENSE)
def test_what_is_not_dense_is_sent_contiguous(sent: Tensor) -> None:
    got = across(sent)
    assert same(got, sent)
    assert got.is_contiguous()


def test_only_the_elements_of_a_view_leave_not_what_lies_around_them() -> None:
    secret = torch.full((100,), 42.0)
    secret[10:20] = torch.arange(10.0)
    _, data = tensors.flatten(secret[10:20])
    assert len(data) == 40
    assert struct.pack("<f", 42.0) not in bytes(data)


def test_a_tensor_with_a_graph_is_sent_without_it() -> None:
    sent = torch.ones(3, requires_grad=True) * 2
    got = across(sent)
    assert not got.requires_grad
    assert same(got, torch.full((3,), 2.0))


def test_bits_arrive_as_they_left_whatever_number_they_are() -> None:
    bits = torch.tensor([0x7FC00001, -1, 0x7F800000, -(1 << 31), 1, 0x00800000], dtype=torch.int32)
    assert torch.equal(across(bits.view(torch.float32)).view(torch.int32), bits)


def test_the_received_tensor_is_a_copy_of_its_own() -> None:
    data = bytearray(torch.arange(6.0).numpy().tobytes())
    got = restore(head(), memoryview(data))
    data[:] = bytes(24)
    assert torch.equal(got, torch.arange(6.0).reshape(2, 3))


# --- what is refused -------------------------------------------------------------------------------------------


def refused(stream: bytes, why: str = "") -> None:
    with pytest.raises(ProtocolError, match=rf"^tensor\.malformed: .*{why}"):
        hear(stream, ANSWERS)


def test_the_frame_that_the_refused_ones_are_variants_of_is_taken() -> None:
    got = hear(tensor_frame(head(), bytes(24)), ANSWERS)
    assert isinstance(got, tuple)
    assert torch.equal(got[1], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("lie", "size"),
    [
        (head(), 23),
        (head(), 25),
        (head(), 0),
        (head(dtype="i64"), 24),
        (head(shape=(0, 3), strides=(3, 1)), 0),
        (head(shape=(), strides=()), 4),
        (head(shape=(2, 3), strides=(1,)), 24),
        (head(shape=(2, 3), strides=(3, 1, 1)), 24),
        (head(shape=(2, 3), strides=(1, 1)), 24),
        (head(shape=(2, 3), strides=(0, 1)), 24),
        (head(shape=(2, 3), strides=(4, 1)), 24),
        (head(shape=(2, 3), strides=(6, 2)), 24),
        (head(shape=(2, 3), strides=(1 << 40, 1)), 24),
        (head(shape=(1 << 40,) * 5, strides=(1,) * 5), 24),
    ],
    ids=lambda v: f"{v.dtype} {v.shape} {v.strides}" if isinstance(v, TensorHead) else str(v),
)
def test_bytes_that_are_not_the_announced_tensor_are_refused(lie: TensorHead, size: int) -> None:
    refused(tensor_frame(lie, bytes(size)))


@settings(deadline=None)
@given(SHAPES, st.lists(st.integers(0, 30), min_size=5, max_size=5))
def test_a_layout_passes_exactly_if_it_is_dense(shape: tuple[int, ...], strides: list[int]) -> None:
    layout = tuple(strides[: len(shape)])
    places = sorted(
        sum(i * stride for i, stride in zip(index, layout, strict=True))
        for index in itertools.product(*(range(size) for size in shape))
    )
    assume(math.prod(shape) < 200)
    data = memoryview(bytes(4 * math.prod(shape)))
    if places == list(range(math.prod(shape))):
        assert restore(head(shape=shape, strides=layout), data).stride() == layout
    else:
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: "):
            restore(head(shape=shape, strides=layout), data)


FIELDS: dict[str, Any] = msgspec.to_builtins(head())


@pytest.mark.parametrize(
    "change",
    [
        {"role": "weights"},
        {"run": "AB" * 16},
        {"run": "ab" * 16 + "\n"},
        {"epoch": -1},
        {"step": -1},
        {"dtype": "f64"},
        {"shape": [-2, -3]},
        {"shape": [1, 1, 1, 1, 2, 3], "strides": [6, 6, 6, 6, 3, 1]},
        {"shape": [2, (1 << 40) + 1]},
        {"strides": [-3, 1]},
        {"slot": -1},
        {"slot": 256},
        {"more": 1},
    ],
    ids=str,
)
def test_a_head_out_of_its_form_is_refused(change: dict[str, object]) -> None:
    refused(tensor_frame(msgspec.msgpack.encode(FIELDS | change), bytes(24)))


HEAD = msgspec.msgpack.encode(head())
LONG = HEAD + bytes(1025 - len(HEAD))


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (frame(b"", FrameKind.TENSOR), "no head"),
        (frame(b"\x01\0\0", FrameKind.TENSOR), "no head"),
        (tensor_frame(HEAD, bytes(24), claim=0), ""),
        (tensor_frame(HEAD, bytes(24), claim=len(HEAD) - 1), ""),
        (tensor_frame(HEAD, b"", claim=len(HEAD) + 1), "a head of"),
        (tensor_frame(HEAD, b"", claim=0xFFFFFFFF), "a head of"),
        (tensor_frame(LONG, bytes(24)), "a head of 1025 bytes"),
        (tensor_frame(b"\x81\xa1\xff\x01", b""), "utf-8"),
        (tensor_frame(b"\xc1" * 10, b""), ""),
        (tensor_frame(head(slot=0), b""), "a ring slot without a ring"),
    ],
    ids=range(10),
)
def test_a_tensor_frame_without_a_sound_head_is_refused(stream: bytes, why: str) -> None:
    refused(stream, why)


# --- what is due -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "run", "epoch", "step"),
    [("labels", RUN, 1, 2), ("ir", "cd" * 16, 1, 2), ("ir", RUN, 0, 2), ("ir", RUN, 1, 3)],
)
def test_a_tensor_of_another_role_run_epoch_or_step_is_refused(role: Role, run: str, epoch: int, step: int) -> None:
    with ends() as (near, far):
        near.send_tensor(torch.ones(2), role=role, run=run, epoch=epoch, step=step)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: .*where ir of 1\.2 was due"):
            far.receive_tensor(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS)


def test_a_tensor_where_a_message_is_due_is_refused() -> None:
    with ends() as (near, far):
        near.send_tensor(torch.ones(2), role="ir", run=RUN, epoch=1, step=2)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: .*a tensor \(ir\) where a message was due"):
            far.receive(ANSWERS)


def test_a_message_where_a_tensor_is_due_is_handed_on() -> None:
    with ends() as (near, far):
        near.send(Data(b"instead"))
        assert far.receive_tensor(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS) == Data(b"instead")


def test_closing_one_end_ends_the_stream_of_the_other() -> None:
    with ends() as (near, far):
        near.close()
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: "):
            far.receive(ANSWERS)
