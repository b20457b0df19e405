"""The default validator: another network than the assessed one, good enough or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from caltrain.errors import ConfigError
from caltrain.exposure import train_validator as module
from caltrain.exposure.train_validator import ENOUGH, train_validator
from caltrain.presets import PRESETS
from support.assessment import NET, digits_material, hardly_computing
from support.exposed import drawn, subject
from support.samples import refused

MODEL = drawn(NET, PRESETS["digits"].data)
"""Of random weights: the validator learns from pictures, not from it."""


def test_it_learns_the_pictures_and_stops_once_it_is_good_enough() -> None:
    steps: list[tuple[int, int]] = []
    with hardly_computing():
        made = train_validator(
            MODEL, digits_material(MODEL), seed=0, threads=1, on_step=lambda *step: steps.append(step)
        )
    assert made.accuracy is not None
    assert made.accuracy.value >= 0.8
    assert made.accuracy.n == 100
    assert made.subject.digest != MODEL.digest
    assert made.subject.data.classes == MODEL.data.classes
    assert len(steps) < steps[-1][1]  # sooner than it might have


def test_one_that_learns_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_STEPS", 4)
    monkeypatch.setattr(module, "_LEAST_EPOCHS", 1)
    given = digits_material(MODEL)
    given = replace(given, own=given.own[:150], own_labels=given.own_labels[:150].roll(1))
    with hardly_computing(), refused(ConfigError, "exposure.weak-validator"):
        train_validator(MODEL, given, seed=0, threads=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_size_become_28_by_28(channels: int) -> None:
    pictures = torch.rand((4, channels, 40, 17), generator=torch.Generator().manual_seed(0))
    pixels = module._pixels(pictures)
    assert (pixels.shape, pixels.dtype) == ((4, channels, 28, 28), torch.uint8)
    same = torch.full((2, channels, 28, 28), 0.5)
    assert bool((module._pixels(same) == 128).all())


def test_only_pictures_in_colour_are_mirrored() -> None:
    assert not module._training(subject("tiny"), 100, threads=1).augment.flip
    assert module._training(subject("18-layer"), 100, threads=1).augment.flip


def test_good_enough_leaves_room_above_what_is_needed() -> None:
    assert ENOUGH > 0.85
