"""Models and hyper-parameters from Darknet .cfg files (untrusted text). Needs no torch.

Layers are numbered as Darknet numbers them, from 0, with three differences. [softmax] and [cost] are the loss and give
no layer: a network that Darknet counts as 18 layers has 16 here. [crop] is augmentation and gives none either. Where
[connected] reads an image, a `Flatten` comes before it. [route] and [shortcut] are translated from the file's numbers.

Left out of what Darknet does, since the engine has one rule for all models: weight decay spares no biases and no
normalisation; `subdivisions` do not split a batch for batch normalisation; a factor of saturation, exposure or aspect
has Darknet's range, but is drawn evenly from 1 upwards or as its inverse.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from caltrain.errors import ConfigError
from caltrain.models.darknet_layers import Layers
from caltrain.models.darknet_text import Section, malformed, sections
from caltrain.models.spec import ModelSpec, layer_shapes
from caltrain.training.spec import Augment, TrainingSpec

_POLICIES: dict[str, Literal["constant", "poly"]] = {"constant": "constant", "poly": "poly"}
_SIDE, _BATCH, _STEPS, _EPOCHS = 4096, 65_536, 1 << 29, 10_000


class DarknetModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a cfg file says; `record` is the (channels, height, width) of records that it is made for.

    Darknet's pixels are 0 to 1, or -1 to 1 after a [crop] that adjusts them: `mean` and `std` say which.
    """

    model: ModelSpec
    record: tuple[int, int, int]
    batch: int
    learning_rate: float
    momentum: float
    decay: float
    schedule: Literal["constant", "poly"]
    power: float
    burn_in: int
    max_batches: int
    augment: Augment
    mean: float
    std: float

    @property
    def channels(self) -> int:
        """Channels of a record."""
        return self.record[0]

    @property
    def classes(self) -> int:
        """Number of logits."""
        return layer_shapes(self.model, self.record)[-1][0]

    def training(self, *, epochs: int | None = None, records: int | None = None) -> TrainingSpec:
        """The hyper-parameters for `epochs`, over which `poly` then falls, or for `max_batches` over that many records.

        Raises ConfigError `darknet.no-epochs`.
        """
        steps = (records or 0) // self.batch
        if epochs is None and not (steps and self.max_batches):
            raise ConfigError(
                "darknet.no-epochs",
                f"{records or 'no'} records, in batches of {self.batch}, and max_batches={self.max_batches}",
                step="read Darknet cfg",
                fix="Give the number of epochs; or of records, at least a batch, if the file has max_batches.",
            )
        return TrainingSpec(
            epochs=epochs or min(math.ceil(self.max_batches / steps), _EPOCHS),
            batch=self.batch,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.decay,
            schedule=self.schedule,
            power=self.power,
            max_steps=0 if epochs else self.max_batches,
            burn_in=self.burn_in,
            augment=self.augment,
        )


def read_cfg(text: bytes) -> DarknetModel:
    """The network of a .cfg file. Raises ConfigError: `darknet.malformed`, `darknet.unsupported`, `model.too-large`."""
    net, *rest = sections(text) or [Section("", 1)]
    if net.kind != "net":
        raise malformed(net.line, "the first section is not [net]")
    channels = net.integer("channels", 0, least=1, most=_SIDE)
    sides = net.integer("height", 0, least=1, most=_SIDE), net.integer("width", 0, least=1, most=_SIDE)
    crop = rest.pop(0) if rest and rest[0].kind == "crop" else None
    # With [crop], any augmentation of [net] would come on top: it is not read, and so refused.
    size, augment, adjusted = _cropped(crop, sides) if crop else (sides, _augment(net, sides[1]), False)
    layers = Layers((channels, *size), shift=crop is not None)
    for section in rest:
        layers.add(section)
    model = layers.model(size, end=rest[-1].line if rest else net.line)
    record = (channels, max(sides[0], augment.min_crop), max(sides[1], augment.min_crop))
    found = DarknetModel(
        model=model,
        record=record,
        batch=net.integer("batch", 1, least=1, most=_BATCH),
        learning_rate=net.number("learning_rate", 0.001, least=1e-12, most=1000.0),
        momentum=net.number("momentum", 0.9, most=0.9999),
        decay=net.number("decay", 0.0001, most=1.0),
        schedule=net.choice("policy", "constant", _POLICIES),
        power=net.number("power", 4.0, most=100.0),
        burn_in=net.integer("burn_in", 0, most=_STEPS),
        max_batches=net.integer("max_batches", 0, most=_STEPS),
        augment=augment,
        mean=0.5 if adjusted else 0.0,
        std=0.5 if adjusted else 1.0,
    )
    net.integer("subdivisions", 1, least=1, most=_BATCH)
    net.close()
    layer_shapes(model, found.record)
    return found


def _cropped(crop: Section, sides: tuple[int, int]) -> tuple[tuple[int, int], Augment, bool]:
    """(height, width) after the crop, what else it draws, and whether it maps pixels to -1 to 1."""
    height = crop.integer("crop_height", 1, least=1, most=sides[0])
    width = crop.integer("crop_width", 1, least=1, most=sides[1])
    augment = _factors(crop, flip=crop.integer("flip", 0, most=1) == 1)
    adjusted = crop.integer("noadjust", 0, most=1) == 0
    crop.close()
    return (height, width), augment, adjusted


def _augment(net: Section, width: int) -> Augment:
    """Scaling is asked for by either of its keys; the other then has Darknet's default."""
    scaled = net.has("min_crop", "max_crop")
    low = net.integer("min_crop", width if scaled else 0, most=_SIDE)
    high = net.integer("max_crop", min(2 * width, _SIDE) if scaled else 0, least=low, most=_SIDE)
    factors = _factors(net, flip=net.integer("flip", 1, most=1) == 1)
    return msgspec.structs.replace(
        factors,
        min_crop=low,
        max_crop=high,
        aspect=_factor(net, "aspect"),
        hue=net.number("hue", 0.0, most=1.0),
    )


def _factors(section: Section, *, flip: bool) -> Augment:
    return Augment(
        flip=flip,
        angle=section.number("angle", 0.0, most=180.0),
        saturation=_factor(section, "saturation"),
        exposure=_factor(section, "exposure"),
    )


def _factor(section: Section, key: str) -> float:
    """Darknet writes the furthest factor, 0.75 or 1.5; a plan how far it is from 1."""
    factor = section.number(key, 1.0, least=0.1, most=10.0)
    return round(max(factor, 1 / factor) - 1, 6)
