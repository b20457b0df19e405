"""What the enclave signs about a model.

`audit_rate` is the share of the center's steps that the enclave repeated; 0 means: center not audited.
`resumes` counts restarts before the release: the audit's chance holds from one to the next, and steps before each may
have been repeated.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from caltrain.crypto.digests import Digest
from caltrain.records.commitment import ShardId


class ModelStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """At release: this model came out of this run of this plan over this manifest (DSSE kind `model`).

    `front_public`: training began from public weights, so the FrontNet was no secret.
    """

    version: Literal[1] = 1
    run: ShardId
    plan: Digest
    manifest: Digest
    model: Digest
    epochs: int
    front_public: bool
    audit_rate: float
    resumes: int
    simulated: bool


class LinkedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """After the link pass: traces of this run are traces of this model (DSSE kind `linked-model`).

    `commitments` is the Merkle root over all record commitments in ascending order.
    """

    version: Literal[1] = 1
    run: ShardId
    model: Digest
    records: int
    commitments: Digest
    audit_rate: float
    resumes: int
    simulated: bool
