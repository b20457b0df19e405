"""A Darknet .weights file with drawn numbers, written independently of the reader, and what it means by hand."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from caltrain.models.layers import Conv, Linear, Shape, sources_of
from caltrain.models.spec import ModelSpec, layer_shapes

Parts = dict[str, NDArray[np.float32]]
HEAD = struct.pack("<3iQ", 0, 2, 0, 128_000)


def drawn_parts(spec: ModelSpec, record: Shape, *, seed: int = 0) -> list[Parts]:
    """Of each layer its arrays, named and ordered as in Darknet's `save_weights`."""
    rng = np.random.default_rng(seed)
    shapes = layer_shapes(spec, record)
    layers = []
    for i, layer in enumerate(spec.layers):
        inputs = shapes[sources_of(i, layer)[0] + 1]
        parts: Parts = {}
        if isinstance(layer, Conv):
            n, size = layer.filters, (layer.filters, inputs[0], layer.kernel, layer.kernel)
            parts["biases"] = rng.normal(0, 0.1, n).astype("<f4")
            if layer.batch_norm:
                parts["scales"] = rng.uniform(0.5, 1.5, n).astype("<f4")
                parts["mean"] = rng.normal(0, 0.2, n).astype("<f4")
                parts["variance"] = rng.uniform(0.2, 2, n).astype("<f4")
            parts["weights"] = rng.normal(0, (2 / np.prod(size[1:])) ** 0.5, size).astype("<f4")
        elif isinstance(layer, Linear):
            parts["biases"] = rng.normal(0, 0.1, layer.units).astype("<f4")
            parts["weights"] = rng.normal(0, inputs[0] ** -0.5, (layer.units, inputs[0])).astype("<f4")
        layers.append(parts)
    return layers


def weights_file(layers: list[Parts], head: bytes = HEAD) -> bytes:
    """The file of these layers."""
    return head + b"".join(array.tobytes() for parts in layers for array in parts.values())


def forward(spec: ModelSpec, layers: list[Parts], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convolutions (normalised or not) and connected layers of one picture (C, H, W), by Darknet's formulas."""
    for layer, parts in zip(spec.layers, layers, strict=True):
        if isinstance(layer, Conv):
            x = _convolved(x, parts["weights"], layer)
            if layer.batch_norm:
                x = (x - _channels(parts["mean"])) / (np.sqrt(_channels(parts["variance"])) + 0.000001)
                x = x * _channels(parts["scales"])
            x = x + _channels(parts["biases"])
            x = np.where(x > 0, x, 0.1 * x) if layer.activation == "leaky" else x
        elif isinstance(layer, Linear):
            x = parts["weights"].astype(np.float64) @ x + parts["biases"]
        else:
            x = x.reshape(-1)
    return x


def _channels(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return values.astype(np.float64)[:, None, None]


def _convolved(x: NDArray[np.float64], weights: NDArray[np.float32], layer: Conv) -> NDArray[np.float64]:
    margin, stride, size = layer.padding, layer.stride, layer.kernel
    x = np.pad(x, ((0, 0), (margin, margin), (margin, margin)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    out: NDArray[np.float64] = np.einsum("nckl,chwkl->nhw", weights.astype(np.float64), windows)
    return out
