"""Digests that carry their algorithm, over length-prefixed parts in a named domain.

A digest is text, `sha256:<64 hex digits>`, so that a hash is never apart from its algorithm. Domains are
separated: the same bytes hashed for two purposes never give the same digest.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated

import msgspec
import rfc8785

from caltrain.errors import ConfigError, IntegrityError

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
"""Type of a digest field in a message: `sha256:` and 64 hex digits."""

_PREFIX = b"caltrain:"
_FORM = re.compile(r"sha256:[0-9a-f]{64}")


def hash_parts(domain: str, *parts: bytes | memoryview) -> bytes:
    """SHA-256 over a domain and length-prefixed parts, 32 raw bytes. Injective in (domain, parts)."""
    h = hashlib.sha256(_PREFIX + domain.encode() + b"\0")
    for part in parts:
        h.update(len(part).to_bytes(8, "big"))
        h.update(part)
    return h.digest()


def digest(domain: str, *parts: bytes | memoryview) -> str:
    """`hash_parts` as digest text."""
    return "sha256:" + hash_parts(domain, *parts).hex()


def to_text(raw: bytes) -> str:
    """32 raw SHA-256 bytes as digest text."""
    return "sha256:" + raw.hex()


def to_raw(text: str) -> bytes:
    """The 32 raw bytes of digest text. Raises IntegrityError for another algorithm or form."""
    if not _FORM.fullmatch(text):
        raise IntegrityError(
            "digest.form",
            f"{text[:80]!r} is not a sha256 digest",
            step="read digest",
            fix="Give it as sha256: and 64 hexadecimal digits in lower case.",
        )
    return bytes.fromhex(text.removeprefix("sha256:"))


def same(a: str | bytes, b: str | bytes) -> bool:
    """Compare two digests or tags without an early exit."""
    left = a.encode() if isinstance(a, str) else a
    right = b.encode() if isinstance(b, str) else b
    return hmac.compare_digest(left, right)


def canonical_json(value: object) -> bytes:
    """RFC 8785 canonical JSON of a msgspec Struct (whose number keys become text) or of builtins.

    Raises ConfigError where the value has no canonical form (NaN, integers beyond 2**53, nesting without end).
    """
    try:
        return rfc8785.dumps(msgspec.to_builtins(value, str_keys=isinstance(value, msgspec.Struct)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            "json.not-canonical",
            f"a value has no canonical JSON form: {error}",
            step="canonical JSON",
            fix="Use finite numbers, and integers below 2**53.",
        ) from error
