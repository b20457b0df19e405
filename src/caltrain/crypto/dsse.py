"""Ed25519 keys (RFC 8032) and DSSE envelopes: every signature of this project is over a typed payload.

The pre-authentication encoding binds the payload type, so a signature made for one purpose does not verify
for another. Opening an envelope returns the payload; there is no way to read it unverified by accident.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import canonical_json
from caltrain.errors import UNDECODABLE, IntegrityError

_SCHEME = "ed25519:"
_TYPE = "application/vnd.caltrain.{}.v1+json"
MAX_ENVELOPE_BYTES = 8 << 20

PublicKey = Annotated[str, msgspec.Meta(pattern=r"^ed25519:[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=\Z")]
"""Type of a verification key in a message: `ed25519:` and base64 of 32 bytes, in its one canonical spelling."""

T = TypeVar("T")


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature of an envelope: the key's text form and base64 of 64 bytes."""

    keyid: PublicKey
    sig: Annotated[str, msgspec.Meta(max_length=88)]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A DSSE envelope (github.com/secure-systems-lab/dsse) with exactly one signature."""

    payload_type: Annotated[str, msgspec.Meta(max_length=120)]
    payload: Annotated[str, msgspec.Meta(max_length=MAX_ENVELOPE_BYTES)]
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(min_length=1, max_length=1)]

    @property
    def signer(self) -> str:
        """The key that the envelope claims: a hint until it is opened with that key."""
        return self.signatures[0].keyid

    def claims(self, kind: str) -> bool:
        """Whether it says that it is of this kind: a hint until it is opened as one."""
        return self.payload_type == _TYPE.format(kind)


class SigningKey:
    """An Ed25519 private key; `public` is its text form."""

    def __init__(self, raw: bytes | None = None) -> None:
        self._key = Ed25519PrivateKey.generate() if raw is None else Ed25519PrivateKey.from_private_bytes(raw)
        self.public: str = _SCHEME + base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def private_bytes(self) -> bytes:
        """The 32 secret bytes, for the owner's key file only."""
        return self._key.private_bytes_raw()

    def sign(self, kind: str, value: object) -> Envelope:
        """Sign the canonical JSON of `value` as a payload of `kind`."""
        body = canonical_json(value)
        payload_type = _TYPE.format(kind)
        sig = self._key.sign(_pre_authentication(payload_type, body))
        return Envelope(
            payload_type=payload_type,
            payload=base64.b64encode(body).decode(),
            signatures=(Signature(keyid=self.public, sig=base64.b64encode(sig).decode()),),
        )


def _pre_authentication(payload_type: str, body: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(body), body)


def _bad(reason: str, step: str) -> IntegrityError:
    return IntegrityError(
        "signature.invalid",
        f"a signature was refused: {reason}",
        step=step,
        fix="Ask the signer for the message again; check that the plan names the key that they use.",
    )


def _decode_base64(text: str, what: str, step: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(f"{what} is not base64", step) from None
    if base64.b64encode(raw).decode() != text:  # the unused bits of the last digit: one message, one spelling
        raise _bad(f"{what} is not canonical base64", step)
    return raw


def open_envelope(envelope: Envelope, kind: str, key: str, type_: type[T], *, step: str) -> T:
    """Verify that `key` signed `envelope` as `kind`, and return its payload as `type_`.

    Raises IntegrityError `signature.invalid` (other key, kind or bytes) or `payload.malformed`.
    """
    if not envelope.claims(kind):
        raise _bad(f"it is for {envelope.payload_type!r}, not for {kind!r}", step)
    if envelope.signer != key:
        raise _bad("it was made with another key than the one named for it", step)
    body = _decode_base64(envelope.payload, "the payload", step)
    sig = _decode_base64(envelope.signatures[0].sig, "the signature", step)
    raw = _decode_base64(key.removeprefix(_SCHEME), "the key", step)
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(sig, _pre_authentication(envelope.payload_type, body))
    except (InvalidSignature, ValueError):
        raise _bad("it does not verify under the named key", step) from None
    try:
        return json_decoder(type_).decode(body)
    except UNDECODABLE as error:
        raise IntegrityError(
            "payload.malformed",
            f"a signed {kind} payload does not have its form: {error}",
            step=step,
            fix="The signer runs another version of caltrain; use the same one.",
        ) from None


def envelope_from_json(raw: bytes, *, step: str) -> Envelope:
    """Decode an envelope from untrusted JSON of at most `MAX_ENVELOPE_BYTES`."""
    try:
        if len(raw) > MAX_ENVELOPE_BYTES:
            raise msgspec.ValidationError("longer than the limit")
        return json_decoder(Envelope).decode(raw)
    except UNDECODABLE as error:
        raise IntegrityError(
            "envelope.malformed",
            f"not a DSSE envelope: {error}",
            step=step,
            fix="Send the signed JSON as the caltrain command wrote it.",
        ) from None
