"""The manifest: what its owner may sign, whom it names, and what nobody can change in it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.crypto.digests import digest
from caltrain.errors import AccessError, CaltrainError, ConfigError, DataError, IntegrityError
from caltrain.models.layers import Conv, Flatten, Linear, Route
from caltrain.models.spec import ModelSpec
from caltrain.records.schema import DataSchema
from caltrain.serving.package import (
    MAX_MANIFEST_BYTES,
    BatchSpec,
    Package,
    ServedUser,
    UserCredential,
    check_package,
    open_package,
    read_manifest,
    user_of,
)
from support.samples import refused, signer
from support.served import tiny_terms
from support.tiny import MODEL, SHAPE

NUMBERS = ("0", "1", "2")
DATA = DataSchema(shape=SHAPE, classes=NUMBERS)


def package(**changes: Any) -> Package:
    """A manifest of `signer("owner")`; fields of its terms by their names, others by theirs."""
    own = {name: changes.pop(name) for name in list(changes) if name in Package.__struct_fields__}
    fields: dict[str, Any] = {
        "id": "ab" * 16,
        "owner": signer("owner").public,
        "terms": tiny_terms(**changes),
        "model": digest("m"),
        "spec": MODEL,
        "data": DATA,
        "inside": digest("i"),
        "center_weights": digest("c"),
    }
    return Package(**(fields | own))


def test_a_signed_manifest_opens_as_it_was_signed() -> None:
    envelope = signer("owner").sign("package", package())
    assert open_package(envelope) == open_package(envelope, signer("owner").public) == package()
    assert read_manifest(msgspec.json.encode(envelope)) == envelope


def test_a_manifest_of_another_owner_is_refused() -> None:
    with refused(IntegrityError, "signature.invalid"):
        open_package(signer("eve").sign("package", package()), signer("owner").public)
    with refused(ConfigError, "package.other-owner"):
        open_package(signer("eve").sign("package", package()))
    with refused(IntegrityError, "signature.invalid"):
        open_package(signer("owner").sign("plan", package()))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 100_000, b"\xff", b" " * (MAX_MANIFEST_BYTES + 1)], ids=len)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with refused(ConfigError, "package.unreadable"):
        read_manifest(raw)


def test_a_manifest_that_is_too_long_is_not_even_read() -> None:
    raw = msgspec.json.encode(signer("owner").sign("package", package()))
    read_manifest(raw + b" " * (MAX_MANIFEST_BYTES - len(raw)))
    with refused(ConfigError, "package.unreadable"):
        read_manifest(raw + b" " * (MAX_MANIFEST_BYTES - len(raw) + 1))


USER = tiny_terms().users[0]
WIDE = ModelSpec(layers=(Conv(filters=600, kernel=1, padding=0), Conv(filters=2), Flatten(), Linear(units=3)))
MANY = ModelSpec(
    layers=(*(Conv(filters=2) for _ in range(17)), Route(sources=tuple(range(17))), Flatten(), Linear(units=3))
)
WRONG: dict[str, tuple[dict[str, Any], type[CaltrainError], str]] = {
    "no CenterNet": ({"front": 6}, ConfigError, "model.partition"),
    "records themselves cross": ({"front": 0}, ConfigError, "model.cut-at-input"),
    "other classes than outputs": ({"data": DataSchema(shape=SHAPE, classes=("0", "1"))}, ConfigError, "model.classes"),
    "no deviation": ({"data": DataSchema(shape=SHAPE, classes=NUMBERS, std=(0.0,))}, DataError, "schema.normalisation"),
    "names in clear": (
        {"data": DataSchema(shape=SHAPE, classes=("cat", "dog", "owl"))},
        ConfigError,
        "package.names",
    ),
    "a secret order and a HeadNet": ({"mapped": True, "head": 1}, ConfigError, "package.contradiction"),
    "nobody": ({"users": ()}, ConfigError, "package.nobody"),
    "two users of one name": (
        {"users": (USER, ServedUser(name=USER.name, public_key=signer("kim").public, budget=1))},
        ConfigError,
        "package.duplicate",
    ),
    "two users with one key": (
        {"users": (USER, ServedUser(name="kim", public_key=USER.public_key, budget=1))},
        ConfigError,
        "package.duplicate",
    ),
    "too large an IR": (
        {
            "spec": WIDE,
            "front": 1,
            "data": DataSchema(shape=(1, 10, 10), classes=NUMBERS),
            "batch": BatchSpec(rows=256),
        },
        ConfigError,
        "package.batch-too-large",
    ),
    "too many tensors with scales": (
        {"spec": MANY, "front": 17, "across": "int8"},
        ConfigError,
        "package.too-many-tensors",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_package_that_cannot_be_served_is_refused_by_all_who_open_it(wrong: str) -> None:
    changes, family, code = WRONG[wrong]
    unfit = package(**changes)
    with refused(family, code):
        check_package(unfit)
    with refused(family, code):
        open_package(signer("owner").sign("package", unfit))


def test_records_that_are_larger_than_what_crosses_count_too() -> None:
    spec = ModelSpec(layers=(Conv(filters=1, stride=8), Conv(filters=1, stride=8), Flatten(), Linear(units=3)))
    data = DataSchema(shape=(1, 512, 512), dtype="f32", classes=NUMBERS)
    check_package(package(spec=spec, front=1, data=data, rows=48))
    with refused(ConfigError, "package.batch-too-large"):
        check_package(package(spec=spec, front=1, data=data, rows=49))


def test_what_is_at_the_limits_is_fine() -> None:
    check_package(package(spec=MANY, front=16, across="int8"))
    check_package(package(spec=MANY, front=17))
    check_package(package(users=(), issuer=signer("issuer").public))
    check_package(package(mapped=True))


def test_sizes_are_those_of_what_crosses() -> None:
    tiny = package()
    assert (tiny.row_bytes, tiny.classes, tiny.most_live, tiny.slot_bytes) == (16, 3, 1, 4096)
    assert package(data=DataSchema(shape=SHAPE, dtype="f32", classes=NUMBERS)).row_bytes == 64
    # front: 4 x 2 x 2 numbers for a record, the greater of both cuts
    assert package(rows=65).slot_bytes == 2 * 4096
    assert package(rows=64).slot_bytes == 4096
    assert package(spec=MANY, front=17).most_live == 17


def test_the_form_says_what_the_host_sees() -> None:
    assert [package(**terms).form for terms in ({}, {"mapped": True}, {"head": 1})] == ["two-way", "ternary", "ternary"]


def test_the_digest_is_of_everything() -> None:
    digests = {package(**c).digest() for c in ({}, {"budget": 99}, {"revision": 2}, {"id": "cd" * 16}, {"audit": 0.1})}
    assert len(digests) == 5


# -- who may ask -------------------------------------------------------------------------------------------------------

ISSUER = {"issuer": signer("issuer").public}


def credential(
    served: Package, *, name: str = "kim", key: str = "kim", by: str = "issuer", kind: str = "user-credential"
) -> Any:
    user = ServedUser(name=name, public_key=signer(key).public, budget=5)
    return signer(by).sign(kind, UserCredential(package=served.digest(), user=user))


def test_the_digest_is_made_once_and_never_that_of_another_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    one = package()
    made = one.digest()
    other = msgspec.structs.replace(one, id="0" * 32)
    assert other.digest() == package(id="0" * 32).digest() != made
    monkeypatch.setattr("caltrain.serving.package.canonical_json", lambda _: b"")
    assert one.digest() == made


def test_users_are_those_of_the_package_and_those_that_its_issuer_names() -> None:
    served = package(**ISSUER)
    assert user_of(served, "una", None) == served.terms.users[0]
    assert user_of(served, "kim", credential(served)).budget == 5


def test_nobody_else_is_a_user() -> None:
    served = package(**ISSUER)
    with refused(AccessError, "user.not-named"):
        user_of(served, "kim", None)
    with refused(AccessError, "user.not-named"):
        user_of(package(), "kim", credential(package()))  # no issuer
    for refused_as, given in (
        ("signature.invalid", credential(served, by="kim")),
        ("signature.invalid", credential(served, kind="package")),
        ("user.not-named", credential(package(revision=2, **ISSUER))),
        ("user.not-named", credential(served, name="lee")),
        ("user.not-named", credential(served, key="una")),  # who has a budget already
    ):
        with pytest.raises(CaltrainError, match=f"^{refused_as}: ".replace(".", r"\.")):
            user_of(served, "kim", given)
