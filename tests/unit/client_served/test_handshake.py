"""Before anything is sealed: the package is its owner's, the enclave serves it and runs the program that both trust."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import seal_for
from caltrain.client.served.handshake import MAX_OPENED, Handshake
from caltrain.errors import (
    AccessError,
    AttestationError,
    CaltrainError,
    ConfigError,
    EnvironmentFault,
    IntegrityError,
    ProtocolError,
)
from caltrain.records.schema import DataSchema
from caltrain.serving.session import Offer, SessionOpened
from support.samples import refused, signer
from support.scripted_served import OWNER, ROOT, USER, ScriptedServed, credential, expectations, now, package
from support.tiny import CLASSES, MEASUREMENT, SHAPE, pictures

OTHER = "sha384:" + "cd" * 48
Spoil = Callable[[ScriptedServed], None]


def test_an_honest_host_is_verified() -> None:
    host = ScriptedServed()
    with host.connect(version="1") as served:
        assert served.package == host.package
        assert served.claims.measurement == MEASUREMENT
        assert served.claims.simulated
        assert (served.names, served.budget_left) == (CLASSES, 100)
        assert served.ready()
    assert host.paths == ["/attestation", "/v2/models/tiny/versions/1/sessions", "/v2/models/tiny/versions/1/ready"]


def test_each_handshake_has_its_own_nonce() -> None:
    one, other = Handshake(expectations(), "tiny"), Handshake(expectations(), "tiny")
    assert one.nonce != other.nonce
    assert len(one.nonce) == 64


def _bind(**changes: Any) -> Spoil:
    return lambda host: setattr(host, "bound", lambda binding: msgspec.structs.replace(binding, **changes))


def _set(**changes: Any) -> Spoil:
    def spoil(host: ScriptedServed) -> None:
        for name, value in changes.items():
            setattr(host, name, value)

    return spoil


def _edit_offer(change: Callable[[Offer], Offer]) -> Spoil:
    def edit(raw: bytes) -> bytes:
        return msgspec.json.encode(change(msgspec.json.decode(raw, type=Offer)))

    return lambda host: host.edit.update(attestation=edit)


def _swap_key(offer: Offer) -> Offer:
    bundle = offer.bundle
    binding = msgspec.structs.replace(bundle.binding, encryption_key=ScriptedServed().key.public)
    return msgspec.structs.replace(offer, bundle=msgspec.structs.replace(bundle, binding=binding))


def _swap_package(offer: Offer) -> Offer:
    return msgspec.structs.replace(offer, package=OWNER.sign("package", package(top=1)))


CHEATS: dict[str, tuple[type[CaltrainError], str, Spoil]] = {
    "signed by another owner": (IntegrityError, "signature.invalid", _set(signer=signer("mallory"))),
    "a package of another name": (IntegrityError, "package.not-asked-for", _set(package=package(name="other"))),
    "a package that cannot be served": (ConfigError, "package.nobody", _set(package=package(named=False, issuer=None))),
    "evidence of another package": (AttestationError, "evidence.other-plan", _bind(plan="sha256:" + "0" * 64)),
    "another package than the evidence's": (AttestationError, "evidence.other-plan", _edit_offer(_swap_package)),
    "evidence for another purpose": (AttestationError, "evidence.other-purpose", _bind(purpose="query")),
    "evidence for another nonce": (AttestationError, "evidence.other-nonce", _bind(nonce="0" * 64)),
    "a key that the evidence does not cover": (AttestationError, "evidence.other-key", _edit_offer(_swap_key)),
    "another root": (AttestationError, "evidence.unknown-root", _set(root=signer("mallory"))),
    "another program": (AttestationError, "evidence.other-measurement", _set(measurement=OTHER)),
    "not the package's program": (
        AttestationError,
        "evidence.not-the-packages",
        _set(package=package(measurement=OTHER)),
    ),
    "a user who is not named": (AccessError, "user.not-named", _set(package=package(named=False))),
    "no offer": (ProtocolError, "host.garbage", lambda host: host.edit.update(attestation=lambda _: b"{}")),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_host_that_cheats_gets_nothing(cheat: str) -> None:
    family, code, spoil = CHEATS[cheat]
    host = ScriptedServed()
    spoil(host)
    with refused(family, code):
        host.connect()
    assert host.posts == []
    assert host.sessions == {}
    with refused(family, code):
        asyncio.run(host.connect_async())
    assert host.posts == []


def test_an_offer_is_not_taken_twice() -> None:
    host = ScriptedServed()
    seen: list[bytes] = []

    def replay(raw: bytes) -> bytes:
        seen.append(raw)
        return seen[0]

    host.edit["attestation"] = replay
    host.connect().close()
    with refused(AttestationError, "evidence.other-nonce"):
        host.connect()
    assert host.posts == ["sessions"]


def test_a_simulated_enclave_is_refused_unless_the_policy_allows_it() -> None:
    host = ScriptedServed()
    policy = Policy(measurements=(MEASUREMENT,), simulated_roots=(ROOT.public,))
    with refused(AttestationError, "evidence.simulated"):
        host.connect(policy=policy)
    assert host.posts == []


def test_a_package_that_names_itself_anothers_is_refused() -> None:
    host = ScriptedServed(msgspec.structs.replace(package(), owner=signer("mallory").public))
    with refused(ConfigError, "package.other-owner"):
        host.connect()


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version_than_the_one_asked_for_is_refused(version: str) -> None:
    host = ScriptedServed(package(revision=2))
    with refused(IntegrityError, "package.not-asked-for"):
        host.connect(version=version)
    host.connect(version="2").close()


@pytest.mark.parametrize(
    ("model", "version"), [("a/b", None), ("", None), ("tiny", "0"), ("tiny", "1/x"), ("tiny", "")]
)
def test_what_no_model_is_called_is_not_asked_for(model: str, version: str | None) -> None:
    with refused(ConfigError, "ask.bad-name"):
        Handshake(expectations(), model, version)


def test_a_user_asks_with_the_key_that_the_package_names() -> None:
    host = ScriptedServed()
    with refused(AccessError, "user.other-key"):
        host.connect(signer=signer("mallory"))
    assert host.posts == []


def test_a_credential_names_a_user_whom_the_package_does_not() -> None:
    host = ScriptedServed()
    cleo = {"user": "cleo", "signer": signer("cleo")}
    with host.connect(**cleo, credential=credential(host.package)) as served:
        assert served.budget_left == 5
    with refused(AccessError, "user.not-named"):
        host.connect(**cleo)
    with refused(AccessError, "user.not-named"):
        host.connect(**cleo, credential=credential(package(top=1)))
    with refused(IntegrityError, "signature.invalid"):
        host.connect(**cleo, credential=credential(host.package, issuer="mallory"))
    assert host.posts == ["sessions"]


def test_a_session_that_is_sealed_for_another_is_refused() -> None:
    host = ScriptedServed()
    seen: list[bytes] = []

    def swap(sealed: bytes) -> bytes:
        seen.append(sealed)
        return seen[0]

    host.edit["sessions"] = swap
    host.connect().close()
    with refused(IntegrityError, "sealed.not-authentic"):
        host.connect()


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_session_cut_short_is_refused(cut: int) -> None:
    host = ScriptedServed()
    host.edit["sessions"] = lambda sealed: sealed[:cut]
    with refused(IntegrityError, "sealed.not-authentic"):
        host.connect()


def test_a_session_for_another_user_is_refused() -> None:
    host = ScriptedServed()
    handshake = Handshake(expectations(), "tiny")
    checked = handshake.check(host.offer(handshake.nonce), now=now())
    opened = SessionOpened(session="0" * 32, classes=CLASSES, budget_left=1, simulated=True)
    with refused(IntegrityError, "sealed.not-authentic"):
        checked.open(seal_for(handshake._key, "session-opened/v1", opened, context="of somebody else"))


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("cat", "dog")},
        {"classes": (*CLASSES, "yak")},
        {"classes": ("cat", "cat", "dog")},
        {"classes": ("cat", *CLASSES)},
        {"simulated": False},
    ],
)
def test_an_enclave_that_contradicts_its_package_is_refused(changes: dict[str, Any]) -> None:
    host = ScriptedServed()
    host.opened = lambda opened: msgspec.structs.replace(opened, **changes)
    with refused(IntegrityError, "session.mismatch"):
        host.connect()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    host = ScriptedServed()
    elsewhere = {"Location": "http://elsewhere.test/attestation"}
    host.edit["attestation"] = lambda _: httpx.Response(status, headers=elsewhere)
    with refused(ProtocolError, "host.garbage"):
        host.connect()
    assert host.paths == ["/attestation"]


def test_nothing_packed_is_unpacked() -> None:
    host = ScriptedServed()
    host.edit["attestation"] = lambda raw: httpx.Response(
        200, content=b"x" + raw, headers={"Content-Encoding": "packed"}
    )
    with refused(ProtocolError, "host.garbage"):
        host.connect()
    with refused(ProtocolError, "host.garbage"):
        asyncio.run(host.connect_async())


def test_no_answer_is_read_without_end() -> None:
    host = ScriptedServed()
    host.edit["sessions"] = lambda _: bytes(MAX_OPENED + 1)
    with refused(ProtocolError, "host.garbage"):
        host.connect()
    with refused(ProtocolError, "host.garbage"):
        asyncio.run(host.connect_async())


def test_a_host_that_is_not_there_is_said_to_be_unreachable() -> None:
    host = ScriptedServed()

    def gone(_: bytes) -> bytes:
        raise httpx.ConnectError("refused")

    host.edit["attestation"] = gone
    with refused(EnvironmentFault, "host.unreachable"):
        host.connect()
    with refused(EnvironmentFault, "host.unreachable"):
        asyncio.run(host.connect_async())


def test_the_users_key_is_not_shown() -> None:
    assert "signer" not in repr(expectations())
    assert USER.private_bytes().hex() not in repr(expectations())


def test_a_later_revision_of_the_same_records_and_classes_takes_the_place_of_the_one_before() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        host.restart(package(revision=2))
        got = served.predict(pictures(1, seed=1))
        assert served.package == host.package
        assert got.package == host.package.digest()


@pytest.mark.parametrize(
    ("code", "later"),
    [
        ("package.rolled-back", package(revision=1)),
        ("package.rolled-back", package(revision=2, top=1)),
        ("package.other-schema", package(revision=3, dtype="f32")),
        (
            "package.other-schema",
            msgspec.structs.replace(
                package(revision=3), data=DataSchema(shape=SHAPE, classes=("0", "1", "2"), mean=(0.25,))
            ),
        ),
    ],
)
def test_no_other_package_takes_its_place(code: str, later: Any) -> None:
    host = ScriptedServed(package(revision=2))
    with host.connect() as served:
        before = served.package
        host.restart(later)
        with refused(IntegrityError, code):
            served.predict(pictures(1, seed=1))
        assert served.package == before
    assert host.posts == ["sessions", "infer"]


def test_a_user_who_asked_for_a_version_gets_no_later_one() -> None:
    host = ScriptedServed()
    with host.connect(version="1") as served:
        host.restart(package(revision=2))
        with refused(IntegrityError, "package.not-asked-for"):
            served.predict(pictures(1, seed=1))
    assert host.answers == []
