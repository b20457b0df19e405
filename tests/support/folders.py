"""The folders of a world's parties: as `create_identity` and `seal_records` would have made them."""

from __future__ import annotations

from pathlib import Path

from caltrain.attestation.verify import Policy
from caltrain.crypto.dsse import Envelope
from caltrain.participant.identity import Identity
from support.members import Member
from support.world import MEASUREMENT, World


def identity_of(member: Member, folder: Path) -> Identity:
    """The member with its sealed shards in `folder`."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for shard in member.shards:
        (folder / "shards" / f"{shard.header.shard}.shard").write_bytes(shard.raw)
    return Identity(folder, member.name, member.signer, member.data_key)


def policy_of(world: World) -> Policy:
    """A policy that accepts the world's enclave."""
    return Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=(world.root.public,))


def signed_manifest(world: World) -> Envelope:
    """The manifest as the enclave signed it (Ed25519 gives the same signature again)."""
    return world.run.vault.signing.sign("run-manifest", world.manifest)
