"""Merkle trees, against RFC 6962 written out naively and against its known vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.merkle import MerkleBuilder, inclusion_proof, leaf_hash, merkle_root, root_from_proof
from caltrain.errors import LineageError
from support.samples import quick, refused

# Leaves and roots of the Certificate Transparency reference code (certificate-transparency-go, Apache-2.0).
CT_LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def split(size: int) -> int:
    """The largest power of two below `size`."""
    power = 1
    while power * 2 < size:
        power *= 2
    return power


def tree_hash(leaves: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1."""
    if not leaves:
        return sha(b"")
    if len(leaves) == 1:
        return sha(b"\0" + leaves[0])
    k = split(len(leaves))
    return sha(b"\1" + tree_hash(leaves[:k]) + tree_hash(leaves[k:]))


def path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*path(index, leaves[:k]), tree_hash(leaves[k:])]
    return [*path(index - k, leaves[k:]), tree_hash(leaves[:k])]


def numbered(count: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(count)]


@pytest.mark.parametrize("size", range(9))
def test_roots_of_certificate_transparency(size: int) -> None:
    assert merkle_root(CT_LEAVES[:size]).hex() == CT_ROOTS[size]
    assert tree_hash(CT_LEAVES[:size]).hex() == CT_ROOTS[size]


@pytest.mark.parametrize("size", range(1, 35))
def test_every_proof_is_that_of_the_rfc_and_leads_to_the_root(size: int) -> None:
    leaves = numbered(size)
    for index, leaf in enumerate(leaves):
        proof = inclusion_proof(leaves, index)
        assert list(proof) == path(index, leaves)
        assert root_from_proof(leaf, index=index, size=size, proof=proof) == tree_hash(leaves)


@quick
@given(st.lists(st.binary(max_size=8), max_size=40))
def test_roots_of_any_leaves_are_those_of_the_rfc(leaves: list[bytes]) -> None:
    builder = MerkleBuilder()
    for count, leaf in enumerate(leaves):
        assert builder.root() == tree_hash(leaves[:count])
        builder.append(leaf)
    assert builder.root() == merkle_root(iter(leaves)) == tree_hash(leaves)


@quick
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(0, n - 1))))
def test_a_proof_is_for_one_leaf_at_one_index(place: tuple[int, int, int]) -> None:
    size, index, other = place
    leaves = numbered(size)
    root, proof = merkle_root(leaves), inclusion_proof(leaves, index)
    assert root_from_proof(b"another", index=index, size=size, proof=proof) != root
    if other != index:
        assert root_from_proof(leaves[other], index=index, size=size, proof=proof) != root
        try:
            assert root_from_proof(leaves[index], index=other, size=size, proof=proof) != root
        except LineageError as error:
            assert error.code == "merkle.malformed-proof"  # noqa: PT017


@quick
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), st.data())
def test_a_changed_hash_in_a_proof_leads_elsewhere(place: tuple[int, int], data: st.DataObject) -> None:
    size, index = place
    leaves = numbered(size)
    proof = list(inclusion_proof(leaves, index))
    level = data.draw(st.integers(0, len(proof) - 1))
    proof[level] = bytes([proof[level][0] ^ 1]) + proof[level][1:]
    assert root_from_proof(leaves[index], index=index, size=size, proof=proof) != merkle_root(leaves)


def test_a_node_shown_as_a_leaf_leads_elsewhere() -> None:
    a, b = leaf_hash(b"a"), leaf_hash(b"b")
    root = merkle_root([b"a", b"b"])
    assert root == sha(b"\1" + a + b)
    assert root_from_proof(a + b, index=0, size=1, proof=()) != root
    assert root_from_proof(b"\1" + a + b, index=0, size=1, proof=()) != root


@pytest.mark.parametrize("size", range(1, 18))
def test_a_proof_of_another_length_is_refused(size: int) -> None:
    leaves = numbered(size)
    for index, leaf in enumerate(leaves):
        proof = inclusion_proof(leaves, index)
        for wrong in [(*proof, bytes(32)), *(proof[:n] for n in range(len(proof)))]:
            with refused(LineageError, "merkle.malformed-proof"):
                root_from_proof(leaf, index=index, size=size, proof=wrong)


BAD_PLACES: dict[str, tuple[int, int, list[bytes]]] = {
    "negative index": (-1, 1, []),
    "index at the size": (1, 1, []),
    "empty tree": (0, 0, []),
    "negative size": (0, -1, []),
    "short hash": (0, 2, [bytes(31)]),
    "long hash": (0, 2, [bytes(33)]),
    "longer than any tree": (0, 1 << 65, [bytes(32)] * 65),
}


@pytest.mark.parametrize(("index", "size", "proof"), BAD_PLACES.values(), ids=BAD_PLACES)
def test_a_malformed_proof_is_refused(index: int, size: int, proof: list[bytes]) -> None:
    with refused(LineageError, "merkle.malformed-proof"):
        root_from_proof(b"leaf", index=index, size=size, proof=proof)


@pytest.mark.parametrize(("index", "count"), [(0, 0), (1, 1), (-1, 3), (3, 3)])
def test_no_proof_for_a_leaf_that_is_not_there(index: int, count: int) -> None:
    with refused(LineageError, "merkle.no-such-leaf"):
        inclusion_proof(numbered(count), index)
