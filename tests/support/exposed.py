"""Small models for tests of exposure: random weights, batch statistics that are not the first ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from caltrain.exposure.subject import Subject, subject_of
from caltrain.models.layers import Conv, Flatten, Linear, MaxPool, Shape
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import state_of
from caltrain.records.schema import DataSchema
from support.networks import CLASSES, SMALL

TINY = ModelSpec(
    layers=(Conv(filters=8), MaxPool(), Conv(filters=4, batch_norm=True), Flatten(), Linear(units=CLASSES)), size=(8, 8)
)
TINY_DATA = DataSchema(shape=(1, 10, 10), classes=("a", "b", "c", "d"), mean=(0.4,), std=(0.3,))


def subject(name: str = "tiny", *, seed: int = 0) -> Subject:
    """`TINY`, or a model of `SMALL`, its weights drawn from `seed`."""
    if name == "tiny":
        return drawn(TINY, TINY_DATA, seed=seed)
    return drawn(SMALL[name].make(), SMALL[name].schema, seed=seed)


def drawn(spec: ModelSpec, data: DataSchema, *, seed: int = 0) -> Subject:
    """A model whose weights and batch statistics are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(spec, input_shape=data.shape)
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None and child.running_var is not None:
                child.running_mean.normal_(0, 0.1)
                child.running_var.uniform_(0.5, 1.5)
    return subject_of(spec, data, state_of(module))


def bright_or_dark(shape: Shape, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, C, H, W) whose label is their brightness, in four steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    noise = (torch.rand(count, *shape, generator=generator) - 0.5) * 0.1
    return noise + (labels[:, None, None, None] + 0.5) / 4, labels
