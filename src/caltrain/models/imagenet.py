"""The ImageNet networks of DeepEnclave's evaluation (arXiv:1807.00969), as Darknet's files have them. Needs no torch.

Which they are is remembered of the papers, their layers are those of `darknet.cfg`, `extraction.cfg` and
`densenet201.cfg`; softmax and cost, which Darknet counts, are not layers here.
"""

from __future__ import annotations

from caltrain.models.layers import AvgPool, Conv, Layer, Linear, MaxPool, Route
from caltrain.models.spec import ModelSpec

CLASSES = 1000
RECORD = {"darknet": (3, 256, 256), "extraction": (3, 224, 224), "densenet201": (3, 256, 256)}


def _conv(filters: int, kernel: int = 3, stride: int = 1) -> Conv:
    return Conv(filters=filters, kernel=kernel, stride=stride, padding=kernel // 2, batch_norm=True, activation="leaky")


def darknet_reference(classes: int = CLASSES) -> ModelSpec:
    """Darknet Reference: 256x256 in colour."""
    layers: list[Layer] = []
    for width in (16, 32, 64, 128, 256, 512):
        layers += [_conv(width), MaxPool()]
    return ModelSpec(layers=(*layers, _conv(1024), AvgPool(), Linear(units=classes)), size=(256, 256))


def extraction(classes: int = CLASSES) -> ModelSpec:
    """Extraction: 224x224 in colour."""
    layers: list[Layer] = [_conv(64, 7, 2), MaxPool(), _conv(192), MaxPool()]
    layers += [_conv(128, 1), _conv(256), _conv(256, 1), _conv(512), MaxPool()]
    layers += [_conv(256, 1), _conv(512)] * 4
    layers += [_conv(512, 1), _conv(1024), MaxPool()]
    layers += [_conv(512, 1), _conv(1024)] * 2
    end = Conv(filters=classes, kernel=1, padding=0, activation="leaky")
    return ModelSpec(layers=(*layers, end, AvgPool()), size=(224, 224))


def densenet201(classes: int = CLASSES) -> ModelSpec:
    """DenseNet-201 (arXiv:1608.06993): 256x256 in colour. Each pair's output is put before all that came so far.

    After the third block Darknet's file goes on with 512 channels, where half of what there is would be 896.
    """
    layers: list[Layer] = [_conv(64, 7, 2), MaxPool()]
    for pairs, narrowed in ((6, 128), (12, 256), (48, 512), (32, None)):
        for _ in range(pairs):
            so_far = len(layers) - 1
            layers += [_conv(128, 1), _conv(32)]
            layers.append(Route(sources=(len(layers) - 1, so_far)))
        if narrowed is not None:
            layers += [_conv(narrowed, 1), MaxPool()]
    end = Conv(filters=classes, kernel=1, padding=0, activation="none")
    return ModelSpec(layers=(*layers, end, AvgPool()), size=(256, 256))


NETWORKS = {"darknet": darknet_reference, "extraction": extraction, "densenet201": densenet201}
