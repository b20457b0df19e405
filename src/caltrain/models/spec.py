"""A model as data: a bounded list of layers, its shapes, and its partition. Needs no torch.

The partition counts layers from both ends: `front` layers run in the enclave (FrontNet), the last `head` layers
too (HeadNet, with the loss), the rest outside (CenterNet). `head = 0` is the two-way form of arXiv:1812.03230,
FrontNet and BackNet; `head > 0` the ternary form, in which labels and logits stay inside.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import canonical_json, digest
from caltrain.errors import ConfigError

Activation = Literal["relu", "leaky", "none"]
Width = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Window = Annotated[int, msgspec.Meta(ge=1, le=64)]
MAX_LAYERS = 512
MAX_ACTIVATION = 1 << 26
MAX_WEIGHTS = 1 << 30
Shape = tuple[int, ...]


class _Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    pass


class Conv(_Layer, frozen=True, tag="conv"):
    """2-d convolution, optional batch normalisation, activation (one layer, as Darknet counts)."""

    filters: Width
    kernel: Window = 3
    stride: Window = 1
    padding: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    batch_norm: bool = False
    activation: Activation = "relu"


class MaxPool(_Layer, frozen=True, tag="maxpool"):
    """Max pooling without padding."""

    kernel: Window = 2
    stride: Window = 2


class AvgPool(_Layer, frozen=True, tag="avgpool"):
    """Global average pooling: (C, H, W) to (C,)."""


class Dropout(_Layer, frozen=True, tag="dropout"):
    """Dropout whose mask is drawn from the key (seed, epoch, step, layer)."""

    p: Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Flatten(_Layer, frozen=True, tag="flatten"):
    """(C, H, W) to (C*H*W,)."""


class Linear(_Layer, frozen=True, tag="linear"):
    """Fully connected layer and activation, on (D,)."""

    units: Width
    activation: Activation = "none"


Layer = Conv | MaxPool | AvgPool | Dropout | Flatten | Linear


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sequential model."""

    layers: Annotated[tuple[Layer, ...], msgspec.Meta(min_length=2, max_length=MAX_LAYERS)]

    def digest(self) -> str:
        """Digest of the architecture."""
        return digest("model-spec/v1", canonical_json(self))


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many layers run inside, from each end."""

    front: Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)]
    head: Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)] = 0
    unsafe_cut_at_input: bool = False

    @property
    def form(self) -> Literal["two-way", "ternary"]:
        """`two-way` shows labels to the host, `ternary` does not."""
        return "ternary" if self.head else "two-way"


def _refuse(code: str, what: str, fix: str = "Correct [model] in the plan.") -> ConfigError:
    return ConfigError(code, what, step="check model", fix=fix)


def _window(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _next_shape(index: int, layer: Layer, shape: Shape) -> Shape:
    if isinstance(layer, Dropout):
        return shape
    if isinstance(layer, Linear):
        if len(shape) != 1:
            raise _refuse("model.shape", f"layer {index} (linear) needs a vector, gets {shape}: flatten first")
        return (layer.units,)
    if len(shape) != 3:
        raise _refuse("model.shape", f"layer {index} ({type(layer).__name__}) needs an image, gets {shape}")
    channels, height, width = shape
    if isinstance(layer, Flatten):
        return (channels * height * width,)
    if isinstance(layer, AvgPool):
        return (channels,)
    padding = layer.padding if isinstance(layer, Conv) else 0
    out = tuple(_window(size, layer.kernel, layer.stride, padding) for size in (height, width))
    if min(out) < 1:
        raise _refuse("model.shape", f"layer {index}: a window of {layer.kernel} does not fit into {height}x{width}")
    return (layer.filters if isinstance(layer, Conv) else channels, *out)


def _weights(layer: Layer, shape: Shape) -> int:
    if isinstance(layer, Conv):
        return layer.filters * shape[0] * layer.kernel**2
    return layer.units * shape[0] if isinstance(layer, Linear) else 0


def layer_shapes(spec: ModelSpec, input_shape: Shape) -> tuple[Shape, ...]:
    """Shapes without the batch: entry i is the input of layer i, the last one the model's output.

    Raises ConfigError `model.shape`, or `model.too-large` (elements of one record's activation, weights in all).
    """
    shapes, weights = [input_shape], 0
    for index, layer in enumerate(spec.layers):
        shapes.append(_next_shape(index, layer, shapes[-1]))
        if math.prod(shapes[-1]) > MAX_ACTIVATION:
            raise _refuse("model.too-large", f"layer {index} gives {shapes[-1]} for one record")
        weights += _weights(layer, shapes[-2])
        if weights > MAX_WEIGHTS:
            raise _refuse("model.too-large", f"the model up to layer {index} has {weights} weights")
    return tuple(shapes)


def inner_weights(spec: ModelSpec, partition: Partition, input_shape: Shape) -> int:
    """Weights of FrontNet and HeadNet, without biases and normalisation."""
    shapes, outside = layer_shapes(spec, input_shape), range(partition.front, len(spec.layers) - partition.head)
    return sum(_weights(layer, shapes[i]) for i, layer in enumerate(spec.layers) if i not in outside)


def check_model(spec: ModelSpec, partition: Partition, *, input_shape: Shape, classes: int) -> None:
    """Raise ConfigError unless the model maps records to `classes` logits and can be cut as said."""
    out = layer_shapes(spec, input_shape)[-1]
    if out != (classes,):
        raise _refuse("model.classes", f"the model's output is {out}, the data have {classes} classes")
    last = spec.layers[-1]
    if not isinstance(last, Linear) or last.activation != "none":
        raise _refuse("model.no-logits", "the last layer must be linear without activation: it gives the logits")
    if partition.front + partition.head >= len(spec.layers):
        raise _refuse("model.partition", f"front {partition.front} and head {partition.head} leave no CenterNet")
    if partition.front == 0 and not partition.unsafe_cut_at_input:
        raise _refuse(
            "model.cut-at-input",
            "front = 0 would send the records themselves to the host",
            "Give the FrontNet at least one layer.",
        )
    center = spec.layers[partition.front : len(spec.layers) - partition.head]
    for zone, layers in (("CenterNet", center), ("FrontNet", spec.layers[: partition.front])):
        if layers and not any(isinstance(layer, Conv | Linear) for layer in layers):
            raise _refuse("model.partition", f"the {zone} has no weights; move the cut")
