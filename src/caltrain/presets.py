"""Starting points for plans: model, cut, schema and hyper-parameters for the data sets that the readers know by name.

The four of `PRESETS` were found by trying and are small enough for two cores. Those of `NETWORKS` are the included
models on CIFAR-10: the papers' two with the hyper-parameters of Darknet's `cifar.cfg`, the others with usual ones, not
tuned; each takes hours on two cores. A third kind comes from a Darknet cfg.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from caltrain.models.darknet import read_cfg
from caltrain.models.layers import Conv, Flatten, Linear, MaxPool
from caltrain.models.spec import ModelSpec, Partition, embedding_layer
from caltrain.models.zoo import cifar_10_layer, cifar_18_layer, resnet18_32, vit_small_32
from caltrain.records.schema import DataSchema
from caltrain.training.spec import Augment, CenterSpec, TrainingSpec

_DIGITS = tuple(str(digit) for digit in range(10))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


PresetName = Literal["digits", "mnist", "pneumoniamnist", "cifar10"]
NetworkName = Literal["cifar10-18-layer", "cifar10-10-layer", "cifar10-resnet18", "cifar10-vit"]
StartName = Literal[PresetName, NetworkName]
DEFAULT_FRONT = 4
"""Layers of the FrontNet where nothing else is said: the papers' advice for their 18-layer network."""


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a plan that do not depend on who takes part."""

    model: ModelSpec
    partition: Partition
    data: DataSchema
    training: TrainingSpec
    center: CenterSpec = CenterSpec(audit_rate=0.1)
    """Audited, as long as nobody wants an accelerator outside: see `docs/plan.md`."""


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


# A step takes milliseconds, as long as a commitment to the state: longer short runs have fewer of them.
_SMALL_CENTER = CenterSpec(audit_rate=0.1, audit_steps=16)
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
        center=_SMALL_CENTER,
        training=TrainingSpec(
            epochs=35, batch=32, learning_rate=0.03, weight_decay=8e-3, augment=Augment(shift=1), threads=1
        ),
    ),
    "mnist": Preset(
        model=_small_net(10, hidden=128),
        partition=Partition(front=3, head=1),
        data=DataSchema(shape=(1, 28, 28), classes=_DIGITS, mean=(0.0,), std=(0.31,)),
        center=_SMALL_CENTER,
        training=TrainingSpec(epochs=5, batch=64, learning_rate=0.05, weight_decay=5e-4, augment=Augment(shift=1)),
    ),
    "pneumoniamnist": Preset(
        model=_small_net(2, hidden=128),
        partition=Partition(front=3, head=1),
        data=DataSchema(shape=(1, 28, 28), classes=("normal", "pneumonia"), mean=(0.57,), std=(0.17,)),
        center=_SMALL_CENTER,
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
        center=_SMALL_CENTER,
        training=TrainingSpec(epochs=8, batch=64, learning_rate=0.03, weight_decay=1e-3, augment=Augment(shift=1)),
    ),
}


def _darknet_cifar() -> TrainingSpec:
    """Of Darknet's `cifar.cfg`, but for 12 epochs: the papers' number, close to its 5000 batches of 50,000 records."""
    return TrainingSpec(
        epochs=12,
        batch=128,
        learning_rate=0.4,
        weight_decay=5e-4,
        schedule="poly",
        augment=Augment(flip=True, min_crop=32, max_crop=32, hue=0.1, saturation=0.333333, exposure=0.333333),
    )


def _usual(*, epochs: int, learning_rate: float, warmup_epochs: int = 0) -> TrainingSpec:
    return TrainingSpec(
        epochs=epochs,
        batch=128,
        learning_rate=learning_rate,
        weight_decay=5e-4,
        warmup_epochs=warmup_epochs,
        augment=Augment(shift=4, flip=True),
    )


def _cifar10(model: ModelSpec, training: TrainingSpec, *, mean: float, std: float) -> Preset:
    data = msgspec.structs.replace(PRESETS["cifar10"].data, mean=(mean,), std=(std,))
    # An epoch takes many minutes: what a crash costs is bounded by steps, not by epochs.
    training = msgspec.structs.replace(training, checkpoint_steps=50)
    return Preset(model=model, partition=default_cut(model), data=data, training=training)


def default_cut(model: ModelSpec) -> Partition:
    """Four layers in front, and a HeadNet from the last layer with weights on, so that logits stay inside."""
    return Partition(front=DEFAULT_FRONT, head=len(model.layers) - embedding_layer(model))


NETWORKS: dict[NetworkName, Preset] = {
    "cifar10-18-layer": _cifar10(cifar_18_layer(), _darknet_cifar(), mean=0.0, std=1.0),
    "cifar10-10-layer": _cifar10(cifar_10_layer(), _darknet_cifar(), mean=0.0, std=1.0),
    "cifar10-resnet18": _cifar10(resnet18_32(), _usual(epochs=30, learning_rate=0.1), mean=0.45, std=0.25),
    "cifar10-vit": _cifar10(
        vit_small_32(), _usual(epochs=60, learning_rate=0.03, warmup_epochs=5), mean=0.45, std=0.25
    ),
}
STARTS: dict[StartName, Preset] = dict((*PRESETS.items(), *NETWORKS.items()))


def preset_from_cfg(
    text: bytes, *, data: DataSchema | None = None, epochs: int | None = None, records: int | None = None
) -> Preset:
    """Model and hyper-parameters of a Darknet cfg, for `epochs` or for its `max_batches` over so many `records`.

    Without a schema, records have the file's size and classes are named by their numbers. Raises ConfigError.
    """
    cfg = read_cfg(text)
    if data is None:
        names = tuple(str(number) for number in range(cfg.classes))
        data = DataSchema(shape=cfg.record, classes=names, mean=(cfg.mean,), std=(cfg.std,))
    training = cfg.training(epochs=epochs, records=records)
    return Preset(model=cfg.model, partition=default_cut(cfg.model), data=data, training=training)


def with_cut(preset: Preset, *, front: int | None, head: int | None) -> Preset:
    """The preset with as many layers in FrontNet and HeadNet as given."""
    own = preset.partition
    cut = Partition(front=own.front if front is None else front, head=own.head if head is None else head)
    return msgspec.structs.replace(preset, partition=cut)
