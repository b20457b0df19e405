"""Included models, for any number of classes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from caltrain.models.layers import (
    AvgPool,
    Conv,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Norm,
    Patches,
    Route,
    Shortcut,
    Transformer,
)
from caltrain.models.spec import ModelSpec

_CROP = (28, 28)


def _leaky(*filters: int) -> list[Layer]:
    return [Conv(filters=width, batch_norm=True, activation="leaky") for width in filters]


def _averaged(classes: int) -> list[Layer]:
    """The end of the papers' networks. In Darknet's files this convolution, too, has its activation."""
    return [Conv(filters=classes, kernel=1, padding=0, activation="leaky"), AvgPool()]


def cifar_18_layer(classes: int = 10) -> ModelSpec:
    """The papers' larger CIFAR network (arXiv:1812.03230, 1807.00969), as Darknet's `cifar.cfg` has it.

    28x28 crops of 32x32 in colour. Darknet counts softmax and cost as layers 17 and 18.
    """
    layers = [
        *_leaky(128, 128, 128),
        MaxPool(),
        Dropout(p=0.5),
        *_leaky(256, 256, 256),
        MaxPool(),
        Dropout(p=0.5),
        *_leaky(512, 512, 512),
        Dropout(p=0.5),
        *_averaged(classes),
    ]
    return ModelSpec(layers=tuple(layers), size=_CROP)


def cifar_10_layer(classes: int = 10) -> ModelSpec:
    """The papers' smaller CIFAR network, remembered from arXiv:1812.03230 and not verified against it.

    Remembered are the kinds and widths, with softmax and cost as layers 9 and 10; batch normalisation and the
    activation are those of its larger sister.
    """
    layers = [
        *_leaky(128, 128),
        MaxPool(),
        *_leaky(64),
        MaxPool(),
        *_leaky(128),
        *_averaged(classes),
    ]
    return ModelSpec(layers=tuple(layers), size=_CROP)


def resnet18_32(classes: int = 10) -> ModelSpec:
    """ResNet-18 (arXiv:1512.03385) for 32x32: a 3x3 stem, no pooling, four stages of two blocks, 64 to 512 wide."""
    layers: list[Layer] = [Conv(filters=64, batch_norm=True)]
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        _block(layers, width, stride)
        _block(layers, width, 1)
    return ModelSpec(layers=(*layers, AvgPool(), Linear(units=classes)))


def _block(layers: list[Layer], width: int, stride: int) -> None:
    """Two convolutions, and around them what came in: as it is, or where the shape changes by a 1x1 convolution."""
    entry = len(layers) - 1
    layers.append(Conv(filters=width, stride=stride, batch_norm=True))
    layers.append(Conv(filters=width, batch_norm=True, activation="none"))
    if stride == 1:
        layers.append(Shortcut(source=entry, activation="relu"))
        return
    layers.append(Route(sources=(entry,)))
    layers.append(Conv(filters=width, kernel=1, stride=stride, padding=0, batch_norm=True, activation="none"))
    layers.append(Shortcut(source=entry + 2, activation="relu"))


def resnet9_28(classes: int = 10, *, width: int = 64) -> ModelSpec:
    """A small residual network for 28x28 crops that is right early in training (after David Page's CIFAR-10 network).

    By default the validator of an exposure assessment (arXiv:1807.00969, IRValNet).
    """
    layers: list[Layer] = [Conv(filters=width, batch_norm=True)]
    for times, residual in ((2, True), (4, False), (8, True)):
        layers += [Conv(filters=width * times, batch_norm=True), MaxPool()]
        if residual:
            layers += [Conv(filters=width * times, batch_norm=True), Conv(filters=width * times, batch_norm=True)]
            layers.append(Shortcut(source=len(layers) - 3))
    return ModelSpec(layers=(*layers, AvgPool(), Linear(units=classes)), size=_CROP)


def vit_small_32(classes: int = 10) -> ModelSpec:
    """A small Vision Transformer (arXiv:2010.11929) for 32x32: patches of 4, six blocks 128 wide, averaged tokens."""
    blocks = [Transformer(heads=4, p=0.1)] * 6
    return ModelSpec(layers=(Patches(size=4, width=128), *blocks, Norm(), AvgPool(), Linear(units=classes)))


def mlp(classes: int, *, hidden: Iterable[int] = (256, 128)) -> ModelSpec:
    """A perceptron for tables: records of shape (1, 1, columns)."""
    inner = [Linear(units=units, activation="relu") for units in hidden]
    return ModelSpec(layers=(Flatten(), *inner, Linear(units=classes)))
