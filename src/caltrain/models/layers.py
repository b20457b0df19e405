"""The layers that a model may be made of, as data: what each reads, the shape it gives, how many weights it has.

Needs no torch. Layers are numbered from 0; number -1 is the model's input. A layer reads the one before it unless it
says otherwise, so a list of layers is a graph without cycles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from caltrain.errors import ConfigError

Activation = Literal["relu", "leaky", "none"]
Width = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Window = Annotated[int, msgspec.Meta(ge=1, le=64)]
Margin = Annotated[int, msgspec.Meta(ge=0, le=64)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
MAX_LAYERS = 512
Number = Annotated[int, msgspec.Meta(ge=-1, lt=MAX_LAYERS)]
StageName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,60}\Z")]
Extent = Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
Shape = tuple[int, ...]


class _Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    pass


class Conv(_Layer, frozen=True, tag="conv"):
    """2-d convolution, optional batch normalisation (then without a bias), activation: one layer, as Darknet counts."""

    filters: Width
    kernel: Window = 3
    stride: Window = 1
    padding: Margin = 1
    batch_norm: bool = False
    activation: Activation = "relu"


class MaxPool(_Layer, frozen=True, tag="maxpool"):
    """Max pooling. `padding` is the sum of both sides, the smaller half in front, as Darknet has it."""

    kernel: Window = 2
    stride: Window = 2
    padding: Margin = 0


class AvgPool(_Layer, frozen=True, tag="avgpool"):
    """Global average pooling: (C, H, W) to (C,), or tokens (T, D) to (D,)."""


class Dropout(_Layer, frozen=True, tag="dropout"):
    """Dropout whose mask is drawn from the key (seed, epoch, step, layer)."""

    p: Share


class Flatten(_Layer, frozen=True, tag="flatten"):
    """(C, H, W) to (C*H*W,)."""


class Linear(_Layer, frozen=True, tag="linear"):
    """Fully connected layer and activation, on (D,)."""

    units: Width
    activation: Activation = "none"


class Shortcut(_Layer, frozen=True, tag="shortcut"):
    """The layer before plus an earlier one of the same shape, then an activation: a residual connection."""

    source: Number
    activation: Activation = "none"


class Route(_Layer, frozen=True, tag="route"):
    """Earlier layers, joined along the channels; with one source, a way back to it."""

    sources: Annotated[tuple[Number, ...], msgspec.Meta(min_length=1, max_length=32)]


class Patches(_Layer, frozen=True, tag="patches"):
    """(C, H, W) in squares of `size` to tokens (T, width), with a learned position each (arXiv:2010.11929)."""

    size: Window
    width: Width


class Transformer(_Layer, frozen=True, tag="transformer"):
    """Pre-norm attention and two-layer perceptron on tokens (T, D), each with its residual (arXiv:2010.11929)."""

    heads: Annotated[int, msgspec.Meta(ge=1, le=256)]
    ratio: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    p: Share = 0.0


class Norm(_Layer, frozen=True, tag="norm"):
    """Layer normalisation of tokens (T, D)."""


class Stage(_Layer, frozen=True, tag="stage"):
    """A module of the plan's wheel, by name: it maps one record to `shape` and has `weights` parameters."""

    name: StageName
    shape: Annotated[tuple[Extent, ...], msgspec.Meta(min_length=1, max_length=3)]
    weights: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]


Layer = Conv | MaxPool | AvgPool | Dropout | Flatten | Linear | Shortcut | Route | Patches | Transformer | Norm | Stage


def refuse(code: str, what: str, fix: str = "Correct [model] in the plan.") -> ConfigError:
    """The error for a model that cannot be."""
    return ConfigError(code, what, step="check model", fix=fix)


def sources_of(index: int, layer: Layer) -> tuple[int, ...]:
    """Numbers of the outputs that layer `index` reads, in the order in which it takes them."""
    match layer:
        case Shortcut():
            return (index - 1, layer.source)
        case Route():
            return layer.sources
        case _:
            return (index - 1,)


def shape_of(index: int, layer: Layer, inputs: Sequence[Shape]) -> Shape:  # noqa: PLR0911, PLR0912  # one case a type of layer
    """What layer `index` gives for one record. Raises ConfigError `model.shape`."""
    first, name = inputs[0], type(layer).__name__.lower()
    needed = {Linear: 1, Transformer: 2, Norm: 2, Conv: 3, MaxPool: 3, Flatten: 3, Patches: 3}.get(type(layer))
    if needed is not None and len(first) != needed:
        raise refuse("model.shape", f"layer {index} ({name}) needs {needed} dimensions, gets {first}")
    match layer:
        case Dropout() | Norm():
            return first
        case Linear():
            return (layer.units,)
        case Flatten():
            return (math.prod(first),)
        case Stage():
            return layer.shape
        case AvgPool():
            if len(first) == 1:
                raise refuse("model.shape", f"layer {index} (avgpool) has nothing to average over in {first}")
            return (first[0],) if len(first) == 3 else (first[1],)
        case Shortcut() | Route():
            return _joined(index, name, inputs, layer)
        case Transformer():
            if first[1] % layer.heads:
                raise refuse("model.shape", f"layer {index}: {layer.heads} heads do not divide a width of {first[1]}")
            return first
        case Patches():
            if first[1] % layer.size or first[2] % layer.size:
                raise refuse("model.shape", f"layer {index}: squares of {layer.size} do not fill {first}")
            return (first[1] // layer.size * (first[2] // layer.size), layer.width)
        case Conv() | MaxPool():
            return _windowed(index, layer, first)


def _joined(index: int, name: str, inputs: Sequence[Shape], layer: Shortcut | Route) -> Shape:
    first = inputs[0]
    alike = inputs if isinstance(layer, Shortcut) else [(first[0], *shape[1:]) for shape in inputs]
    if any(shape != first for shape in alike):
        raise refuse("model.shape", f"layer {index} ({name}) cannot join {', '.join(map(str, inputs))}")
    if isinstance(layer, Shortcut):
        return first
    return (sum(shape[0] for shape in inputs), *first[1:])


def _windowed(index: int, layer: Conv | MaxPool, shape: Shape) -> Shape:
    padding = 2 * layer.padding if isinstance(layer, Conv) else layer.padding
    out = tuple((size + padding - layer.kernel) // layer.stride + 1 for size in shape[1:])
    if min(out) < 1 or (isinstance(layer, MaxPool) and layer.padding >= layer.kernel):
        raise refuse("model.shape", f"layer {index}: a window of {layer.kernel} does not fit into {shape[1:]}")
    return (layer.filters if isinstance(layer, Conv) else shape[0], *out)


def weights_of(layer: Layer, shape: Shape) -> int:
    """Weights of a layer whose (first) input has `shape`, without biases and normalisation."""
    match layer:
        case Conv():
            return layer.filters * shape[0] * layer.kernel**2
        case Linear():
            return layer.units * shape[0]
        case Patches():
            return layer.width * (shape[0] * layer.size**2 + shape[1] * shape[2] // layer.size**2)
        case Transformer():
            return shape[1] ** 2 * (4 + 2 * layer.ratio)
        case Stage():
            return layer.weights
        case _:
            return 0


def macs_of(layer: Layer, shape: Shape, out: Shape) -> int:
    """Multiply-accumulates for one record from (first) input `shape` to `out`; 0 for a stage, whose are not known."""
    match layer:
        case Conv():
            return weights_of(layer, shape) * math.prod(out[1:])
        case Linear():
            return weights_of(layer, shape)
        case Patches():
            return layer.width * shape[0] * layer.size**2 * out[0]
        case Transformer():
            return weights_of(layer, shape) * shape[0] + 2 * shape[0] ** 2 * shape[1]
        case _:
            return 0


def has_weights(layer: Layer) -> bool:
    """Whether a layer learns (a normalisation alone does not count)."""
    return isinstance(layer, Conv | Linear | Patches | Transformer) or (isinstance(layer, Stage) and layer.weights > 0)
