"""HKDF-SHA256 (RFC 5869) with a purpose in every derivation."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def derive(secret: bytes, purpose: str, *context: bytes, length: int = 32) -> bytes:
    """Derive `length` bytes (at most 8160) from `secret` for one purpose and context.

    `context` parts are length-prefixed, so no two (purpose, context) pairs give the same info string.
    """
    info = b"caltrain:" + purpose.encode() + b"\0"
    for part in context:
        info += len(part).to_bytes(4, "big") + part
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)
