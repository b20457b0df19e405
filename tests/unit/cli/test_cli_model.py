"""`caltrain model ...`: packages, credentials, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.attestation.measurement import measure_enclave
from caltrain.exposure.open_model import save_subject
from caltrain.participant.identity import Identity, create_identity
from caltrain.serving.folder import PackageFolder, open_folder
from caltrain.serving.package import MANIFEST
from support.commands import Cli, Outcome
from support.exposed import subject

PARTS = {"package.json", "inside.sealed", "center.safetensors"}


class Owner:
    """An owner with a model, and a user."""

    def __init__(self, folder: Path, cli: Cli) -> None:
        self.cli, self.folder = cli, folder
        self.keys: Identity = create_identity(folder / "owner", "owner")
        self.user: Identity = create_identity(folder / "una", "una")
        self.model, self.out = folder / "model", folder / "package"
        save_subject(subject(), self.model)

    def package(self, *more: str | Path, user: str = "", basis: tuple[str, ...] = ("--unassessed",)) -> Outcome:
        """`caltrain model package`."""
        named = user or f"{self.user.folder / 'identity.json'}:100"
        fixed = ("--home", self.keys.folder, "--name", "tiny", "--cut", "2", "--out", self.out, "--user", named)
        return self.cli("model", "package", self.model, *fixed, *basis, *more, as_json=True)

    def opened(self) -> PackageFolder:
        return open_folder(self.out, self.keys.signer.public)


@pytest.fixture
def owner(tmp_path: Path, cli: Cli) -> Owner:
    return Owner(tmp_path, cli)


def test_a_package_is_what_was_asked_for(owner: Owner) -> None:
    shown = owner.package("--head", "1", "--audit", "0.5", "--rows", "16", "--fixed", "--top", "2")
    assert shown.code == 0
    package = owner.opened().package
    terms = package.terms
    assert (terms.front, terms.head, terms.audit, terms.batch.rows, terms.batch.fixed, terms.top) == (
        2,
        1,
        0.5,
        16,
        True,
        2,
    )
    assert [(user.name, user.public_key, user.budget) for user in terms.users] == [
        ("una", owner.user.signer.public, 100)
    ]
    assert terms.measurement == measure_enclave()
    assert terms.exposure is None
    assert (package.model, package.form) == (subject().digest, "ternary")
    assert (shown.json["package"], shown.json["form"]) == (package.digest(), "ternary")
    assert {path.name for path in owner.out.iterdir()} == PARTS


def test_the_names_of_the_classes_are_in_no_part(owner: Owner) -> None:
    owner.package()
    assert owner.opened().package.data.classes == ("0", "1", "2", "3")


def test_show_says_the_same_and_who_signed(owner: Owner) -> None:
    made = owner.package().json
    assert owner.cli("model", "show", owner.out, "--owner", owner.keys.signer.public, as_json=True).json == made
    by_file = owner.cli("model", "show", owner.out, "--owner", owner.keys.folder / "identity.json", as_json=True)
    assert by_file.json == made
    text = owner.cli("model", "show", owner.out).out
    assert "not assessed" in text
    assert "give --owner" in text


def test_a_file_without_a_key_is_no_owner(owner: Owner) -> None:
    owner.package()
    shown = owner.cli("model", "show", owner.out, "--owner", owner.keys.folder / "secrets.json", as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "identity.not-public")


def test_show_refuses_another_owner(owner: Owner) -> None:
    owner.package()
    shown = owner.cli("model", "show", owner.out, "--owner", owner.user.signer.public, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "signature.invalid")


@pytest.mark.parametrize("part", sorted(PARTS - {MANIFEST}))
def test_show_refuses_a_part_that_was_touched(part: str, owner: Owner) -> None:
    owner.package()
    raw = bytearray((owner.out / part).read_bytes())
    raw[-1] ^= 1
    (owner.out / part).write_bytes(raw)
    shown = owner.cli("model", "show", owner.out, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "package.other-part")


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "no basis": ({"basis": ()}, (), 10, "package.basis"),
    "two words on the basis": ({"basis": ("--unassessed", "--exposure", "x")}, (), 10, "package.basis"),
    "no number": ({"user": "identity.json"}, (), 10, "file.unreadable"),
    "a budget of none": ({}, ("--user", "IDENTITY:0"), 10, "package.user"),
    "a cut behind the end": ({}, ("--cut", "5"), 10, "model.partition"),
    "a mapping beside a head": ({}, ("--mapped", "--head", "1"), 10, "package.contradiction"),
    "a bad name": ({}, ("--name", "No Name"), 10, "package.invalid"),
    "a bad key": ({}, ("--issuer", "ed25519:1"), 10, "package.invalid"),
    "no key": ({}, ("--issuer", "rsa:1"), 10, "file.unreadable"),
    "a bad measurement": ({}, ("--measurement", "sha256:00"), 10, "package.invalid"),
    "the same user twice": ({}, ("--user", "IDENTITY:7"), 10, "package.duplicate"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_packaged_is_refused_and_nothing_written(what: str, owner: Owner) -> None:
    options, more, code, name = BAD[what]
    identity = str(owner.user.folder / "identity.json")
    shown = owner.package(*(word.replace("IDENTITY", identity) for word in more), **options)
    assert (shown.code, shown.error["code"]) == (code, name)
    assert not owner.out.exists()


def test_an_issuer_can_name_further_users(owner: Owner) -> None:
    issuer = create_identity(owner.folder / "issuer", "issuer")
    further = create_identity(owner.folder / "uwe", "uwe")
    owner.package("--issuer", issuer.signer.public)
    file = owner.folder / "credential.json"
    words = ("--user", f"{further.folder / 'identity.json'}:5", "--out", file)
    shown = owner.cli("model", "credential", owner.out, "--home", owner.keys.folder, *words, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "credential.not-issuer")
    assert not file.exists()
    shown = owner.cli("model", "credential", owner.out, "--home", issuer.folder, *words, as_json=True)
    assert shown.json == {"user": "uwe", "records": 5, "file": str(file)}
    credential = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    assert credential["payloadType"].endswith("user-credential.v1+json")


def test_a_granted_key_needs_a_host(owner: Owner, project: Any) -> None:
    owner.package()
    words = ("--home", owner.keys.folder, "--policy", project.policy_path)
    shown = owner.cli("model", "grant", "http://127.0.0.1:1", owner.out, *words, as_json=True)
    assert (shown.code, shown.error["code"]) == (18, "host.unreachable")


def test_only_the_owner_can_hand_over_the_key(owner: Owner, project: Any) -> None:
    owner.package()
    words = ("--home", owner.user.folder, "--policy", project.policy_path)
    shown = owner.cli("model", "grant", "http://127.0.0.1:1", owner.out, *words, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "signature.invalid")
