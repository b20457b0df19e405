"""A package's parts inside: nothing but what the manifest names is computed with, and the audit sees what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.boundary.messages import MAX_CHUNK
from caltrain.boundary.sealed import seal_for
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.digests import to_text
from caltrain.enclave import served_model as module
from caltrain.enclave.door import Door
from caltrain.enclave.infer import Batches
from caltrain.enclave.served_model import ServedModel, is_below, load_model
from caltrain.enclave.sessions import Sessions
from caltrain.errors import ConfigError, IntegrityError, ProtocolError
from caltrain.models.layers import Conv, Flatten, Linear
from caltrain.models.spec import ModelSpec, zone_ranges
from caltrain.models.weights import decode_state, encode_state
from caltrain.models.wheel import no_wheel
from caltrain.owner.package import package_key
from caltrain.serving.folder import PackageFolder
from caltrain.serving.package import InsidePart, Package
from caltrain.serving.session import SessionKeys
from support.samples import refused
from support.served import DATA_KEY, USERS, opened_inside, tiny_package, tiny_subject, tiny_terms


class Shelf:
    """The host's store, as `Door.read_all` gives it."""

    def __init__(self, opened: PackageFolder) -> None:
        self.parts = {"inside.sealed": opened.inside(), "center.safetensors": opened.center()}

    def read_all(self, name: str, *, limit: int) -> bytes:
        """A whole object."""
        assert len(self.parts[name]) <= limit
        return self.parts[name]

    def load(self, package: Package) -> ServedModel:
        """The model that the enclave makes of it."""
        key = package_key(DATA_KEY, package.id)
        return load_model(package, key, cast(Door, self), factory=no_wheel)


@pytest.fixture
def opened(tmp_path: Path) -> PackageFolder:
    return tiny_package(tmp_path, tiny_subject(), tiny_terms(audit=0.5, head=2))


def resealed(opened: PackageFolder, change: Callable[[InsidePart], InsidePart]) -> tuple[Shelf, Package]:
    """A package whose owner sealed something else, and says so."""
    shelf, package = Shelf(opened), opened.package
    key = package_key(DATA_KEY, package.id)
    sealed = seal_for(key, "package-inside/v1", change(opened_inside(opened)), context=package.id)
    shelf.parts["inside.sealed"] = sealed
    return shelf, msgspec.structs.replace(package, inside=to_text(hashlib.sha256(sealed).digest()))


def test_the_parts_together_are_the_whole_model(opened: PackageFolder) -> None:
    model, package = Shelf(opened).load(opened.package), opened.package
    records = torch.arange(3 * 16, dtype=torch.uint8).reshape(3, 1, 4, 4)
    ir = model.send(model.begin(records))
    center = decode_state(opened.center(), step="test")
    assert {int(name.partition(".")[0]) for name in center} <= set(
        zone_ranges(package.spec, package.terms.partition)[1]
    )
    assert [tuple(x.shape) for x in ir] == [(3, 4, 2, 2)]
    assert all(not x.requires_grad for x in ir)
    assert model.due == ((4, 2, 2),)


def replace(**fields: object) -> Callable[[InsidePart], InsidePart]:
    return lambda part: msgspec.structs.replace(part, **fields)


def without_one(raw: bytes) -> bytes:
    state = decode_state(raw, step="test")
    state.pop(next(iter(state)))
    return encode_state(state)


OTHER: dict[str, tuple[Callable[[InsidePart], InsidePart], type[Exception], str]] = {
    "a class too few": (lambda part: replace(classes=part.classes[:2])(part), ConfigError, "package.other-inside"),
    "an order where none is": (replace(order=(2, 0, 1)), ConfigError, "package.other-inside"),
    "weights of other layers": (lambda part: replace(front=part.head)(part), IntegrityError, "weights.malformed"),
    "a weight too few": (lambda part: replace(head=without_one(part.head))(part), IntegrityError, "weights.malformed"),
    "no weights": (replace(head=b""), IntegrityError, "weights.malformed"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_sealed_part_that_does_not_fit_the_manifest_is_refused(opened: PackageFolder, other: str) -> None:
    change, family, code = OTHER[other]
    shelf, package = resealed(opened, change)
    with pytest.raises(family, match=f"^{code}: ".replace(".", r"\.")):
        shelf.load(package)


@pytest.mark.parametrize("order", [(), (0, 0, 1), (0, 1, 3), (0, 1)])
def test_an_order_that_is_no_order_of_the_classes_is_refused(tmp_path: Path, order: tuple[int, ...]) -> None:
    mapped = tiny_package(tmp_path, tiny_subject(), tiny_terms(mapped=True))
    shelf, package = resealed(mapped, replace(order=order))
    with refused(ConfigError, "package.other-inside"):
        shelf.load(package)


def test_parts_of_another_package_are_refused(tmp_path: Path, opened: PackageFolder) -> None:
    shelf = Shelf(opened)
    twin = Shelf(tiny_package(tmp_path / "twin", tiny_subject(), tiny_terms(audit=0.5, head=2)))
    shelf.parts["inside.sealed"] = twin.parts["inside.sealed"]
    with refused(IntegrityError, "package.other-part"):
        shelf.load(opened.package)


def test_a_sealed_part_opens_only_in_its_own_package(opened: PackageFolder) -> None:
    shelf, package = resealed(opened, lambda part: part)
    key = package_key(DATA_KEY, package.id)
    with refused(IntegrityError, "sealed.not-authentic"):
        load_model(msgspec.structs.replace(package, id="0" * 32), key, cast(Door, shelf), factory=no_wheel)


def test_the_centers_weights_are_those_of_the_manifest(opened: PackageFolder) -> None:
    shelf = Shelf(opened)
    state = decode_state(opened.center(), step="test")
    shelf.parts["center.safetensors"] = encode_state({name: value + 1 for name, value in state.items()})
    with refused(IntegrityError, "package.other-part"):
        shelf.load(opened.package)
    unaudited = msgspec.structs.replace(opened.package, terms=msgspec.structs.replace(opened.package.terms, audit=0.0))
    shelf.load(unaudited)  # then they are never looked at


def test_an_endless_part_is_not_read_to_its_end(opened: PackageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INSIDE_BYTES", 3 * MAX_CHUNK)
    reads: list[int] = []

    class Endless(Door):
        def __init__(self) -> None:
            pass

        def read_up_to(self, name: str, *, offset: int, length: int) -> bytes:
            reads.append(offset)
            return bytes(length)

    with refused(ProtocolError, "storage.too-long"):
        load_model(opened.package, bytes(32), Endless(), factory=no_wheel)
    assert len(reads) == 4


# -- the audit ---------------------------------------------------------------------------------------------------------


def test_the_audit_is_drawn_after_the_output_came_and_as_often_as_the_terms_say(opened: PackageFolder) -> None:
    package, drawn = opened.package, []
    draws = iter([0.5, 0.49, 0.999, 0.0])

    def draw() -> float:
        drawn.append("draw")
        return next(draws)

    sessions = Sessions(package.id)
    batches = Batches(package, Shelf(opened).load(package), sessions, draw=draw)
    session = sessions.open(package.terms.users[0], bytes(32))
    keys = SessionKeys(bytes(32), package=package.id, session=session.id)
    wrong = [torch.zeros(1, 4, 2, 2)]
    seen: list[bool | str] = []
    for batch in range(4):
        batches.begin(batch, [keys.seal_request(0, batch, bytes(range(16)))])
        assert len(drawn) == batch
        try:
            answered = batches.finish(TensorHead("center-out", package.id, 0, batch, ()), wrong)
            seen.append(keys.open_answer(answered.answers[0], 0, batch).audited)
        except IntegrityError as error:
            seen.append(error.code)
    assert seen == [False, "center.wrong", False, "center.wrong"]
    assert USERS[0] == package.terms.users[0].name


NARROW = ModelSpec(layers=(Conv(filters=2), Conv(filters=2), Flatten(), Linear(units=3)))


@pytest.mark.parametrize(
    ("across", "center", "share"), [("f32", "cpu", 1e-4), ("f32", "any", 2e-2), ("bf16", "cpu", 2e-2)]
)
def test_each_record_is_compared_by_its_own_size(tmp_path: Path, across: str, center: str, share: float) -> None:
    terms = tiny_terms(audit=1.0, head=0, front=1, across=across, center=center)
    opened = tiny_package(tmp_path, tiny_subject(spec=NARROW), terms)
    model = Shelf(opened).load(opened.package)
    live = model.begin(torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4))
    live = tuple(x * torch.tensor([1e6, 1.0]).reshape(-1, 1, 1, 1) for x in live)
    sent = model.send(live)
    with torch.inference_mode():
        (own,), _ = model._center.through(model.receive(sent))  # type: ignore[union-attr]
    assert model.is_right(sent, [own])

    def off(row: int, by: float) -> list[Tensor]:
        out = own.clone()
        out[row, 0] += by * float(out[row].abs().max())
        return [out]

    for row in range(2):
        assert model.is_right(sent, off(row, 0.9 * share))
        assert not model.is_right(sent, off(row, 1.1 * share))
    assert not model.is_right(sent, off(0, torch.nan))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_one_number_that_is_none_or_too_large_is_seen(value: float) -> None:
    x = torch.ones(2, 3)
    assert is_below(1e9, [x, x])
    spoilt = x.clone()
    spoilt[1, 2] = value
    assert not is_below(1e9, [x, spoilt])
