"""The schedule's values, and an optimiser that is the one of the plan."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import pytest
import torch
from torch import nn

from caltrain.training.optimiser import Descent, rate_at
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


def darknet_rate(number: int, *, rate: float, power: float, burn_in: int, max_batches: int) -> float:
    """`get_current_rate` for the policy `poly`, where `number` batches have been seen."""
    if number < burn_in:
        return rate * math.pow(number / burn_in, power)
    return rate * math.pow(1 - number / max_batches, power)


@pytest.mark.parametrize(("burn_in", "max_steps", "power"), [(0, 0, 4.0), (5, 20, 4.0), (7, 0, 1.0), (1, 25, 2.0)])
def test_poly_and_burn_in_are_those_of_darknet(burn_in: int, max_steps: int, power: float) -> None:
    """It counts a batch as seen before it steps: the first step has number 1."""
    training = msgspec.structs.replace(
        spec(schedule="constant"), schedule="poly", burn_in=burn_in, max_steps=max_steps, power=power
    )
    limit = max_steps or 20
    for number in range(1, 21):
        epoch, step = divmod(number - 1, 5)
        expected = darknet_rate(number, rate=0.8, power=power, burn_in=burn_in, max_batches=limit)
        assert rate_at(training, epoch=epoch, step=step, steps=5) == pytest.approx(expected, rel=1e-12)


def test_after_its_last_step_poly_stays_at_nothing() -> None:
    training = msgspec.structs.replace(spec(schedule="constant"), schedule="poly", max_steps=12, power=3.0)
    rates = [rate_at(training, epoch=e, step=s, steps=5) for e in range(4) for s in range(5)]
    assert rates[:12] == sorted(rates[:12], reverse=True)
    assert rates[10] == pytest.approx(0.8 / 12**3)
    assert rates[11:] == [0.0] * 9


def test_burn_in_goes_before_any_schedule() -> None:
    training = msgspec.structs.replace(spec(schedule="constant"), burn_in=4, power=2.0)
    rates = [rate_at(training, epoch=0, step=s, steps=10) for s in range(5)]
    assert rates == pytest.approx([0.05, 0.2, 0.45, 0.8, 0.8])


def layer_of(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def test_a_step_is_sgd_with_momentum_and_decay_at_the_rate_of_its_place() -> None:
    layer = layer_of(2.0)
    descent = Descent(layer, spec(warmup=1))
    weight, velocity = 2.0, 0.0
    for step, grad in ((0, 1.0), (4, -3.0)):
        descent.clear()
        assert layer.weight.grad is None
        layer.weight.grad = torch.full((1, 1), grad)
        descent.step(0, step, 10)
        velocity = 0.7 * velocity + grad + 0.01 * weight
        weight -= 0.8 * (step + 1) / 10 * velocity
        assert layer.weight.item() == pytest.approx(weight, rel=1e-6)
        held = descent.momentum(descent.parameters["weight"])
        assert held is not None
        assert held.item() == pytest.approx(velocity, rel=1e-6)


def moved(clip: float, grads: list[list[float]], *, apart: bool) -> list[float]:
    """Lengths of the first steps of two layers at rate 0.8."""
    layers = nn.ModuleList([layer_of(0.0, 0.0), layer_of(0.0, 0.0)])
    descent = Descent(layers, msgspec.structs.replace(spec(schedule="constant"), clip_norm=clip, weight_decay=0.0))
    for layer, grad in zip(layers, grads, strict=True):
        layer.weight.grad = torch.tensor([grad])
    descent.step(0, 0, 10, parts=list(layers) if apart else ())
    return [float(parameter.detach().norm()) / 0.8 for parameter in layers.parameters()]


def test_the_norm_is_clipped_part_by_part() -> None:
    grads = [[3.0, 4.0], [0.0, 12.0]]
    assert moved(0.0, grads, apart=True) == pytest.approx([5, 12])
    assert moved(6.5, grads, apart=False) == pytest.approx([2.5, 6])
    assert moved(6.5, grads, apart=True) == pytest.approx([5, 6.5], rel=1e-5)
    assert moved(20.0, grads, apart=True) == pytest.approx([5, 12])


def test_a_part_without_weights_is_not_clipped() -> None:
    layer = layer_of(1.0)
    descent = Descent(layer, msgspec.structs.replace(spec(), clip_norm=1.0))
    layer.weight.grad = torch.full((1, 1), 3.0)
    descent.step(0, 0, 10, parts=[layer, nn.Flatten()])
    assert layer.weight.item() == pytest.approx(1 - 0.8 * 1.01, rel=1e-5)


def test_a_zone_without_weights_has_nothing_to_do() -> None:
    descent = Descent(nn.Flatten(), spec())
    descent.clear()
    descent.step(0, 0, 10)
    descent.forget()
    parameter = nn.Parameter(torch.zeros(1))
    descent.remember(parameter, torch.ones(1))
    assert descent.sgd is None
    assert descent.momentum(parameter) is None


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_momentum_is_restored_as_a_copy_in_the_layout_of_its_parameter(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=layout)  # type: ignore[call-overload]
    descent, given = Descent(conv, spec()), torch.rand(4, 3, 3, 3)
    descent.remember(conv.weight, given)
    held = descent.momentum(conv.weight)
    assert held is not None
    assert held.stride() == conv.weight.stride()
    assert torch.equal(held, given)
    given.zero_()
    assert held.abs().sum() > 0
    descent.forget()
    assert descent.momentum(conv.weight) is None
