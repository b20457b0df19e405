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
from caltrain.boundary.channel import Tensors
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.messages import ANSWERS, Data
from caltrain.boundary.tensors import Element, Layout, Role, TensorHead, restore
from caltrain.errors import EnvironmentFault, ProtocolError
from caltrain.models.spec import MAX_LIVE
from support.ends import ends, frame, hear, rings, tensor_frame

RUN = "ab" * 16
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def across(tensor: Tensor) -> Tensor:
    """The tensor after a journey through both channels."""
    (got,) = all_across(tensor)
    return got


def all_across(*sent: Tensor, slot_bytes: int | None = None) -> Tensors:
    """Tensors after a journey together through both channels."""
    with ends(slot_bytes=slot_bytes) as (near, far):
        near.send_tensors(sent, role="ir", run=RUN, epoch=1, step=2)
        got = far.receive_tensors(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS)
    assert isinstance(got, tuple)
    return got


def head(
    *,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    dtype: Element = "f32",
    slot: int | None = None,
) -> TensorHead:
    return TensorHead("ir", RUN, 1, 2, (Layout(dtype, shape, strides),), slot)


def heads(*parts: Layout, slot: int | None = None) -> TensorHead:
    return TensorHead("ir", RUN, 1, 2, parts, slot)


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
    (got,) = restore(head(), memoryview(data))
    data[:] = bytes(24)
    assert torch.equal(got, torch.arange(6.0).reshape(2, 3))


# --- what is refused -------------------------------------------------------------------------------------------


def refused(stream: bytes, why: str = "") -> None:
    with pytest.raises(ProtocolError, match=rf"^tensor\.malformed: .*{why}"):
        hear(stream, ANSWERS)


def test_the_frame_that_the_refused_ones_are_variants_of_is_taken() -> None:
    got = hear(tensor_frame(head(), bytes(24)), ANSWERS)
    assert isinstance(got, tuple)
    assert torch.equal(got[1][0], torch.zeros(2, 3))


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
    ids=lambda v: (
        f"{v.parts[0].dtype} {v.parts[0].shape} {v.parts[0].strides}" if isinstance(v, TensorHead) else str(v)
    ),
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
        (got,) = restore(head(shape=shape, strides=layout), data)
        assert got.stride() == layout
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
        {"parts": []},
        {"parts": [["f32", [2, 3], [3, 1]]] * (MAX_LIVE + 1)},
        {"parts": {"dtype": "f32", "shape": [2, 3], "strides": [3, 1]}},
        {"parts": [["f64", [2, 3], [3, 1]]]},
        {"parts": [["f32", [-2, -3], [3, 1]]]},
        {"parts": [["f32", [1, 1, 1, 1, 2, 3], [6, 6, 6, 6, 3, 1]]]},
        {"parts": [["f32", [2, (1 << 40) + 1], [3, 1]]]},
        {"parts": [["f32", [2, 3], [-3, 1]]]},
        {"parts": [["f32", [2, 3]]]},
        {"parts": [["f32", [2, 3], [3, 1], 0]]},
        {"parts": [["f32", [2, 3], [3, 1]], None]},
        {"slot": -1},
        {"slot": 256},
        {"more": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_head_out_of_its_form_is_refused(change: dict[str, object]) -> None:
    refused(tensor_frame(msgspec.msgpack.encode(FIELDS | change), bytes(24)))


HEAD = msgspec.msgpack.encode(head())
LONG = HEAD + bytes((16 << 10) + 1 - len(HEAD))


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (frame(b"", FrameKind.TENSOR), "no head"),
        (frame(b"\x01\0\0", FrameKind.TENSOR), "no head"),
        (tensor_frame(HEAD, bytes(24), claim=0), ""),
        (tensor_frame(HEAD, bytes(24), claim=len(HEAD) - 1), ""),
        (tensor_frame(HEAD, b"", claim=len(HEAD) + 1), "a head of"),
        (tensor_frame(HEAD, b"", claim=0xFFFFFFFF), "a head of"),
        (tensor_frame(LONG, bytes(24)), "a head of 16385 bytes"),
        (tensor_frame(b"\x81\xa1\xff\x01", b""), "utf-8"),
        (tensor_frame(b"\xc1" * 10, b""), ""),
        (tensor_frame(head(slot=0), b""), "a ring slot without a ring"),
    ],
    ids=range(10),
)
def test_a_tensor_frame_without_a_sound_head_is_refused(stream: bytes, why: str) -> None:
    refused(stream, why)


# --- several together --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(dense_tensors(), min_size=1, max_size=MAX_LIVE), st.sampled_from([None, 1, 1 << 12]))
def test_tensors_that_cross_together_keep_order_values_and_layouts(sent: list[Tensor], slot_bytes: int | None) -> None:
    got = all_across(*sent, slot_bytes=slot_bytes)
    assert len(got) == len(sent)
    for mine, own in zip(got, sent, strict=True):
        assert same(mine, own)
        assert mine.stride() == own.stride()


def test_as_many_cross_as_may_be_live_and_not_one_more() -> None:
    sent = [torch.full((1,), float(number)) for number in range(MAX_LIVE + 1)]
    assert [x.item() for x in all_across(*sent[:-1])] == list(range(MAX_LIVE))
    with pytest.raises(ProtocolError, match=r"^tensor\.malformed: "):
        all_across(*sent)


def test_the_largest_head_that_is_in_form_is_not_too_long() -> None:
    longest = heads(*[Layout("f32", (1 << 40,) * 5, (1 << 40,) * 5)] * MAX_LIVE, slot=255)
    refused(tensor_frame(longest, b""), "a ring slot without a ring")


def test_tensors_that_crossed_together_share_no_memory() -> None:
    one, other = all_across(torch.zeros(3), torch.zeros(3))
    one += 1
    assert torch.equal(other, torch.zeros(3))
    assert one.untyped_storage().nbytes() == 12


GOOD = Layout("f32", (2, 3), (3, 1))


@pytest.mark.parametrize("size", [0, 12, 24, 47, 49, 72])
@pytest.mark.parametrize("parts", [(GOOD, GOOD), (Layout("f32", (1,), (1,)), Layout("f32", (11,), (1,)))])
def test_bytes_that_are_not_the_sum_of_the_parts_are_refused(parts: tuple[Layout, ...], size: int) -> None:
    taken = hear(tensor_frame(heads(*parts), bytes(48)), ANSWERS)
    assert isinstance(taken, tuple)
    assert [tuple(x.shape) for x in taken[1]] == [part.shape for part in parts]
    refused(tensor_frame(heads(*parts), bytes(size)), f"{size} bytes for 48")


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "bad",
    [
        Layout("f32", (2, 3), (1, 1)),
        Layout("f32", (2, 3), (3, 2)),
        Layout("f32", (2, 3), (3,)),
        Layout("f32", (6,), (2,)),
        Layout("f32", (2, 0, 3), (3, 1, 1)),
        Layout("f32", (), ()),
    ],
    ids=str,
)
def test_one_part_that_is_not_dense_has_the_whole_frame_refused(bad: Layout, place: int) -> None:
    parts = [GOOD, GOOD]
    parts.insert(place, bad)
    refused(tensor_frame(heads(*parts), bytes(sum(part.nbytes for part in parts))), "with strides")


LAYOUTS = st.builds(
    Layout,
    st.sampled_from(["f32", "i64"]),
    st.lists(st.integers(0, 1 << 40) | st.integers(0, 4), max_size=5).map(tuple),
    st.lists(st.integers(0, 1 << 40) | st.integers(0, 4), max_size=5).map(tuple),
)
HEADS = st.builds(heads, st.just(GOOD), LAYOUTS, LAYOUTS, slot=st.none() | st.integers(0, 255))


@settings(deadline=None, max_examples=200)
@given(HEADS, st.binary(max_size=200), st.booleans())
def test_hostile_heads_end_in_a_named_error_or_in_what_they_say(lie: TensorHead, data: bytes, with_ring: bool) -> None:
    with rings(64) as (_, ring):
        try:
            got = hear(tensor_frame(lie, data), ANSWERS, ring=ring if with_ring else None)
        except ProtocolError as error:
            assert error.code in {"tensor.malformed", "ring.out-of-range"}  # noqa: PT017  # or it passes: see below
            return
    assert isinstance(got, tuple)
    assert [(tuple(x.shape), x.stride()) for x in got[1]] == [(part.shape, part.strides) for part in lie.parts]
    assert sum(x.numel() * x.element_size() for x in got[1]) == lie.nbytes <= max(len(data), 64)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_heads_never_raise_anything_unnamed(data: st.DataObject) -> None:
    raw = bytearray(msgspec.msgpack.encode(heads(GOOD, Layout("i64", (2, 1, 2), (2, 7, 1)))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = hear(tensor_frame(bytes(raw), bytes(56)), ANSWERS)
    except ProtocolError as error:
        assert error.code == "tensor.malformed"  # noqa: PT017  # or it passes
    else:
        assert isinstance(got, tuple)
        assert sum(x.numel() * x.element_size() for x in got[1]) == 56


# --- what is due -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "run", "epoch", "step"),
    [("labels", RUN, 1, 2), ("ir", "cd" * 16, 1, 2), ("ir", RUN, 0, 2), ("ir", RUN, 1, 3)],
)
def test_a_tensor_of_another_role_run_epoch_or_step_is_refused(role: Role, run: str, epoch: int, step: int) -> None:
    with ends() as (near, far):
        near.send_tensors([torch.ones(2)], role=role, run=run, epoch=epoch, step=step)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: .*where ir of 1\.2 was due"):
            far.receive_tensors(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS)


def test_a_tensor_where_a_message_is_due_is_refused() -> None:
    with ends() as (near, far):
        near.send_tensors([torch.ones(2)], role="ir", run=RUN, epoch=1, step=2)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: .*tensors \(ir\) where a message was due"):
            far.receive(ANSWERS)


def test_a_message_where_a_tensor_is_due_is_handed_on() -> None:
    with ends() as (near, far):
        near.send(Data(b"instead"))
        assert far.receive_tensors(role="ir", run=RUN, epoch=1, step=2, or_message=ANSWERS) == Data(b"instead")


def test_closing_one_end_ends_the_stream_of_the_other() -> None:
    with ends() as (near, far):
        near.close()
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: "):
            far.receive(ANSWERS)
