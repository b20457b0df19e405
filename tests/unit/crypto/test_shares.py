"""Secret sharing: any k shares join, fewer say nothing, and what is not a share is refused."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltrain.crypto import shares as module
from caltrain.crypto.shares import MAX_SHARES, PRIME, SHARE_BYTES, join, split
from caltrain.errors import IntegrityError

SECRET = bytes(range(32))
secrets = st.binary(min_size=32, max_size=32)


def seeded(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(IntegrityError) as caught:
        call()
    assert caught.value.code == code


def point(share: bytes) -> tuple[int, int]:
    return int.from_bytes(share[1:3], "big"), int.from_bytes(share[3:], "big")


def constant(secret: bytes) -> int:
    return int.from_bytes(
        secret + hashlib.sha256(b"caltrain:shares/v1\0" + bytes(7) + b"\x20" + secret).digest(), "big"
    )


def share_of(x: int, y: int) -> bytes:
    return b"\x01" + x.to_bytes(2, "big") + y.to_bytes(66, "big")


def through(points: Sequence[tuple[int, int]], at: int) -> int:
    """Interpolation by solving a Vandermonde system: another way than the module's."""
    n = len(points)
    rows = [[pow(x, j, PRIME) for j in range(n)] + [y] for x, y in points]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], PRIME - 2, PRIME)
        rows[i] = [value * inverse % PRIME for value in rows[i]]
        for r in range(n):
            if r != i:
                rows[r] = [(a - rows[r][i] * b) % PRIME for a, b in zip(rows[r], rows[i], strict=True)]
    return sum(row[-1] * pow(at, j, PRIME) for j, row in enumerate(rows)) % PRIME


@settings(max_examples=40, deadline=None)
@given(secret=secrets, threshold=st.integers(1, 6), more=st.integers(0, 4), data=st.data())
def test_any_k_shares_join_in_any_order(secret: bytes, threshold: int, more: int, data: st.DataObject) -> None:
    made = split(secret, threshold=threshold, shares=threshold + more, draw=seeded(threshold))
    chosen = data.draw(st.permutations(made))
    for count in range(threshold, len(made) + 1):
        assert join(chosen[:count], threshold) == secret


def test_every_choice_of_three_in_five() -> None:
    made = split(SECRET, threshold=3, shares=5)
    assert {join(chosen, 3) for chosen in itertools.combinations(made, 3)} == {SECRET}


@settings(max_examples=30, deadline=None)
@given(secret=secrets, other=secrets, threshold=st.integers(2, 5))
def test_with_one_share_less_every_secret_is_possible(secret: bytes, other: bytes, threshold: int) -> None:
    held = split(secret, threshold=threshold, shares=threshold, draw=seeded(1))[:-1]
    # For any other secret there is exactly one last share that leads to it, and it is as likely as the true one.
    points = [(0, constant(other)), *map(point, held)]
    last = share_of(threshold, through(points, threshold))
    assert join([*held, last], threshold) == other


def test_the_polynomial_is_the_drawn_one() -> None:
    drawn = [(7).to_bytes(66, "big"), (11).to_bytes(66, "big")]
    made = split(SECRET, threshold=3, shares=4, draw=lambda n: drawn.pop(0) if n == 66 else b"")
    assert [point(share) for share in made] == [(x, constant(SECRET) + 7 * x + 11 * x * x) for x in (1, 2, 3, 4)]
    assert {len(share) for share in made} == {SHARE_BYTES}


def test_a_draw_outside_the_field_is_drawn_again() -> None:
    drawn = [b"\xff" * 66, b"\x01" + b"\xff" * 65, b"\xfe" + bytes(65)]
    made = split(bytes(32), threshold=2, shares=1 + 1, draw=lambda _: drawn.pop(0))
    assert drawn == []
    assert [point(share) for share in made] == [
        (x, constant(bytes(32))) for x in (1, 2)
    ]  # of the last draw the upper seven bits are dropped


def test_shares_are_drawn_from_the_system_by_default() -> None:
    assert split(SECRET, threshold=2, shares=2) != split(SECRET, threshold=2, shares=2)


def test_the_largest_numbers() -> None:
    made = split(b"\xff" * 32, threshold=2, shares=MAX_SHARES)
    assert join(made[-2:], 2) == b"\xff" * 32
    assert join(made, 2) == b"\xff" * 32
    assert join(split(SECRET, threshold=MAX_SHARES, shares=MAX_SHARES), MAX_SHARES) == SECRET


def test_one_of_one_is_the_secret_itself() -> None:
    assert split(SECRET, threshold=1, shares=2) == [share_of(x, constant(SECRET)) for x in (1, 2)]


MADE = split(SECRET, threshold=3, shares=5, draw=seeded(3))
FOREIGN = split(bytes(32), threshold=3, shares=5, draw=seeded(4))


@pytest.mark.parametrize(
    ("code", "shares", "threshold"),
    [
        ("shares.bounds", MADE, 0),
        ("shares.bounds", MADE, -1),
        ("shares.bounds", [], MAX_SHARES + 1),
        ("shares.bounds", [MADE[0]] * (MAX_SHARES + 1), 3),
        ("shares.too-few", MADE[:2], 3),
        ("shares.too-few", [], 1),
        ("shares.duplicate", [MADE[0], MADE[0], MADE[1]], 3),
        ("shares.duplicate", [*MADE, FOREIGN[4]], 3),
        ("shares.malformed", [*MADE[:2], b""], 3),
        ("shares.malformed", [*MADE[:2], MADE[2][:-1]], 3),
        ("shares.malformed", [*MADE[:2], MADE[2] + b"\0"], 3),
        ("shares.malformed", [*MADE[:2], b"\x02" + MADE[2][1:]], 3),
        ("shares.malformed", [*MADE[:2], share_of(0, 5)], 3),
        ("shares.malformed", [*MADE[:2], share_of(MAX_SHARES + 1, 5)], 3),
        ("shares.malformed", [*MADE[:2], share_of(3, PRIME)], 3),
        ("shares.inconsistent", [*MADE[:2], FOREIGN[2]], 3),
        ("shares.inconsistent", [*MADE[:3], FOREIGN[3]], 3),
        ("shares.inconsistent", MADE[:2], 2),
        ("shares.inconsistent", MADE, 4 - 2),
    ],
)
def test_what_is_not_enough_shares_of_one_secret_is_refused(code: str, shares: list[bytes], threshold: int) -> None:
    refused(code, lambda: join(shares, threshold))


@settings(max_examples=60, deadline=None)
@given(which=st.integers(0, 2), bit=st.integers(0, SHARE_BYTES * 8 - 1))
def test_a_changed_share_is_refused(which: int, bit: int) -> None:
    chosen = MADE[:3]
    changed = bytearray(chosen[which])
    changed[bit // 8] ^= 1 << bit % 8
    chosen[which] = bytes(changed)
    with pytest.raises(IntegrityError) as caught:
        join(chosen, 3)
    assert caught.value.code in {"shares.malformed", "shares.duplicate", "shares.inconsistent"}


@pytest.mark.parametrize("small", [1, 2, 1 << 256, PRIME - 1])
def test_a_shift_of_a_share_by_one_who_knows_no_other_is_refused(small: int) -> None:
    """At x = 1, 2, 3 the constant moves by a small multiple of it: without the digest, to a secret near by."""
    for which in range(3):
        x, y = point(MADE[which])
        chosen = [share_of(x, (y + small) % PRIME) if i == which else MADE[i] for i in range(3)]
        refused("shares.inconsistent", lambda chosen=chosen: join(chosen, 3))  # type: ignore[misc]


def test_a_false_share_made_with_all_others_joins_to_another_secret() -> None:
    """What the module says it does not do; a share more finds it out."""
    wanted = bytes(31) + b"\x09"
    false = share_of(3, through([(0, constant(wanted)), *map(point, MADE[:2])], 3))
    assert join([*MADE[:2], false], 3) == wanted
    refused("shares.inconsistent", lambda: join([*MADE[:2], false, MADE[3]], 3))


@pytest.mark.parametrize(("threshold", "shares"), [(0, 1), (-1, 5), (3, 2), (1, MAX_SHARES + 1), (1, 0)])
def test_a_split_out_of_bounds_is_refused_before_anything_is_drawn(threshold: int, shares: int) -> None:
    refused("shares.bounds", lambda: split(SECRET, threshold=threshold, shares=shares, draw=_never))


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_a_secret_of_another_length_is_refused_before_anything_is_drawn(secret: bytes) -> None:
    refused("shares.secret", lambda: split(secret, threshold=2, shares=2, draw=_never))


def _never(_: int) -> bytes:
    raise AssertionError("drawn")


def test_the_field_is_a_field() -> None:
    """2**521 - 1 is prime: the Lucas-Lehmer test, which is exact for such numbers."""
    s = 4
    for _ in range(521 - 2):
        s = (s * s - 2) % PRIME
    assert s == 0
    assert module.PRIME == 2**521 - 1
