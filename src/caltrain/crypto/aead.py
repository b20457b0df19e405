"""AES-256-GCM (NIST SP 800-38D): single sealed messages, and numbered frames under a key of their own.

A sealed message is `version (1) | nonce (12) | ciphertext | tag (16)`, nonce from the operating system.
A frame has no stored nonce: its counter is the nonce, so a frame key must never serve two streams.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from caltrain.errors import IntegrityError

KEY_BYTES = 32
TAG_BYTES = 16
OVERHEAD = 1 + 12 + TAG_BYTES
_VERSION = b"\x01"


def _refused(step: str, fix: str) -> IntegrityError:
    return IntegrityError("sealed.not-authentic", "sealed bytes do not authenticate", step=step, fix=fix)


def seal(key: bytes, plaintext: bytes | memoryview, *, aad: bytes) -> bytes:
    """Seal one message under a key that may seal many. `aad` binds it to where it belongs."""
    nonce = os.urandom(12)
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, plaintext, _VERSION + aad)


def unseal(key: bytes, sealed: bytes | memoryview, *, aad: bytes, step: str) -> bytes:
    """Open what `seal` made. Raises IntegrityError when the key, the bytes or `aad` differ."""
    blob = bytes(sealed)
    fix = "Get the sealed bytes again from their source; if it fails again, they were altered or belong elsewhere."
    if len(blob) < OVERHEAD or blob[:1] != _VERSION:
        raise _refused(step, fix)
    try:
        return AESGCM(key).decrypt(blob[1:13], blob[13:], _VERSION + aad)
    except InvalidTag:
        raise _refused(step, fix) from None


class FrameCipher:
    """Numbered AES-GCM frames: frame `i` has nonce `i`, so the key belongs to one stream alone.

    `context` is authenticated with every frame.
    """

    def __init__(self, key: bytes, *, context: bytes) -> None:
        self._cipher = AESGCM(key)
        self._context = context

    def seal(self, index: int, plaintext: bytes | memoryview) -> bytes:
        """Ciphertext and tag of frame `index`: `len(plaintext) + 16` bytes."""
        return self._cipher.encrypt(index.to_bytes(12, "big"), plaintext, self._context)

    def unseal(self, index: int, frame: bytes | memoryview, *, step: str) -> bytes:
        """Open frame `index`. Raises IntegrityError for another frame, key or context."""
        try:
            return self._cipher.decrypt(index.to_bytes(12, "big"), frame, self._context)
        except InvalidTag:
            raise _refused(
                step, f"Frame {index} was altered, moved or sealed under another key; get the file again."
            ) from None
