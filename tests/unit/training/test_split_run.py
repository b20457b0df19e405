"""Zones against the plain loop: cut anywhere, and deepened on the way, the weights are the same, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.models.layers import AvgPool, Conv
from caltrain.models.spec import Deepen, ModelSpec, Partition, live_at
from caltrain.training.spec import Augment
from support.split_run import (
    CHAIN,
    FLAT,
    PIXELS,
    RECORDS,
    RESIDUAL,
    SEEDS,
    TRAINING,
    VIT,
    cross,
    differing,
    plain_state,
    train_split,
)

CLIPPED = msgspec.structs.replace(TRAINING, clip_norm=0.1)


def name_of(value: object) -> str | None:
    if isinstance(value, Partition):
        return f"{value.form} {value.front}-{value.head}"
    names = {"chain": CHAIN, "flat": FLAT, "residual": RESIDUAL, "vit": VIT}
    return next((name for name, spec in names.items() if spec == value), None)


CUTS = [(CHAIN, Partition(front=front)) for front in range(1, 9)]
CUTS += [(CHAIN, Partition(front=f, head=h)) for f, h in ((1, 1), (1, 7), (2, 4), (3, 3), (4, 2), (5, 1), (7, 1))]
CUTS += [(CHAIN, Partition(front=0, head=head, unsafe_cut_at_input=True)) for head in (0, 3)]
CUTS += [(FLAT, Partition(front=front, head=head)) for front, head in ((1, 0), (2, 0), (1, 2))]
CUTS += [(RESIDUAL, Partition(front=front, head=head)) for front, head in ((1, 0), (1, 1), (2, 6), (3, 5), (4, 4))]
CUTS += [(RESIDUAL, Partition(front=front, head=head)) for front, head in ((5, 3), (6, 1), (2, 8))]
CUTS += [(VIT, Partition(front=front, head=head)) for front, head in ((1, 0), (1, 1), (1, 4), (2, 2), (2, 3))]


@pytest.mark.parametrize(("spec", "cut"), CUTS, ids=name_of)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_split_model_ends_with_the_weights_of_the_plain_loop(
    spec: ModelSpec, cut: Partition, channels_last: bool
) -> None:
    training = msgspec.structs.replace(TRAINING, channels_last=channels_last)
    assert differing(train_split(spec, cut, training), plain_state(spec, cut, training)) == set()


def test_the_residual_model_is_cut_where_several_tensors_are_live() -> None:
    crossing = {front: live_at(RESIDUAL.layers, front) for front in range(1, 9)}
    assert crossing == {1: (0,), 2: (0, 1), 3: (2,), 4: (2, 3), 5: (2, 4), 6: (4, 5), 7: (4, 6), 8: (4, 7)}


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"schedule": "constant", "warmup_epochs": 0},
        {"schedule": "poly", "warmup_epochs": 0, "burn_in": 3},
        {"augment": Augment()},
        {"augment": Augment(angle=10, aspect=0.2, flip=True, hue=0.1, saturation=0.3, exposure=0.3)},
        {"batch": RECORDS},
        {"batch": 1, "epochs": 1},
        {"clip_norm": 0.1},
    ],
    ids=str,
)
def test_it_holds_for_other_hyper_parameters(change: dict[str, object]) -> None:
    training, cut = msgspec.structs.replace(TRAINING, **change), Partition(front=2, head=2)
    spec = FLAT if training.batch == 1 else CHAIN
    assert differing(train_split(spec, cut, training), plain_state(spec, cut, training)) == set()


# --- clipping --------------------------------------------------------------------------------------------------


CLIPPED_CUTS = [(RESIDUAL, Partition(front=front, head=head)) for front, head in ((1, 0), (2, 4), (4, 1))]
CLIPPED_CUTS += [(VIT, Partition(front=front, head=head)) for front, head in ((1, 0), (1, 3), (2, 1))]


@pytest.mark.parametrize(("spec", "cut"), CLIPPED_CUTS, ids=name_of)
def test_each_zone_clips_its_own_norm_and_the_plain_loop_does_so_too(spec: ModelSpec, cut: Partition) -> None:
    split = train_split(spec, cut, CLIPPED)
    assert differing(split, plain_state(spec, cut, CLIPPED)) == set()
    assert differing(split, plain_state(spec, cut, TRAINING)), "nothing was clipped"


def test_a_head_without_weights_has_nothing_to_clip() -> None:
    pooled = ModelSpec(layers=(*RESIDUAL.layers[:9], Conv(filters=3), AvgPool()))
    cut = Partition(front=1, head=1)
    assert differing(train_split(pooled, cut, CLIPPED), plain_state(pooled, cut, CLIPPED)) == set()


# --- deepening -------------------------------------------------------------------------------------------------

LONG = msgspec.structs.replace(TRAINING, epochs=4)
DEEPENED = [
    (CHAIN, Partition(front=1, head=1, deepen=(Deepen(epoch=1, front=2), Deepen(epoch=3, front=5)))),
    (CHAIN, Partition(front=1, deepen=(Deepen(epoch=2, front=7),))),
    (RESIDUAL, Partition(front=1, head=2, deepen=(Deepen(epoch=1, front=2), Deepen(epoch=2, front=5)))),
    (VIT, Partition(front=1, head=1, deepen=(Deepen(epoch=2, front=2),))),
]


@pytest.mark.parametrize(("spec", "cut"), DEEPENED, ids=name_of)
@pytest.mark.parametrize("channels_last", [True, False])
def test_layers_move_between_zones_with_weights_and_momentum(
    spec: ModelSpec, cut: Partition, channels_last: bool
) -> None:
    training = msgspec.structs.replace(LONG, channels_last=channels_last, clip_norm=0.5)
    split = train_split(spec, cut, training)
    assert differing(split, plain_state(spec, cut, training)) == set()
    assert differing(split, plain_state(spec, cut.at(cut.front), training)), "the moved dropout kept its key"


def test_cuts_by_epoch_go_before_the_schedule_and_may_be_shallower() -> None:
    cut, cuts = Partition(front=2, head=1, deepen=(Deepen(epoch=1, front=4),)), {1: 5, 3: 2}
    training = msgspec.structs.replace(LONG, clip_norm=0.1)  # by which the zones of every epoch count
    split = train_split(CHAIN, cut, training, cuts=cuts)
    assert differing(split, plain_state(CHAIN, cut, training, cuts=cuts)) == set()
    for other in ({}, {1: 5}, {3: 2}, {1: 5, 3: 5}):
        assert differing(split, plain_state(CHAIN, cut, training, cuts=other))


def test_a_moved_dropout_has_the_key_of_its_new_zone() -> None:
    """Layer 1 of the chain drops with the center's key before the move, and with the front's after it."""
    cut = Partition(front=1, head=1)
    moved = plain_state(CHAIN, cut, LONG, cuts={2: 2, 3: 2})
    unmoved, always = plain_state(CHAIN, cut, LONG), plain_state(CHAIN, cut, LONG, cuts=dict.fromkeys(range(4), 2))
    assert differing(moved, unmoved)
    assert differing(moved, always)


# --- what is noticed -------------------------------------------------------------------------------------------


def flip_record(at: int) -> Tensor:
    pixels = PIXELS.clone()
    pixels[at, 0, 3, 3] ^= 1
    return pixels


def nudge(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of one value of one record, larger by a ten-thousandth."""
    changed = cross(tensors)
    at = int(changed[0].abs().argmax())
    place = torch.unravel_index(torch.tensor(at), changed[0].shape)
    changed[0][place] *= 1.0001
    return changed


def test_one_bit_of_a_record_a_little_of_one_gradient_or_one_draw_is_seen() -> None:
    cut = Partition(front=2, head=2)
    honest = plain_state(CHAIN, cut, TRAINING)
    assert differing(train_split(CHAIN, cut, TRAINING, pixels=flip_record(0)), honest)
    assert differing(train_split(CHAIN, cut, TRAINING, on_gradients=nudge), honest)
    for name in ("front", "center", "head", "order", "augment"):
        changed = dataclasses.replace(SEEDS, **{name: bytes(32)})
        assert differing(train_split(CHAIN, cut, TRAINING, seeds=changed), honest), name


def test_the_zones_keys_follow_the_cut() -> None:
    """A host that knows the CenterNet's seed must not know what the FrontNet draws."""
    cut, other = (plain_state(CHAIN, Partition(front=front), TRAINING) for front in (1, 2))
    assert differing(cut, other)
