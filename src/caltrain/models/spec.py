"""A model as data: a bounded list of layers, its shapes, and its partition. Needs no torch.

The partition counts layers from both ends: `front` layers run in the enclave (FrontNet), the last `head` layers
too (HeadNet, with the loss), the rest outside (CenterNet). `head = 0` is the two-way form of arXiv:1812.03230,
FrontNet and BackNet; `head > 0` the ternary form, in which labels and logits stay inside. At a cut cross the outputs
of all earlier layers that a later one still reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.models.layers import (
    MAX_LAYERS,
    AvgPool,
    Flatten,
    Layer,
    Linear,
    Shape,
    Stage,
    has_weights,
    macs_of,
    refuse,
    shape_of,
    sources_of,
    weights_of,
)

MAX_ACTIVATION = 1 << 26
MAX_WEIGHTS = 1 << 30
MAX_LIVE = 32
MAX_WHEEL_BYTES = 16 << 20
Side = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Cut = Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)]


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A pure-Python wheel whose `factory` (`package.module:function`) makes a `Stage` by its name."""

    sha256: Digest
    factory: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][\w.]{0,199}:[A-Za-z_]\w{0,99}\Z")]


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Layers in order. With `size`, records are cropped to (height, width) before the first one."""

    layers: Annotated[tuple[Layer, ...], msgspec.Meta(min_length=2, max_length=MAX_LAYERS)]
    size: tuple[Side, Side] | None = None
    wheel: Wheel | None = None

    def digest(self) -> str:
        """Digest of the architecture."""
        return digest("model-spec/v1", canonical_json(self))


class Deepen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From `epoch` on, the FrontNet has at least `front` layers."""

    epoch: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    front: Cut


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many layers run inside, from each end, and when the cut deepens."""

    front: Cut
    head: Cut = 0
    deepen: Annotated[tuple[Deepen, ...], msgspec.Meta(max_length=64)] = ()
    unsafe_cut_at_input: bool = False

    @property
    def form(self) -> Literal["two-way", "ternary"]:
        """`two-way` shows labels to the host, `ternary` does not."""
        return "ternary" if self.head else "two-way"

    def front_at(self, epoch: int) -> int:
        """Layers of the FrontNet in `epoch`, by the schedule."""
        return max([self.front, *(step.front for step in self.deepen if step.epoch <= epoch)])

    def at(self, front: int) -> Partition:
        """This partition with another number of layers in the FrontNet, and no schedule."""
        return msgspec.structs.replace(self, front=front, deepen=())


def model_input(spec: ModelSpec, record: Shape) -> Shape:
    """What the first layer sees of records of that shape. Raises ConfigError `model.size`."""
    if spec.size is None:
        return record
    if len(record) != 3 or spec.size[0] > record[1] or spec.size[1] > record[2]:
        raise refuse("model.size", f"records of {record} cannot be cropped to {spec.size}")
    return (record[0], *spec.size)


def layer_shapes(spec: ModelSpec, input_shape: Shape) -> tuple[Shape, ...]:
    """Shapes for one record of `input_shape`: entry 0 is what the first layer sees, entry i + 1 what layer i gives.

    Raises ConfigError `model.shape`, or `model.too-large` (elements of one record's activation, weights in all).
    """
    shapes, weights = [model_input(spec, input_shape)], 0
    for index, layer in enumerate(spec.layers):
        sources = sources_of(index, layer)
        if max(sources) >= index:
            raise refuse("model.shape", f"layer {index} reads layer {max(sources)}, which is not before it")
        inputs = [shapes[source + 1] for source in sources]
        shapes.append(shape_of(index, layer, inputs))
        if math.prod(shapes[-1]) > MAX_ACTIVATION:
            raise refuse("model.too-large", f"layer {index} gives {shapes[-1]} for one record")
        weights += weights_of(layer, inputs[0])
        if weights > MAX_WEIGHTS:
            raise refuse("model.too-large", f"the model up to layer {index} has {weights} weights")
    return tuple(shapes)


def live_at(layers: Sequence[Layer], cut: int) -> tuple[int, ...]:
    """Numbers of the outputs before `cut` that are still needed there, ascending; after the end, the last one."""
    if cut == len(layers):
        return (cut - 1,)
    needed = {s for i in range(cut, len(layers)) for s in sources_of(i, layers[i]) if s < cut}
    return tuple(sorted(needed))


def cut_shapes(spec: ModelSpec, cut: int, input_shape: Shape) -> tuple[Shape, ...]:
    """Shapes, for one record, of the tensors that cross at `cut`."""
    shapes = layer_shapes(spec, input_shape)
    return tuple(shapes[number + 1] for number in live_at(spec.layers, cut))


def embedding_layer(spec: ModelSpec) -> int:
    """The last layer with weights: its input is the penultimate embedding (arXiv:1812.03230, fingerprint F)."""
    return max(i for i, layer in enumerate(spec.layers) if has_weights(layer))


def zone_ranges(spec: ModelSpec, partition: Partition) -> tuple[range, range, range]:
    """Layer numbers of FrontNet, CenterNet and HeadNet."""
    total = len(spec.layers)
    return (
        range(partition.front),
        range(partition.front, total - partition.head),
        range(total - partition.head, total),
    )


def inner_weights(spec: ModelSpec, partition: Partition, input_shape: Shape) -> int:
    """Weights of FrontNet (at its deepest) and HeadNet, without biases and normalisation."""
    shapes = layer_shapes(spec, input_shape)
    outside = zone_ranges(spec, partition.at(partition.front_at(10_000)))[1]
    return sum(
        weights_of(layer, shapes[sources_of(i, layer)[0] + 1])
        for i, layer in enumerate(spec.layers)
        if i not in outside
    )


def macs(spec: ModelSpec, input_shape: Shape) -> int:
    """Multiply-accumulates of one record's way forward: convolutions, linear layers, attention. Stages are unknown."""
    shapes = layer_shapes(spec, input_shape)
    return sum(
        macs_of(layer, shapes[sources_of(i, layer)[0] + 1], shapes[i + 1]) for i, layer in enumerate(spec.layers)
    )


def check_model(spec: ModelSpec, partition: Partition, *, input_shape: Shape, classes: int) -> None:
    """Raise ConfigError unless the model maps records to `classes` logits and can be cut as said, in every epoch."""
    out = layer_shapes(spec, input_shape)[-1]
    if out != (classes,):
        raise refuse("model.classes", f"the model's output is {out}, the data have {classes} classes")
    last = spec.layers[-1]
    if not isinstance(last, Linear | AvgPool | Flatten | Stage) or getattr(last, "activation", "none") != "none":
        raise refuse("model.no-logits", "the last layer must give logits: linear without activation, or a pooling")
    if any(isinstance(layer, Stage) for layer in spec.layers) and spec.wheel is None:
        raise refuse("model.no-wheel", "a stage needs the wheel that it comes from", "Name the wheel in [model.wheel].")
    for before, after in itertools.pairwise((Deepen(epoch=0, front=partition.front), *partition.deepen)):
        if after.front <= before.front or after.epoch <= before.epoch:
            raise refuse(
                "model.not-deeper",
                f"in epoch {after.epoch} the cut would go from {before.front} to {after.front}",
                "Within a run the cut only deepens, epoch by epoch.",
            )
    for front in (partition.front, *(step.front for step in partition.deepen)):
        check_cut(spec, partition.at(front))


def check_cut(spec: ModelSpec, partition: Partition) -> None:
    """Raise ConfigError unless the three zones are as a run needs them."""
    if partition.front + partition.head >= len(spec.layers):
        raise refuse("model.partition", f"front {partition.front} and head {partition.head} leave no CenterNet")
    if -1 in live_at(spec.layers, partition.front) and not partition.unsafe_cut_at_input:
        raise refuse(
            "model.cut-at-input",
            f"front = {partition.front} would send the records themselves to the host",
            "Give the FrontNet at least one layer, and every layer that reads the model's input.",
        )
    front, center, head = zone_ranges(spec, partition)
    for zone, layers in (("CenterNet", center), ("FrontNet", front)):
        if layers and not any(has_weights(spec.layers[i]) for i in layers):
            raise refuse("model.partition", f"the {zone} has no weights; move the cut")
    for cut in (partition.front, head.start):
        if len(live_at(spec.layers, cut)) > MAX_LIVE:
            raise refuse("model.partition", f"more than {MAX_LIVE} tensors would cross before layer {cut}")
