"""A party's or model user's folder: keys that only its owner reads, and what it keeps of its runs."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from caltrain.crypto.dsse import PublicKey, SigningKey
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.crypto.kdf import derive
from caltrain.errors import UNDECODABLE, ConfigError
from caltrain.participant.files import alone, write_whole
from caltrain.records.commitment import PartyName


class PublicIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What others are given: the entry for the plan."""

    name: PartyName
    public_key: PublicKey


class _Secrets(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    signing_key: Annotated[str, msgspec.Meta(max_length=44)]
    data_key: Annotated[str, msgspec.Meta(max_length=44)]


@dataclass(frozen=True)
class Identity:
    """A name with its keys. `data_key` seals records and opens what the enclave releases to this party."""

    folder: Path
    name: str
    signer: SigningKey
    data_key: bytes

    @property
    def public(self) -> PublicIdentity:
        """What others are given."""
        return PublicIdentity(name=self.name, public_key=self.signer.public)

    def reading_key(self) -> HpkePrivateKey:
        """Opens what is disclosed to this identity. It follows from the signing key, which no enclave is given."""
        return HpkePrivateKey(derive(self.signer.private_bytes(), "reading-key/v1"))


def create_identity(folder: Path, name: str) -> Identity:
    """Draw keys and write them with owner-only rights.

    Raises ConfigError `identity.name`, `identity.exists` (keys are never replaced), EnvironmentFault.
    """
    try:
        public = msgspec.convert({"name": name, "public_key": SigningKey().public}, PublicIdentity)
    except msgspec.ValidationError:
        raise ConfigError(
            "identity.name",
            f"{name[:60]!r} cannot be a name: small letters, digits and hyphens, at most 40",
            step="keygen",
            fix="Choose another name.",
        ) from None
    identity = Identity(folder, public.name, SigningKey(), os.urandom(32))
    encoded = _Secrets(
        signing_key=base64.b64encode(identity.signer.private_bytes()).decode(),
        data_key=base64.b64encode(identity.data_key).decode(),
    )
    secrets = folder / "secrets.json"
    with alone(folder):
        if os.path.lexists(secrets):
            raise ConfigError(
                "identity.exists",
                f"{folder} already holds keys",
                step="keygen",
                fix="Choose another folder; records sealed under the old keys would be lost with them.",
            )
        write_whole(folder / "identity.json", msgspec.json.encode(identity.public))
        write_whole(secrets, msgspec.json.encode(encoded))  # last: with it the identity is whole
    return identity


def load_identity(folder: Path) -> Identity:
    """Read a folder that `create_identity` made. Raises ConfigError `identity.unreadable`."""
    try:
        public = msgspec.json.decode((folder / "identity.json").read_bytes(), type=PublicIdentity)
        secrets = msgspec.json.decode((folder / "secrets.json").read_bytes(), type=_Secrets)
        signer = SigningKey(base64.b64decode(secrets.signing_key, validate=True))
        data_key = base64.b64decode(secrets.data_key, validate=True)
        if signer.public != public.public_key or len(data_key) != 32:
            raise ValueError("keys do not belong together")
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(
            "identity.unreadable",
            f"{folder} does not hold the keys of a party or user: {error}",
            step="load keys",
            fix="Make them with `caltrain party keygen`.",
        ) from None
    return Identity(folder, public.name, signer, data_key)
