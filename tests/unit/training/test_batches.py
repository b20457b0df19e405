"""From records to the first layer's input: shifts stay in bounds and bring in zeros, half is mirrored, layouts hold."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, memory_format, normalise
from caltrain.training.seeds import Draws
from caltrain.training.spec import Augment

DRAWS = Draws(bytes(32), 0, 0)
N, C, H, W = 600, 2, 5, 7
# Every pixel of a record is another number above 0, so where each one went can be read off.
RECORD = torch.arange(1, C * H * W + 1, dtype=torch.uint8).reshape(C, H, W)
BATCH = RECORD.expand(N, C, H, W)


def shifted(down: int, right: int) -> Tensor:
    """RECORD moved, by definition: pixel for pixel."""
    out = torch.zeros_like(RECORD)
    for y in range(H):
        for x in range(W):
            if 0 <= y - down < H and 0 <= x - right < W:
                out[:, y, x] = RECORD[:, y - down, x - right]
    return out


def which(candidates: list[Tensor], batch: Tensor) -> list[int]:
    """Index of the candidate that each record equals."""
    table = {bytes(c.contiguous().numpy().tobytes()): i for i, c in enumerate(candidates)}
    return [table[record.contiguous().numpy().tobytes()] for record in batch]


@pytest.mark.parametrize("shift", [1, 2])
def test_a_record_is_moved_by_at_most_the_shift_and_zeros_come_in(shift: int) -> None:
    moves = [shifted(y, x) for y in range(-shift, shift + 1) for x in range(-shift, shift + 1)]
    found = which(moves, augment(BATCH, Augment(shift=shift), DRAWS))
    counts = [found.count(i) for i in range(len(moves))]
    expected = N / len(moves)
    assert min(counts) > 0, "a move that is allowed never happens"
    assert sum((c - expected) ** 2 / expected for c in counts) < 3 * len(moves)


def test_about_half_of_the_records_are_mirrored_and_each_whole() -> None:
    found = which([RECORD, RECORD.flip(2)], augment(BATCH, Augment(flip=True), DRAWS))
    assert 0.42 < sum(found) / N < 0.58


def test_a_shift_and_a_mirror_are_drawn_apart_and_the_mirror_comes_last() -> None:
    moves = [shifted(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    both = which(moves + [m.flip(2) for m in moves], augment(BATCH, Augment(shift=1, flip=True), DRAWS))
    shift_alone = which(moves, augment(BATCH, Augment(shift=1), DRAWS))
    flip_alone = which([RECORD, RECORD.flip(2)], augment(BATCH, Augment(flip=True), DRAWS))
    assert both == [s + len(moves) * f for s, f in zip(shift_alone, flip_alone, strict=True)]


def test_no_two_draws_of_a_step_share_a_generator() -> None:
    asked: list[tuple[str, int]] = []

    class Watched(Draws):
        def generator(self, name: str, layer: int = 0) -> torch.Generator:
            asked.append((name, layer))
            return super().generator(name, layer)

    augment(BATCH, Augment(shift=1, flip=True), Watched(bytes(32), 0, 0))
    assert len(set(asked)) == len(asked) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("spec", [Augment(), Augment(shift=2), Augment(flip=True), Augment(shift=1, flip=True)])
def test_shape_and_type_stay_and_the_records_given_are_not_changed(dtype: torch.dtype, spec: Augment) -> None:
    given = BATCH[:8].to(dtype).clone()
    got = augment(given, spec, DRAWS)
    assert (got.shape, got.dtype) == (given.shape, dtype)
    assert torch.equal(given, BATCH[:8].to(dtype))
    assert torch.equal(got, augment(BATCH[:8].to(dtype), spec, DRAWS))
    if spec == Augment():
        assert torch.equal(got, given)


def test_another_epoch_or_step_draws_another_augmentation() -> None:
    spec = Augment(shift=2, flip=True)
    one, epoch, step = (augment(BATCH, spec, Draws(bytes(32), *at)) for at in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(one, epoch)
    assert not torch.equal(one, step)
    assert not torch.equal(epoch, step)


def test_a_shift_may_push_a_record_out_of_the_picture() -> None:
    got = augment(BATCH, Augment(shift=64), DRAWS).flatten(1)
    # In sight for 9 of 129 shifts down and 13 of 129 to the right.
    assert 0.97 < float((got == 0).all(1).float().mean()) < 1


# --- normalisation ---------------------------------------------------------------------------------------------


def schema(
    *, dtype: Literal["u8", "f32"], mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.25,)
) -> DataSchema:
    return DataSchema(shape=(C, H, W), dtype=dtype, classes=("a", "b"), mean=mean, std=std)


def test_bytes_are_scaled_to_one_and_normalised() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    got = normalise(pixels, schema(dtype="u8"), channels_last=False)
    assert got.dtype == torch.float32
    assert got.flatten().tolist() == pytest.approx([-2.0, -1.2, 2.0])


def test_floats_are_normalised_as_they_are_channel_by_channel() -> None:
    pixels = torch.tensor([[1.0, 2.0], [30.0, 40.0]]).reshape(1, 2, 1, 2)
    got = normalise(pixels, schema(dtype="f32", mean=(1.0, 10.0), std=(1.0, 5.0)), channels_last=False)
    assert got.flatten().tolist() == [0.0, 1.0, 4.0, 6.0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_in_the_runs_layout_whatever_it_came_in(channels_last: bool, given: torch.memory_format) -> None:
    pixels = BATCH[:4].contiguous(memory_format=given)
    got = normalise(pixels, schema(dtype="u8"), channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert memory_format(channels_last) == layout
    assert got.stride() == torch.empty(4, C, H, W).contiguous(memory_format=layout).stride()
    assert torch.equal(got, (BATCH[:4] / 255 - 0.5) / 0.25)
