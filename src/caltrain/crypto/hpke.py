"""HPKE (RFC 9180), base mode, single shot: X-Wing (ML-KEM-768 with X25519), HKDF-SHA256, AES-256-GCM.

Base mode does not authenticate the sender: what is sealed here is also signed (`crypto.dsse`). What would be
associated data goes into `info`.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from caltrain.crypto.kdf import derive
from caltrain.errors import IntegrityError

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_KEM_BYTES = 1184
_SCHEME = "xwing:"

HpkePublicKey = Annotated[str, msgspec.Meta(pattern=r"^xwing:[A-Za-z0-9+/]+=*\Z", max_length=1700)]
"""Type of an encryption key in a message: `xwing:` and base64 of ML-KEM-768 | X25519 public keys."""


class HpkePrivateKey:
    """A decryption key that never leaves the process that made it. From a `secret` of 32 bytes always the same one."""

    def __init__(self, secret: bytes | None = None) -> None:
        if secret is None:
            kem, dh = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        else:
            kem = MLKEM768PrivateKey.from_seed_bytes(derive(secret, "hpke-ml-kem/v1", length=64))
            dh = X25519PrivateKey.from_private_bytes(derive(secret, "hpke-x25519/v1"))
        self._key = MLKEM768X25519PrivateKey(kem, dh)
        raw = kem.public_key().public_bytes_raw() + dh.public_key().public_bytes_raw()
        self.public: str = _SCHEME + base64.b64encode(raw).decode()

    def unseal(self, sealed: bytes, *, info: bytes, step: str) -> bytes:
        """Open what `seal_to` made for this key and `info`; raises IntegrityError otherwise."""
        try:
            return _SUITE.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError):
            raise IntegrityError(
                "hpke.not-authentic",
                "an HPKE message does not open",
                step=step,
                fix="It was sealed for another enclave, nonce or plan, or altered: attest again and seal anew.",
            ) from None


def seal_to(public: str, plaintext: bytes, *, info: bytes) -> bytes:
    """Seal `plaintext` to a public key. Raises IntegrityError when the key is not one."""
    try:
        raw = base64.b64decode(public.removeprefix(_SCHEME), validate=True)
        if not public.startswith(_SCHEME):
            raise ValueError("scheme")
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(raw[:_KEM_BYTES]), X25519PublicKey.from_public_bytes(raw[_KEM_BYTES:])
        )
        return _SUITE.encrypt(plaintext, key, info=info)
    except (ValueError, binascii.Error):
        raise IntegrityError(
            "hpke.bad-key",
            "the enclave's encryption key is not an X-Wing key",
            step="seal to enclave",
            fix="Refuse this enclave; its evidence and its keys do not belong together.",
        ) from None
