"""Evidence and what it binds.

`report_data` is the only thing a TEE signs for us, so everything that must be true of the other end goes into it:
the purpose, both public keys of the enclave, the plan, and the relying party's nonce. A bundle repeats these as
plain fields; they count only once the digest over them equals the report data that was signed.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Protocol

import msgspec

from caltrain.crypto.digests import Digest, canonical_json
from caltrain.crypto.dsse import PublicKey
from caltrain.crypto.hpke import HpkePublicKey

NONCE_BYTES = 32
Nonce = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Purpose = Literal["training", "resume", "query", "serving"]
MAX_EVIDENCE = 1 << 20


class Binding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one piece of evidence speaks for."""

    purpose: Purpose
    encryption_key: HpkePublicKey
    signing_key: PublicKey
    plan: Digest
    nonce: Nonce

    def report_data(self) -> bytes:
        """64 bytes, SHA-512 over the domain and the canonical binding."""
        return hashlib.sha512(b"caltrain:attestation-binding/v1\0" + canonical_json(self)).digest()


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A technology's signed statement: `blob` and certificates in `aux` are its own formats, base64 text."""

    kind: Annotated[str, msgspec.Meta(max_length=40)]
    blob: Annotated[str, msgspec.Meta(max_length=MAX_EVIDENCE)]
    aux: Annotated[str, msgspec.Meta(max_length=MAX_EVIDENCE)] = ""


class EvidenceBundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an enclave answers to a nonce."""

    binding: Binding
    evidence: Evidence


class Attester(Protocol):
    """The end that lives with the enclave and makes evidence."""

    kind: str
    simulated: bool
    measurement: str

    def evidence(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes of report data."""
