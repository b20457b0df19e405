"""A package's model inside the enclave: its parts from the host's store, and what is computed with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.boundary.sealed import open_for
from caltrain.crypto.digests import same, to_text
from caltrain.enclave.door import Door
from caltrain.errors import IntegrityError
from caltrain.models.network import Network, build, lay_out
from caltrain.models.places import check_places
from caltrain.models.spec import cut_shapes, model_input, zone_ranges
from caltrain.models.weights import decode_state, load_zone
from caltrain.models.wheel import Factory
from caltrain.serving.package import CENTER, INSIDE, MAX_CENTER_BYTES, MAX_INSIDE_BYTES, InsidePart, Package, refuse
from caltrain.serving.precision import narrow, widen
from caltrain.training.batches import center_crop, normalise

_STEP = "load model"
LARGEST = 1e9
"""No record of a trained model has an IR with such a norm; on its way further it could overflow."""


class ServedModel:
    """FrontNet and HeadNet in the mode of inference; the CenterNet too where its work is audited.

    Records and what crosses are batches: (N, C, H, W) and one (N, ...) for each live tensor.
    """

    def __init__(self, package: Package, inside: InsidePart, *, center: bytes, factory: Factory) -> None:
        front, middle, head = zone_ranges(package.spec, package.terms.partition)
        self._package, self.classes = package, inside.classes
        self._front = _zone(package, front, inside.front, factory)
        self._center = _zone(package, middle, center, factory) if package.terms.audit else None
        self._head = _zone(package, head, inside.head, factory) if head else None
        # Before the softmax, so that its sums are those of the unsplit model. (The logits' own last bits may still be
        # others: in some sizes torch's kernels give an output other ones in another place.)
        self._places = torch.tensor(inside.order).argsort() if inside.order else None
        self.due = cut_shapes(package.spec, head.start, package.data.shape)
        """Shapes, for one record, of what the center gives back."""
        if package.terms.batch.fixed:
            check_places(self._front, [model_input(package.spec, package.data.shape)], package.terms.batch.rows)
            if self._head is not None:
                check_places(self._head, self.due, package.terms.batch.rows)

    @torch.inference_mode()
    def begin(self, records: Tensor) -> tuple[Tensor, ...]:
        """What crosses at the first cut, in float32, for records of the package's shape and element type."""
        package = self._package
        x = normalise(center_crop(records, package.spec.size), package.data, channels_last=True)
        return _through(self._front, (x,))

    @torch.inference_mode()
    def finish(self, live: Sequence[Tensor]) -> Tensor:
        """Probabilities (N, classes) in the order of the classes, from what the center gave."""
        (logits,) = _through(self._head, live)
        if self._places is not None:
            logits = logits[:, self._places]
        chances = logits.softmax(1)
        if self._package.terms.top is None or self._package.terms.top >= chances.shape[1]:
            return chances
        greatest = chances.topk(self._package.terms.top, dim=1)
        return torch.zeros_like(chances).scatter_(1, greatest.indices, greatest.values)

    @torch.inference_mode()
    def is_right(self, ir: Sequence[Tensor], out: Sequence[Tensor]) -> bool:
        """Whether a center that got `ir` as it was sent gives `out`, up to rounding, for each record.

        Each record has its own tolerance: one with huge values does not hide what is wrong with another.
        """
        terms = self._package.terms
        share = 1e-4 if terms.across == "f32" and terms.center == "cpu" else 2e-2
        own = _through(self._center, widen(ir, terms.across))
        return all(_close(mine, theirs, share) for mine, theirs in zip(own, out, strict=True))

    def send(self, live: Sequence[Tensor]) -> list[Tensor]:
        """As it crosses."""
        return narrow(live, self._package.terms.across)

    def receive(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As it is computed with. Raises ProtocolError `tensor.malformed`."""
        return widen(tensors, self._package.terms.across)


def load_model(package: Package, key: bytes, door: Door, *, factory: Factory) -> ServedModel:
    """Read the parts of a package and open the sealed one; the center's weights only where the terms ask for audits.

    Raises IntegrityError `package.other-part`, `sealed.*`, `weights.malformed`, ConfigError `package.other-inside`,
    `model.bits-by-place`, and what reading from the host raises.
    """
    sealed = _part(door, INSIDE, package.inside, limit=MAX_INSIDE_BYTES)
    inside = open_for(key, "package-inside/v1", sealed, InsidePart, context=package.id, step=_STEP)
    order = tuple(range(package.classes)) if package.terms.mapped else ()
    if len(inside.classes) != package.classes or tuple(sorted(inside.order)) != order:
        raise refuse("package.other-inside", "the sealed part has other classes, or another order, than the manifest")
    center = _part(door, CENTER, package.center_weights, limit=MAX_CENTER_BYTES) if package.terms.audit else b""
    return ServedModel(package, inside, center=center, factory=factory)


def is_below(most: float, live: Sequence[Tensor]) -> bool:
    """Whether each norm is: then nothing is NaN, infinite or beyond `most`, which takes one pass to see."""
    return all(float(torch.linalg.vector_norm(x)) < most for x in live)


def _part(door: Door, name: str, expected: str, *, limit: int) -> bytes:
    raw = door.read_all(name, limit=limit)
    if not same(to_text(hashlib.sha256(raw).digest()), expected):
        raise IntegrityError(
            "package.other-part",
            f"the host's {name} is not the one that the manifest names",
            step=_STEP,
            fix="Give the host the package as its owner made it.",
        )
    return raw


def _zone(package: Package, layers: range, raw: bytes, factory: Factory) -> Network:
    zone = build(package.spec, input_shape=package.data.shape, layers=layers, factory=factory)
    load_zone(zone, decode_state(raw, step=_STEP), step=_STEP)
    lay_out(zone, channels_last=True)
    return zone.eval()


def _through(zone: Network | None, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(live) if zone is None else zone.through(live)[0]


def _close(own: Tensor, theirs: Tensor, share: float) -> bool:
    apart = (own - theirs).flatten(1).abs().amax(1)
    return bool((apart <= share * own.flatten(1).abs().amax(1) + 1e-6).all())  # what is not a number is not below
