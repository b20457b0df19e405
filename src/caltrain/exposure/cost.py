"""What a cut costs: compute and weights inside, bytes across. Needs no torch."""

from __future__ import annotations

import math

import msgspec

from caltrain.exposure.figures import Count
from caltrain.models import layers as m
from caltrain.models.layers import Layer, Stage, macs_of, sources_of, weights_of
from caltrain.models.spec import ModelSpec, cut_shapes, layer_shapes
from caltrain.records.schema import DataSchema


class CutCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of a FrontNet of `front` layers, the last of which is `layer`.

    `compute` and `weights` are the shares (0..1) inside of the model's multiply-accumulates, None where a stage hides
    them, and of its weights. `bytes_across`: of one record's IR in float32; `ratio`: how many times the record's own.
    """

    front: Count
    layer: str
    compute: float | None
    weights: float
    bytes_across: Count
    ratio: float


def cost_of(spec: ModelSpec, data: DataSchema, front: int) -> CutCost:
    """The cost of a cut at which the model can be cut (see `check_front`)."""
    shapes = layer_shapes(spec, data.shape)
    inputs = [shapes[sources_of(i, layer)[0] + 1] for i, layer in enumerate(spec.layers)]
    macs = [macs_of(*of) for of in zip(spec.layers, inputs, shapes[1:], strict=True)]
    weights = [weights_of(*of) for of in zip(spec.layers, inputs, strict=True)]
    unknown = any(isinstance(layer, Stage) for layer in spec.layers)
    across = 4 * sum(math.prod(shape) for shape in cut_shapes(spec, front, data.shape))
    return CutCost(
        front=front,
        layer=describe(spec.layers[front - 1]),
        compute=None if unknown else sum(macs[:front]) / sum(macs),
        weights=sum(weights[:front]) / sum(weights),
        bytes_across=across,
        ratio=across / (math.prod(data.shape) * data.numpy_dtype.itemsize),
    )


def describe(layer: Layer) -> str:  # noqa: PLR0911  # one case a type of layer
    """A layer as people say it: `conv 128 3x3`, `maxpool 2`, `linear 10`."""
    match layer:
        case m.Conv():
            stride = f" /{layer.stride}" if layer.stride > 1 else ""
            return f"conv {layer.filters} {layer.kernel}x{layer.kernel}{stride}"
        case m.MaxPool():
            return f"maxpool {layer.kernel}"
        case m.Dropout():
            return f"dropout {layer.p:g}"
        case m.Linear():
            return f"linear {layer.units}"
        case m.Patches():
            return f"patches {layer.width} {layer.size}x{layer.size}"
        case m.Transformer():
            return f"transformer {layer.heads} heads"
        case m.Stage():
            return f"stage {layer.name}"
        case _:
            return type(layer).__name__.lower()
