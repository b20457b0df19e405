"""A channel that shows its record is found, whatever its scale; one that does not is not."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.boundary.frames import FrameKind
from caltrain.boundary.messages import Progress
from caltrain.boundary.tensors import Role, TensorHead, flatten, layout_of
from support.canary_correlate import likeness, pearson, references, tensors_in
from support.canary_replay import Step
from support.tapped_host import moment_of, on_wire

RUN = "0" * 32
ROLES: tuple[Role, ...] = ("ir", "center-grad")
DRAWS = torch.Generator().manual_seed(7)
PLAIN = torch.rand((6, 3, 12, 12), generator=DRAWS)
BATCH = torch.tensor([4, 1, 3])
X = PLAIN[BATCH].flip(3)
STEP = Step(1, 2, BATCH, torch.tensor([0, 1, 2]), (X * 255).byte(), X, torch.empty(0))
NOISE = torch.rand((3, 8, 6, 6), generator=DRAWS)


def sent(*tensors: Tensor, role: Role = "ir", slot: int | None = None) -> bytes:
    """Tensors that cross together, as the tap keeps them."""
    dense, data = zip(*map(flatten, tensors), strict=True)
    head = msgspec.msgpack.encode(TensorHead(role, RUN, 1, 2, tuple(map(layout_of, dense)), slot))
    parts = (len(head).to_bytes(4, "little"), head)
    if slot is None:
        return on_wire(FrameKind.TENSOR, *parts, *data)
    return on_wire(FrameKind.TENSOR, *parts) + b"".join(data)


def greatest(tensor: Tensor, role: Role = "ir") -> float:
    return likeness(sent(tensor, role=role), [STEP], plain=PLAIN, roles=ROLES)[role].r


def with_channel(picture: Tensor) -> Tensor:
    """Noise whose sixth channel, for the second record, is this picture."""
    tensor = NOISE.clone()
    tensor[1, 5] = picture
    return tensor


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("slot", [None, 0, 1])
def test_tensors_are_read_back_from_a_tap(layout: torch.memory_format, slot: int | None) -> None:
    tensor = NOISE.contiguous(memory_format=layout)
    other = on_wire(FrameKind.MESSAGE, msgspec.msgpack.encode(Progress("train", 1, 2)))
    stream = other + sent(tensor, tensor[1:], slot=slot) + other + sent(tensor[:1], role="center-grad", slot=slot)
    found = list(tensors_in(stream))
    assert [head.role for head, _ in found] == ["ir", "center-grad"]
    assert [len(tensors) for _, tensors in found] == [2, 1]
    assert torch.equal(found[0][1][0], tensor)
    assert found[0][1][0].stride() == tensor.stride()
    assert torch.equal(found[0][1][1], tensor[1:])
    assert torch.equal(found[1][1][0], tensor[:1])


def test_a_picture_is_found_in_whichever_tensor_of_a_frame_it_is() -> None:
    picture = with_channel(references(X[1][None], (6, 6))[0, 0].reshape(6, 6))
    for together in ((picture, NOISE), (NOISE, picture)):
        (top,) = likeness(sent(*together), [STEP], plain=PLAIN, roles=ROLES).values()
        assert top.found
        assert (top.record, top.channel) == (1, 5)


def test_pearson_is_that_of_torch() -> None:
    a, b = torch.rand((2, 3, 20)), torch.rand((2, 4, 20))
    r = pearson(a, b)
    assert r.shape == (2, 3, 4)
    assert r[1, 2, 3].item() == pytest.approx(torch.corrcoef(torch.stack([a[1, 2], b[1, 3]]))[0, 1].item(), abs=1e-6)


def test_a_channel_that_does_not_vary_resembles_nothing() -> None:
    assert pearson(torch.ones((1, 1, 20)), torch.rand((1, 1, 20))).abs().max() == 0


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-4])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 7], ids=["c0", "c1", "c2", "grey", "c0 sampled", "grey sampled"])
@pytest.mark.parametrize("source", [X[1], PLAIN[BATCH[1]]], ids=["augmented", "as it is"])
def test_a_channel_that_shows_its_record_is_found(scale: float, which: int, source: Tensor) -> None:
    picture = references(source[None], (6, 6))[0, which].reshape(6, 6)
    tensor = with_channel(picture * scale + 0.5)
    for role in ROLES:
        (top,) = likeness(sent(tensor, role=role), [STEP], plain=PLAIN, roles=(role,)).values()
        assert top.found
        assert (top.role, top.record, top.channel, top.epoch, top.step) == (role, 1, 5, 1, 2)


def test_a_channel_of_full_size_and_one_under_slight_noise_are_found() -> None:
    assert greatest(X) > 0.999
    picture = F.adaptive_avg_pool2d(X[1, 0][None], 6)[0]
    assert greatest(with_channel(picture + 0.01 * torch.rand((6, 6), generator=DRAWS))) > 0.98


def test_noise_and_another_record_are_not_found() -> None:
    assert greatest(NOISE) < 0.8
    assert greatest(with_channel(F.adaptive_avg_pool2d(X[0, 0][None], 6)[0])) < 0.8


def test_what_has_too_few_pixels_or_no_channels_or_another_role_is_not_judged() -> None:
    small = torch.rand((3, 64, 3, 5), generator=DRAWS)
    vectors = torch.rand((3, 64), generator=DRAWS)
    lines = torch.rand((3, 8, 36), generator=DRAWS)
    for stream in (sent(small), sent(vectors), sent(lines), sent(NOISE, role="loss")):
        assert likeness(stream, [STEP], plain=PLAIN, roles=ROLES) == {}


def test_moments_are_named_by_what_is_sent() -> None:
    head = msgspec.msgpack.encode(TensorHead("center-out", RUN, 1, 2, (layout_of(NOISE),), 0))
    assert moment_of(FrameKind.TENSOR, b"", head) == "center-out-1-2"
    assert moment_of(FrameKind.MESSAGE, msgspec.msgpack.encode({"t": "release"})) == "release"
    assert moment_of(FrameKind.MESSAGE, msgspec.msgpack.encode({"t": "train", "epoch": 0, "step": 3})) == "train-0-3"
    assert moment_of(FrameKind.MESSAGE, msgspec.msgpack.encode({"t": "infer", "batch": 3})) == "infer-3"
