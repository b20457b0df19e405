"""The schedule's values, and an optimiser that is the one of the plan."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from caltrain.training.optimiser import optimiser, rate_at, set_rate
from caltrain.training.spec import TrainingSpec


def spec(*, epochs: int = 4, warmup: int = 0, schedule: Literal["constant", "cosine"] = "cosine") -> TrainingSpec:
    return TrainingSpec(
        epochs=epochs,
        batch=8,
        learning_rate=0.8,
        momentum=0.7,
        weight_decay=0.01,
        warmup_epochs=warmup,
        schedule=schedule,
    )


@pytest.mark.parametrize(
    ("training", "epoch", "step", "rate"),
    [
        (spec(schedule="constant"), 0, 0, 0.8),
        (spec(schedule="constant"), 3, 9, 0.8),
        (spec(), 0, 0, 0.8),
        (spec(), 1, 0, 0.4 * (1 + math.sqrt(0.5))),
        (spec(), 2, 0, 0.4),
        (spec(), 1, 5, 0.4 * (1 + math.cos(math.pi * 1.5 / 4))),
        (spec(), 3, 9, 0.4 * (1 + math.cos(math.pi * 3.9 / 4))),
        (spec(warmup=1), 0, 0, 0.08),
        (spec(warmup=1), 0, 4, 0.4),
        (spec(warmup=1), 0, 9, 0.8),
        (spec(warmup=1), 1, 0, 0.8),
        (spec(warmup=1), 2, 5, 0.4),
        (spec(warmup=2, schedule="constant"), 0, 9, 0.4),
        (spec(warmup=2, schedule="constant"), 1, 9, 0.8),
        (spec(warmup=2, schedule="constant"), 2, 0, 0.8),
        (spec(warmup=4), 3, 9, 0.8),
        (spec(warmup=9), 3, 9, 0.8 * 4 / 9),
    ],
)
def test_the_rate_of_a_step_is_that_of_the_schedule(training: TrainingSpec, epoch: int, step: int, rate: float) -> None:
    assert rate_at(training, epoch=epoch, step=step, steps=10) == pytest.approx(rate, rel=1e-12)


def test_the_cosine_never_rises_and_the_warm_up_never_falls() -> None:
    training = spec(epochs=6, warmup=2)
    rates = [rate_at(training, epoch=e, step=s, steps=5) for e in range(6) for s in range(5)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(0.8)
    assert min(rates) > 0


def test_a_step_is_sgd_with_momentum_and_decay_at_the_rate_that_was_set() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    sgd = optimiser(layer, spec())
    weight, velocity = 2.0, 0.0
    for rate, grad in ((0.5, 1.0), (0.25, -3.0)):
        layer.weight.grad = torch.full((1, 1), grad)
        set_rate(sgd, rate)
        sgd.step()
        velocity = 0.7 * velocity + grad + 0.01 * weight
        weight -= rate * velocity
        assert layer.weight.item() == pytest.approx(weight, rel=1e-6)
