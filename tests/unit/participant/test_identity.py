"""A party's keys: drawn once, kept from others, never replaced."""

from __future__ import annotations

import base64
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.crypto.kdf import derive
from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.participant.identity import create_identity, load_identity
from support.disk import files_end_at, tree
from support.samples import refused, signer


def test_keys_are_read_back(tmp_path: Path) -> None:
    made = create_identity(tmp_path / "alpha", "alpha")
    read = load_identity(tmp_path / "alpha")
    assert (read.name, read.data_key, read.public) == ("alpha", made.data_key, made.public)
    assert read.signer.private_bytes() == made.signer.private_bytes()
    assert len(made.data_key) == 32


def test_no_two_identities_share_a_key(tmp_path: Path) -> None:
    one, other = create_identity(tmp_path / "a", "alpha"), create_identity(tmp_path / "b", "alpha")
    assert one.data_key != other.data_key
    assert one.signer.public != other.signer.public


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_secrets_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create_identity(tmp_path / "alpha", "alpha")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "alpha" / "secrets.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "alpha").stat().st_mode) == 0o700


def test_the_public_part_holds_no_secret(tmp_path: Path) -> None:
    made = create_identity(tmp_path, "alpha")
    public = (tmp_path / "identity.json").read_bytes()
    for secret in (made.data_key, made.signer.private_bytes()):
        assert secret not in public
        assert base64.b64encode(secret) not in public
    assert msgspec.json.decode(public) == {"name": "alpha", "public_key": made.signer.public}


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_keys_are_never_replaced(tmp_path: Path, name: str) -> None:
    create_identity(tmp_path, "alpha")
    before = tree(tmp_path)
    with refused(ConfigError, "identity.exists"):
        create_identity(tmp_path, name)
    assert tree(tmp_path) == before


def test_keys_that_lead_elsewhere_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "secrets.json").symlink_to(tmp_path / "nowhere")
    with refused(ConfigError, "identity.exists"):
        create_identity(tmp_path / "alpha", "alpha")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["", "Alpha", "-a", "a b", "a/b", "..", "a" * 41, "ä", "a\n", "\0"])
def test_a_name_that_is_none_makes_nothing(tmp_path: Path, name: str) -> None:
    with refused(ConfigError, "identity.name"):
        create_identity(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_keys(tmp_path: Path) -> None:
    with files_end_at(20), refused(EnvironmentFault, "party.not-written"):
        create_identity(tmp_path, "alpha")
    assert tree(tmp_path) == {}
    create_identity(tmp_path, "alpha")


def test_keys_that_broke_off_before_the_secrets_can_be_made_again(tmp_path: Path) -> None:
    create_identity(tmp_path, "alpha")
    (tmp_path / "secrets.json").unlink()
    assert create_identity(tmp_path, "alpha").public == load_identity(tmp_path).public


def text(**changes: object) -> bytes:
    """A secrets file with changes."""
    keys = {"signing_key": base64.b64encode(bytes(32)).decode(), "data_key": base64.b64encode(bytes(32)).decode()}
    return msgspec.json.encode(keys | changes)


SHORT = base64.b64encode(bytes(31)).decode()
DAMAGE: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no secrets": lambda folder: (folder / "secrets.json").unlink(),
    "no name": lambda folder: (folder / "identity.json").unlink(),
    "empty": lambda folder: (folder / "secrets.json").write_bytes(b""),
    "no text": lambda folder: (folder / "secrets.json").write_bytes(b"\xff\xfe"),
    "an abyss": lambda folder: (folder / "secrets.json").write_bytes(b'{"data_key":' + b"[" * 100_000),
    "other keys": lambda folder: (folder / "secrets.json").write_bytes(text()),
    "an unknown field": lambda folder: (folder / "secrets.json").write_bytes(text(more=1)),
    "no base64": lambda folder: (folder / "secrets.json").write_bytes(text(signing_key="!" * 44)),
    "a short signing key": lambda folder: (folder / "secrets.json").write_bytes(text(signing_key=SHORT)),
    "a bad name": lambda folder: (folder / "identity.json").write_bytes(
        msgspec.json.encode({"name": "../x", "public_key": signer("alpha").public})
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_that_is_damaged_is_named(tmp_path: Path, what: str) -> None:
    create_identity(tmp_path, "alpha")
    DAMAGE[what](tmp_path)
    with refused(ConfigError, "identity.unreadable") as caught:
        load_identity(tmp_path)
    assert str(tmp_path) in caught.value.what


def test_a_data_key_of_another_length_is_refused(tmp_path: Path) -> None:
    made = create_identity(tmp_path, "alpha")
    signing = base64.b64encode(made.signer.private_bytes()).decode()
    (tmp_path / "secrets.json").write_bytes(text(signing_key=signing, data_key=SHORT))
    with refused(ConfigError, "identity.unreadable"):
        load_identity(tmp_path)


def test_the_reading_key_stays_the_same_and_is_no_other_key(tmp_path: Path) -> None:
    one, other = create_identity(tmp_path / "a", "alpha"), create_identity(tmp_path / "b", "alpha")
    assert one.reading_key().public == load_identity(tmp_path / "a").reading_key().public
    assert one.reading_key().public != other.reading_key().public
    # The data key is handed to enclaves: whoever holds it must not read what is disclosed.
    assert one.reading_key().public != HpkePrivateKey(derive(one.data_key, "reading-key/v1")).public
