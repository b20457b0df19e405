"""Starting points for plans: model, cut, schema and hyper-parameters for the data sets that the readers know by name.

Found by trying; none of them is the papers' (their CIFAR networks come with the Darknet reader). All are small enough
for two cores.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from caltrain.models.spec import Conv, Flatten, Linear, MaxPool, ModelSpec, Partition
from caltrain.records.schema import DataSchema
from caltrain.training.spec import Augment, TrainingSpec

_DIGITS = tuple(str(digit) for digit in range(10))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


PresetName = Literal["digits", "mnist", "pneumoniamnist", "cifar10"]


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a plan that do not depend on who takes part."""

    model: ModelSpec
    partition: Partition
    data: DataSchema
    training: TrainingSpec


def _small_net(classes: int, *, hidden: int) -> ModelSpec:
    """For 28x28 in one channel."""
    return ModelSpec(
        layers=(
            Conv(filters=16, stride=2),
            Conv(filters=32),
            MaxPool(),
            Conv(filters=64),
            Flatten(),
            Linear(units=hidden, activation="relu"),
            Linear(units=classes),
        )
    )


PRESETS: dict[PresetName, Preset] = {
    "digits": Preset(
        model=ModelSpec(
            layers=(
                Conv(filters=16),
                Conv(filters=32, stride=2),
                Conv(filters=64),
                Flatten(),
                Linear(units=512, activation="relu"),
                Linear(units=10),
            )
        ),
        partition=Partition(front=2, head=1),
        data=DataSchema(shape=(1, 8, 8), classes=_DIGITS, mean=(0.0,), std=(0.38,)),
        training=TrainingSpec(
            epochs=35, batch=32, learning_rate=0.03, weight_decay=8e-3, augment=Augment(shift=1), threads=1
        ),
    ),
    "mnist": Preset(
        model=_small_net(10, hidden=128),
        partition=Partition(front=3, head=1),
        data=DataSchema(shape=(1, 28, 28), classes=_DIGITS, mean=(0.0,), std=(0.31,)),
        training=TrainingSpec(epochs=5, batch=64, learning_rate=0.05, weight_decay=5e-4, augment=Augment(shift=1)),
    ),
    "pneumoniamnist": Preset(
        model=_small_net(2, hidden=128),
        partition=Partition(front=3, head=1),
        data=DataSchema(shape=(1, 28, 28), classes=("normal", "pneumonia"), mean=(0.57,), std=(0.17,)),
        training=TrainingSpec(epochs=8, batch=64, learning_rate=0.03, weight_decay=5e-4, augment=Augment(shift=1)),
    ),
    "cifar10": Preset(
        model=ModelSpec(
            layers=(
                Conv(filters=32, stride=2, batch_norm=True),
                Conv(filters=32, batch_norm=True),
                MaxPool(),
                Conv(filters=64, batch_norm=True),
                Conv(filters=64, batch_norm=True),
                Flatten(),
                Linear(units=256, activation="relu"),
                Linear(units=10),
            )
        ),
        partition=Partition(front=3, head=1),
        data=DataSchema(shape=(3, 32, 32), classes=_CIFAR10, mean=(0.45,), std=(0.25,)),
        training=TrainingSpec(epochs=8, batch=64, learning_rate=0.03, weight_decay=1e-3, augment=Augment(shift=1)),
    ),
}
