"""A disclosure sealed to those whom the plan names: anybody may carry it, they alone see the record.

The signed disclosure is sealed once, under a key that is sealed to each reader. Which record it is of, and for whom, is
in clear and signed by the contributor.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from caltrain.crypto.aead import KEY_BYTES, seal, unseal
from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, envelope_from_json
from caltrain.crypto.hpke import HpkePrivateKey, seal_to
from caltrain.crypto.kdf import derive
from caltrain.errors import AccessError, IntegrityError
from caltrain.records.commitment import PartyName, RecordRef

MAX_READERS = 64
_STEP = "open disclosure"
Sealed = Annotated[str, msgspec.Meta(max_length=2048)]


class SealedDisclosure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """For each reader the sealed key, and what it opens (base64), signed by the contributor (`sealed-disclosure`)."""

    record_ref: RecordRef
    model: Digest
    readers: Annotated[dict[PartyName, Sealed], msgspec.Meta(max_length=MAX_READERS)]
    sealed: Annotated[str, msgspec.Meta(max_length=MAX_ENVELOPE_BYTES)]


@dataclass(frozen=True)
class Reading:
    """A reader's name in the plan, and its key."""

    name: str
    key: HpkePrivateKey


def seal_disclosure(
    disclosure: Envelope, reference: RecordRef, *, model: str, readers: Mapping[str, str]
) -> SealedDisclosure:
    """Seal a signed disclosure to readers, by name and encryption key. Raises IntegrityError `hpke.bad-key`."""
    key, place = os.urandom(KEY_BYTES), _place(reference, model)
    sealed = seal(derive(key, "disclosure/v1"), msgspec.json.encode(disclosure), aad=place)
    keys = {name: seal_to(public, key, info=_info(place, name)) for name, public in readers.items()}
    return SealedDisclosure(
        record_ref=reference,
        model=model,
        readers={name: base64.b64encode(each).decode() for name, each in keys.items()},
        sealed=base64.b64encode(sealed).decode(),
    )


def open_disclosure(sealed: SealedDisclosure, reading: Reading) -> Envelope:
    """The signed disclosure, for one of its readers; what it says is still to be checked.

    Raises AccessError `disclosure.not-for-you`, IntegrityError `hpke.not-authentic`, `sealed.not-authentic`.
    """
    if reading.name not in sealed.readers:
        raise AccessError(
            "disclosure.not-for-you",
            f"it is sealed to {', '.join(sorted(sealed.readers)) or 'nobody'}, not to {reading.name}",
            step=_STEP,
            fix="Those whom the plan names under trace.disclose_to can open it.",
        )
    place = _place(sealed.record_ref, sealed.model)
    try:
        wrapped = base64.b64decode(sealed.readers[reading.name], validate=True)
        content = base64.b64decode(sealed.sealed, validate=True)
    except (binascii.Error, ValueError):
        raise IntegrityError(
            "disclosure.unreadable", "a sealed disclosure is not base64", step=_STEP, fix="Get it again."
        ) from None
    key = reading.key.unseal(wrapped, info=_info(place, reading.name), step=_STEP)
    # Derived, whatever length a contributor gave its key.
    plain = unseal(derive(key, "disclosure/v1"), content, aad=place, step=_STEP)
    return envelope_from_json(plain, step=_STEP)


def _place(reference: RecordRef, model: str) -> bytes:
    return digest("sealed-disclosure/v1", canonical_json(reference), model.encode()).encode()


def _info(place: bytes, name: str) -> bytes:
    return place + b"/" + name.encode()
