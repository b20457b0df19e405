"""The included models, narrow: the same graphs with fewer filters, on small random records, for quick tests.

Darknet's larger networks are read from their files, which need not be here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.models.darknet import DarknetModel, read_cfg
from caltrain.models.layers import Conv, Layer, Linear, Patches, Shape
from caltrain.models.spec import ModelSpec, embedding_layer
from caltrain.models.zoo import cifar_10_layer, cifar_18_layer, mlp, resnet18_32, vit_small_32
from caltrain.records.schema import DataSchema

CLASSES = 4
_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def cfg_text(name: str) -> bytes:
    """A Darknet file, or the test is skipped."""
    path = Path(os.environ.get("CALTRAIN_DATA", _DATA)) / "darknet_cfg" / f"{name}.cfg"
    if not path.is_file():
        pytest.skip(f"there is no {path}; set CALTRAIN_DATA")
    return path.read_bytes()


def cfg(name: str) -> DarknetModel:
    """The network of a Darknet file, or the test is skipped."""
    return read_cfg(cfg_text(name))


def narrow(spec: ModelSpec, by: int, *, size: tuple[int, int] | None = None) -> ModelSpec:
    """The same graph with so many times fewer filters, `CLASSES` logits, and another crop."""
    last = embedding_layer(spec)
    layers = tuple(_narrow(layer, by, last=i == last) for i, layer in enumerate(spec.layers))
    return ModelSpec(layers=layers, size=size)


def _narrow(layer: Layer, by: int, *, last: bool) -> Layer:
    match layer:
        case Conv():
            return msgspec.structs.replace(layer, filters=CLASSES if last else max(layer.filters // by, 2))
        case Linear():
            return msgspec.structs.replace(layer, units=CLASSES if last else max(layer.units // by, 2))
        case Patches():
            return msgspec.structs.replace(layer, width=layer.width // by)
        case _:
            return layer


@dataclass(frozen=True)
class Small:
    """A narrow model, the shape of its records, and where it is cut: (front, head)."""

    make: Callable[[], ModelSpec]
    shape: tuple[int, int, int]
    cuts: tuple[tuple[int, int], ...]
    batch: int = 8
    steps: int = 3

    @property
    def schema(self) -> DataSchema:
        """Of its records."""
        names = tuple(f"class {number}" for number in range(CLASSES))
        return DataSchema(shape=self.shape, classes=names, mean=(0.5,), std=(0.25,))

    @property
    def records(self) -> int:
        """As many as the steps of one epoch need, and some that are left out."""
        return self.batch * self.steps + 1

    def data(self) -> tuple[Tensor, Tensor]:
        """Pixels (N, C, H, W) u8 and labels (N,), the same in every run."""
        generator = torch.Generator().manual_seed(5)
        shape: Shape = (self.records, *self.shape)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(0, CLASSES, (self.records,), generator=generator)


SMALL: dict[str, Small] = {
    "18-layer": Small(lambda: narrow(cifar_18_layer(), 8, size=(12, 12)), (3, 14, 14), ((1, 2), (4, 2), (9, 4))),
    "10-layer": Small(lambda: narrow(cifar_10_layer(), 4, size=(12, 12)), (3, 14, 14), ((1, 1), (2, 3), (4, 2))),
    "resnet18": Small(lambda: narrow(resnet18_32(), 8), (3, 16, 16), ((2, 1), (9, 2), (21, 8))),
    "vit": Small(lambda: narrow(vit_small_32(), 4), (3, 16, 16), ((1, 1), (3, 2), (5, 4))),
    "mlp": Small(lambda: mlp(CLASSES, hidden=(24, 16, 12)), (1, 1, 20), ((2, 1), (3, 1), (2, 2))),
    "darknet": Small(
        lambda: narrow(cfg("darknet").model, 16, size=(128, 128)),
        (3, 132, 128),
        ((1, 1), (4, 2), (7, 5)),
        batch=4,
        steps=2,
    ),
    "extraction": Small(
        lambda: narrow(cfg("extraction").model, 16, size=(64, 64)), (3, 64, 64), ((1, 2), (5, 2), (11, 9)), 4, 2
    ),
    "densenet201": Small(
        lambda: narrow(cfg("densenet201").model, 16, size=(32, 32)), (3, 34, 34), ((4, 2), (60, 3), (141, 100)), 4, 1
    ),
}
FROM_FILES = frozenset({"darknet", "extraction", "densenet201"})
