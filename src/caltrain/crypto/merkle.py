"""Merkle trees and inclusion proofs (RFC 6962, section 2.1) over SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from caltrain.errors import LineageError

_LEAF = b"\x00"
_NODE = b"\x01"
_MAX_PROOF = 64


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of one leaf; the prefix keeps leaves apart from nodes."""
    return hashlib.sha256(_LEAF + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(_NODE + left + right).digest()


class MerkleBuilder:
    """Root of a stream of leaves in memory that grows with the logarithm of their number."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, bytes]] = []  # (height, hash), heights strictly falling

    def append(self, leaf: bytes) -> None:
        """Add the next leaf."""
        height, value = 0, leaf_hash(leaf)
        while self._stack and self._stack[-1][0] == height:
            value = _node(self._stack.pop()[1], value)
            height += 1
        self._stack.append((height, value))

    def root(self) -> bytes:
        """Root over the leaves so far: 32 bytes; SHA-256 of nothing for an empty tree."""
        if not self._stack:
            return hashlib.sha256().digest()
        value = self._stack[-1][1]
        for _, left in reversed(self._stack[:-1]):
            value = _node(left, value)
        return value


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over `leaves` in order."""
    builder = MerkleBuilder()
    for leaf in leaves:
        builder.append(leaf)
    return builder.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Audit path for leaf `index`, lowest sibling first."""
    if not 0 <= index < len(leaves):
        raise LineageError(
            "merkle.no-such-leaf",
            f"leaf {index} of a tree of {len(leaves)}",
            step="inclusion proof",
            fix="Name a leaf that the shard has.",
        )
    if len(leaves) == 1:
        return ()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return (*inclusion_proof(leaves[:split], index), merkle_root(leaves[split:]))
    return (*inclusion_proof(leaves[split:], index - split), merkle_root(leaves[:split]))


def root_from_proof(leaf: bytes, *, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that `proof` leads to (RFC 9162, section 2.1.3.2).

    Raises LineageError when the proof has not exactly the length that (index, size) demands: a longer or
    shorter one could show a node as a leaf.
    """
    if not 0 <= index < size or len(proof) > _MAX_PROOF or any(len(p) != 32 for p in proof):
        raise _malformed()
    fn, sn, value = index, size - 1, leaf_hash(leaf)
    for sibling in proof:
        if sn == 0:
            raise _malformed()
        if fn & 1 or fn == sn:
            value = _node(sibling, value)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            value = _node(value, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise _malformed()
    return value


def _malformed() -> LineageError:
    return LineageError(
        "merkle.malformed-proof",
        "an inclusion proof does not fit its leaf index and tree size",
        step="verify inclusion",
        fix="Ask the contributor for the disclosure again; refuse it if it repeats.",
    )
