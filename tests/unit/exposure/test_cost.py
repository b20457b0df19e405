"""What a cut costs, by hand for a small network, and against the papers' numbers for the 18-layer one."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from caltrain.errors import ConfigError
from caltrain.exposure.cost import CutCost, cost_of, describe
from caltrain.exposure.speed import images_per_second
from caltrain.exposure.subject import candidate_cuts
from caltrain.models import layers as m
from caltrain.models.spec import ModelSpec
from caltrain.models.zoo import cifar_18_layer, resnet18_32, vit_small_32
from caltrain.records.schema import DataSchema
from support.exposed import subject
from support.samples import refused

CIFAR = DataSchema(shape=(3, 32, 32), classes=tuple("0123456789"))


def test_a_small_networks_costs_are_those_by_hand() -> None:
    layers = (m.Conv(filters=4), m.MaxPool(), m.Flatten(), m.Linear(units=2))
    data = DataSchema(shape=(1, 6, 8), dtype="f32", classes=("a", "b"))
    convolution, linear = 4 * 9 * 6 * 8, 4 * 3 * 4 * 2
    inside = 4 * 9 / (4 * 9 + linear)
    share = convolution / (convolution + linear)
    spec = ModelSpec(layers=layers)
    first = CutCost(front=1, layer="conv 4 3x3", compute=share, weights=inside, bytes_across=4 * 192, ratio=4.0)
    second = CutCost(front=2, layer="maxpool 2", compute=share, weights=inside, bytes_across=4 * 48, ratio=1.0)
    assert (cost_of(spec, data, 1), cost_of(spec, data, 2)) == (first, second)


def test_the_18_layer_networks_costs_are_the_papers() -> None:
    costs = {front: cost_of(cifar_18_layer(), CIFAR, front) for front in candidate_cuts(cifar_18_layer())}
    compute = {front: round(100 * (cost.compute or 0), 1) for front, cost in costs.items()}
    assert [compute[front] for front in (1, 2, 3, 4, 6, 7, 8, 11, 12)] == [
        0.3, 14.6, 28.8, 28.8, 35.9, 50.2, 64.4, 71.5, 85.7
    ]  # fmt: skip
    kib = {1: 392, 4: 98, 6: 196, 9: 49, 11: 98}
    assert {front: costs[front].bytes_across / 1024 for front in kib} == kib
    assert costs[1].ratio == 392 * 1024 / (3 * 32 * 32)


@pytest.mark.parametrize("spec", [cifar_18_layer(), resnet18_32(), vit_small_32()], ids=["18", "resnet18", "vit"])
def test_what_is_inside_only_grows_with_depth(spec: ModelSpec) -> None:
    costs = [cost_of(spec, CIFAR, front) for front in candidate_cuts(spec)]
    for before, after in pairwise(costs):
        assert (before.compute or 0) <= (after.compute or 0) <= 1
        assert before.weights <= after.weights < 1


def test_all_that_crosses_is_counted() -> None:
    alone, both = (cost_of(resnet18_32(), CIFAR, front).bytes_across for front in (1, 2))
    assert (alone, both) == (4 * 64 * 32 * 32, 2 * 4 * 64 * 32 * 32)


def test_the_compute_of_a_stage_is_not_known() -> None:
    stage = m.Stage(name="mine", shape=(4,), weights=12)
    spec = ModelSpec(layers=(m.Conv(filters=2), stage, m.Linear(units=2)))
    found = cost_of(spec, CIFAR, 2)
    assert (found.compute, found.layer) == (None, "stage mine")
    assert found.weights == (2 * 27 + 12) / (2 * 27 + 12 + 8)


NAMES: dict[str, m.Layer] = {
    "conv 128 3x3": m.Conv(filters=128),
    "conv 64 5x5 /2": m.Conv(filters=64, kernel=5, stride=2),
    "maxpool 3": m.MaxPool(kernel=3),
    "avgpool": m.AvgPool(),
    "dropout 0.5": m.Dropout(p=0.5),
    "flatten": m.Flatten(),
    "linear 10": m.Linear(units=10),
    "shortcut": m.Shortcut(source=0),
    "route": m.Route(sources=(0,)),
    "patches 96 4x4": m.Patches(size=4, width=96),
    "transformer 3 heads": m.Transformer(heads=3),
    "norm": m.Norm(),
    "stage tail": m.Stage(name="tail", shape=(3,), weights=1),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_called_what_people_call_it(name: str) -> None:
    assert describe(NAMES[name]) == name


def test_costs_and_defences_as_data_need_no_torch() -> None:
    program = "import sys, caltrain.exposure.cost, caltrain.exposure.defence_spec; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_speed_is_the_median_of_the_repeats() -> None:
    taken = iter([0.0, 0.1, 0.0, 9.0, 0.0, 0.2, 0.0, 0.4, 0.0, 0.5, 0.0, 0.3])
    small, passes = subject("18-layer"), 0

    def counted(*_of: object) -> None:
        nonlocal passes
        passes += 1

    small.module[0].register_forward_hook(counted)
    found = images_per_second(small, 3, torch.rand(8, *small.shape), clock=lambda: next(taken), repeats=3)
    assert (found.front, found.whole, found.batch, found.repeats) == (8 / 0.2, 8 / 0.4, 8, 3)
    assert next(taken, None) is None
    assert passes == 2 * (3 + 1)  # one pass on each side is not timed


def test_speed_at_a_cut_that_cannot_be_is_refused() -> None:
    small = subject("18-layer")
    with refused(ConfigError, "exposure.cut"):
        images_per_second(small, 0, torch.rand(2, *small.shape), clock=lambda: 0.0)
