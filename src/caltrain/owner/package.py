"""Split a model for serving, seal what the host must not see, sign the manifest."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from caltrain.boundary.sealed import seal_for
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.kdf import derive
from caltrain.exposure.subject import Subject
from caltrain.models.layers import Conv, Linear
from caltrain.models.places import check_places
from caltrain.models.spec import check_cut, embedding_layer, zone_ranges
from caltrain.models.weights import State, encode_state, state_of
from caltrain.serving.folder import part_digest, write_folder
from caltrain.serving.package import (
    KIND,
    InsidePart,
    Package,
    Terms,
    check_package,
    refuse,
)


def package_model(
    subject: Subject, terms: Terms, *, signer: SigningKey, data_key: bytes, folder: Path, wheel: bytes = b""
) -> Package:
    """Write the package of a model to `folder` and return its manifest. `data_key` is the owner's.

    Raises ConfigError `package.*`, `model.*` before anything is written, EnvironmentFault.
    """
    check_cut(subject.spec, terms.partition)
    if part_digest(wheel) != (subject.spec.wheel.sha256 if subject.spec.wheel else part_digest(b"")):
        raise refuse("package.other-wheel", "the wheel is not the one that the model names")
    if terms.batch.fixed:
        check_places(subject.module, [subject.shape], terms.batch.rows)
    identity = os.urandom(16).hex()
    order = _secret_order(len(subject.data.classes)) if terms.mapped else ()
    front, center, head = _zones(subject, terms, order)
    part = InsidePart(front=front, head=head, classes=subject.data.classes, order=order)
    inside = seal_for(package_key(data_key, identity), "package-inside/v1", part, context=identity)
    package = _manifest(subject, terms, identity, owner=signer.public, inside=inside, center=center)
    envelope = signer.sign(KIND, package)
    write_folder(folder, envelope, inside=inside, center=center, wheel=wheel)
    return package


def package_key(data_key: bytes, identity: str) -> bytes:
    """The key of a package's sealed part: the owner can always make it again, and each package has its own."""
    return derive(data_key, "package-key/v1", bytes.fromhex(identity))


def _manifest(subject: Subject, terms: Terms, identity: str, *, owner: str, inside: bytes, center: bytes) -> Package:
    numbers = tuple(map(str, range(len(subject.data.classes))))
    package = Package(
        id=identity,
        owner=owner,
        terms=terms,
        model=subject.digest,
        spec=subject.spec,
        data=msgspec.structs.replace(subject.data, classes=numbers),
        inside=part_digest(inside),
        center_weights=part_digest(center),
    )
    return check_package(package)


def _zones(subject: Subject, terms: Terms, order: Sequence[int]) -> tuple[bytes, bytes, bytes]:
    state = state_of(subject.module)
    if order:
        state = _reordered(state, subject, order)
    front, center, head = (encode_state(_of(state, part)) for part in zone_ranges(subject.spec, terms.partition))
    return front, center, head


def _of(state: State, part: range) -> State:
    return {name: value for name, value in state.items() if int(name.partition(".")[0]) in part}


def _secret_order(classes: int) -> tuple[int, ...]:
    order = list(range(classes))
    random.SystemRandom().shuffle(order)
    return tuple(order)


def _reordered(state: State, subject: Subject, order: Sequence[int]) -> dict[str, Tensor]:
    """The state of a model whose output `i` is class `order[i]` of the given one."""
    last = embedding_layer(subject.spec)
    if not isinstance(subject.spec.layers[last], Conv | Linear):
        raise refuse(
            "package.not-mappable", "only the outputs of a convolution or a linear layer can be put into another order"
        )
    rows = list(order)
    return {
        name: value[rows] if name.startswith(f"{last}.") and value.dim() else value for name, value in state.items()
    }
