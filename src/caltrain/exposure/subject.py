"""A trained model under assessment: what its first layers see, and what crosses at each cut.

*Pictures* are records as the first layer sees them, cropped and scaled to 0..1, but not yet normalised: (N, C, H, W)
float32. All measures compare pictures; all attacks look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import ConfigError, DataError, IntegrityError
from caltrain.models.layers import Shape
from caltrain.models.network import Network, build, lay_out, zone_of
from caltrain.models.spec import ModelSpec, Partition, check_cut, check_model, model_input
from caltrain.models.weights import State, load_zone, model_digest
from caltrain.models.wheel import Factory, no_wheel
from caltrain.records.schema import DataSchema, check_schema
from caltrain.training.batches import center_crop, normalise

Live = tuple[Tensor, ...]
Defence = Callable[[Live], Live]
_STEP = "assess exposure"


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, whose parameters take no gradients."""

    spec: ModelSpec
    data: DataSchema
    module: Network
    digest: str
    factory: Factory = no_wheel
    """Makes the stages of a party's wheel, for who trains another network of this architecture."""

    @property
    def shape(self) -> Shape:
        """Shape of one picture: (C, H, W)."""
        return model_input(self.spec, self.data.shape)

    def pictures(self, elements: Tensor) -> Tensor:
        """Pictures of records (N, C, H, W) of the schema. Raises DataError `exposure.schema` for others."""
        kind = torch.uint8 if self.data.dtype == "u8" else torch.float32
        if tuple(elements.shape[1:]) != self.data.shape or elements.dtype != kind or not len(elements):
            raise DataError(
                "exposure.schema",
                f"records of {tuple(elements.shape)} {elements.dtype}, the model takes {self.data.shape} {kind}",
                step=_STEP,
                fix="Give records of the data set, or of the schema, that the model was trained on.",
            )
        low, high = self._span
        return ((center_crop(elements, self.spec.size).float() - low) / (high - low)).clamp(0, 1).contiguous()

    def inputs(self, pictures: Tensor) -> Tensor:
        """What the first layer computes with: pictures, normalised. Differentiable."""
        low, high = self._span
        return normalise(pictures * (high - low) + low, self.data, channels_last=True)

    def logits(self, pictures: Tensor) -> Tensor:
        """(N, classes)."""
        logits: Tensor = self.module(self.inputs(pictures))
        return logits

    @property
    def _span(self) -> tuple[float, float]:
        """Least and largest value of an element; of floats, four standard deviations on both sides."""
        if self.data.dtype == "u8":
            return 0.0, 255.0
        pairs = [(mean - 4 * std, mean + 4 * std) for mean in self.data.mean for std in self.data.std]
        return min(low for low, _ in pairs), max(high for _, high in pairs)


def subject_of(spec: ModelSpec, data: DataSchema, state: State, *, factory: Factory = no_wheel) -> Subject:
    """A subject from weights. Raises ConfigError unless the model fits the schema, IntegrityError for bad weights."""
    check_schema(data)
    check_model(spec, Partition(front=candidate_cuts(spec)[0]), input_shape=data.shape, classes=len(data.classes))
    module = build(spec, input_shape=data.shape, factory=factory)
    load_zone(module, state, step=_STEP)
    return subject_from(spec, data, module, digest=model_digest(spec, state), factory=factory)


def subject_from(
    spec: ModelSpec, data: DataSchema, module: Network, *, digest: str, factory: Factory = no_wheel
) -> Subject:
    """A subject that is `module` itself, set to eval mode and frozen."""
    lay_out(module, channels_last=True)
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    return Subject(spec, data, module, digest, factory)


def candidate_cuts(spec: ModelSpec) -> tuple[int, ...]:
    """Every number of layers that a FrontNet may have, ascending. Raises ConfigError `exposure.no-cuts`."""
    found = tuple(front for front in range(1, len(spec.layers)) if _can_be_cut(spec, front))
    if not found:
        raise ConfigError(
            "exposure.no-cuts",
            "the model cannot be cut anywhere: no cut leaves weights on both sides",
            step=_STEP,
            fix="Assess a model with at least two layers that have weights.",
        )
    return found


def check_front(spec: ModelSpec, front: int) -> None:
    """Raise ConfigError unless the model can be cut after `front` layers, naming the cuts at which it can."""
    if front < 1 or not _can_be_cut(spec, front):
        raise ConfigError(
            "exposure.cut",
            f"the model cannot be cut after {front} layers",
            step=_STEP,
            fix=f"Choose among {', '.join(map(str, candidate_cuts(spec)))}.",
        )


def _can_be_cut(spec: ModelSpec, front: int) -> bool:
    try:
        check_cut(spec, Partition(front=front))
    except ConfigError:
        return False
    return True


def undefended(live: Live) -> Live:
    """What crosses, as it is."""
    return live


class Cut:
    """One cut of a subject: what the host sees of pictures, and what it computes from that."""

    def __init__(self, subject: Subject, front: int, defence: Defence = undefended) -> None:
        check_front(subject.spec, front)
        self.subject, self.front, self.defence = subject, front, defence
        self._front = zone_of(subject.module, subject.spec, range(front))
        self._rest = zone_of(subject.module, subject.spec, range(front, len(subject.spec.layers)))

    def ir(self, pictures: Tensor) -> Live:
        """The intermediate representation (IR): one tensor for each live one, (N, ...) each. Differentiable.

        Raises IntegrityError `exposure.not-finite`.
        """
        live = self.defence(self._front.through((self.subject.inputs(pictures),))[0])
        for tensor in live:
            check_finite(tensor, f"what crosses at cut {self.front}")
        return live

    def stacked(self, pictures: Tensor) -> Tensor:
        """The IR as one tensor (N, channels, h, w): see `stacked`."""
        return stacked(self.ir(pictures))

    def answer(self, live: Live) -> Tensor:
        """Logits (N, classes) that the rest of the model gives for an IR."""
        (logits,), _ = self._rest.through(live)
        return logits


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise IntegrityError `exposure.not-finite`, saying `what` is not."""
    if not bool(torch.isfinite(tensor).all()):
        raise IntegrityError(
            "exposure.not-finite",
            f"{what} is not finite",
            step=_STEP,
            fix="Assess a model whose weights are of a finished training.",
        )


def stacked(live: Live) -> Tensor:
    """Tensors that cross together as one (N, channels, h, w): planes of the largest size, others repeated to it.

    Vectors (N, D) become D planes of 1x1; tokens (N, T, D) D planes of a square where T is one, else of T x 1.
    """
    planes = [_planes(tensor) for tensor in live]
    size = max(plane.shape[2] for plane in planes), max(plane.shape[3] for plane in planes)
    return torch.cat([p if p.shape[2:] == size else F.interpolate(p, size=size) for p in planes], dim=1)


def _planes(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    count, tokens, width = tensor.shape
    side = round(tokens**0.5)
    square = (side, side) if side * side == tokens else (tokens, 1)
    return tensor.transpose(1, 2).reshape(count, width, *square)
