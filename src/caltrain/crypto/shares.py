"""k-of-n sharing of a 32-byte secret (A. Shamir, How to share a secret, CACM 22(11), 1979), over GF(2**521 - 1).

A share is `version (1) | x (2) | y (66)`, big endian: the point (x, f(x)) of a polynomial of degree k - 1 whose
constant is the secret with its digest (512 bits) and whose other coefficients are uniform in the field. Fewer than k
shares say nothing about the secret, whoever holds them: for every secret there are shares that complete them. k shares
that do not belong together, or one that was changed, are found out by the digest. A share is not signed: its holder
alone cannot choose what it joins to, but k holders together can, so seal and sign what carries it. Arithmetic on
Python integers takes a time that depends on the values: split and join where nobody measures it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

from caltrain.crypto.digests import hash_parts
from caltrain.errors import IntegrityError

SECRET_BYTES = 32
MAX_SHARES = 256
SHARE_BYTES = 69
PRIME = (1 << 521) - 1
_VERSION = b"\x01"
_Y_BYTES = 66

Point = tuple[int, int]


def split(secret: bytes, *, threshold: int, shares: int, draw: Callable[[int], bytes] = os.urandom) -> list[bytes]:
    """`shares` shares of 69 bytes each, of which any `threshold` join to `secret` (32 bytes).

    `draw(n)` gives n random bytes. Raises IntegrityError `shares.bounds` or `shares.secret`.
    """
    _check_bounds(threshold, shares)
    if len(secret) != SECRET_BYTES:
        raise _refused("shares.secret", f"a secret of {len(secret)} bytes, not {SECRET_BYTES}")
    polynomial = [_constant(secret), *(_element(draw) for _ in range(threshold - 1))]
    return [_encode(x, _evaluate(polynomial, x)) for x in range(1, shares + 1)]


def join(shares: Sequence[bytes], threshold: int) -> bytes:
    """The secret behind at least `threshold` shares; all must lie on one polynomial of that degree.

    Raises IntegrityError `shares.bounds`, `shares.too-few`, `shares.malformed`, `shares.duplicate` or
    `shares.inconsistent` (a false share, shares of two secrets, or a threshold that is too low).
    """
    _check_bounds(threshold, max(len(shares), threshold))
    if len(shares) < threshold:
        raise _refused("shares.too-few", f"{len(shares)} shares, {threshold} are needed")
    points = [_decode(share) for share in shares]
    if len({x for x, _ in points}) != len(points):
        raise _refused("shares.duplicate", "two shares have the same number")
    chosen, others = points[:threshold], points[threshold:]
    constant = _interpolate(chosen, 0)
    secret = constant.to_bytes(_Y_BYTES, "big")[-2 * SECRET_BYTES : -SECRET_BYTES]
    if _constant(secret) != constant or any(_interpolate(chosen, x) != y for x, y in others):
        raise _refused("shares.inconsistent", "the shares do not belong to one secret")
    return secret


def _check_bounds(threshold: int, shares: int) -> None:
    if not 1 <= threshold <= shares <= MAX_SHARES:
        raise _refused("shares.bounds", f"{threshold} of {shares} shares; it must be 1 <= k <= n <= {MAX_SHARES}")


def _constant(secret: bytes) -> int:
    return int.from_bytes(secret + hash_parts("shares/v1", secret), "big")


def _element(draw: Callable[[int], bytes]) -> int:
    """A uniform element of the field: the one number of 521 bits that is not in it is drawn again."""
    drawn = (int.from_bytes(draw(_Y_BYTES), "big") & PRIME for _ in itertools.count())
    return next(value for value in drawn if value != PRIME)


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def _interpolate(points: Sequence[Point], at: int) -> int:
    """The value at `at` of the polynomial through `points` (Lagrange)."""
    total = 0
    for x, y in points:
        above, below = y, 1
        for other, _ in points:
            if other != x:
                above, below = above * (at - other) % PRIME, below * (x - other) % PRIME
        total += above * pow(below, -1, PRIME)
    return total % PRIME


def _encode(x: int, y: int) -> bytes:
    return _VERSION + x.to_bytes(2, "big") + y.to_bytes(_Y_BYTES, "big")


def _decode(share: bytes) -> Point:
    x, y = int.from_bytes(share[1:3], "big"), int.from_bytes(share[3:], "big")
    if len(share) != SHARE_BYTES or share[:1] != _VERSION or not 1 <= x <= MAX_SHARES or y >= PRIME:
        raise _refused("shares.malformed", f"{len(share)} bytes are not a share of this version")
    return x, y


def _refused(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code, what, step="share a secret", fix="Collect the shares of one secret again, each from its holder."
    )
