"""What the enclave signs about a model.

`audit_rate` is the share of the center's steps that the enclave repeated; 0 means: center not audited.
`resumes` counts restarts before the release: the audit's chance holds from one to the next, and steps before each may
have been repeated. `repair` says which model this one replaces and what it was trained without; None for a first run.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import Digest
from caltrain.exposure.figures import Estimate
from caltrain.models.spec import Cut
from caltrain.records.commitment import PartyName, ShardId
from caltrain.records.quarantine import Repair


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
    repair: Repair | None


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
    repair: Repair | None


Figures = Annotated[dict[str, Estimate], msgspec.Meta(max_length=64)]


class AssessedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Before an epoch: what the enclave measured on `sample` sealed records of the model of this moment.

    `front` is the present cut, `figures` hold each measure of the plan's policy that needs no attack, by possible cut.
    What is behind the cut is as the host committed to it (DSSE kind `assessed-model`; arXiv:1812.03230, IV-B).
    """

    version: Literal[1] = 1
    run: ShardId
    plan: Digest
    epoch: int
    front: Cut
    model: Digest
    sample: int
    figures: Annotated[dict[Cut, Figures], msgspec.Meta(max_length=512)]
    simulated: bool


class ExposureVote(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's word after its own assessment: the least FrontNet that it accepts, 0 for none (DSSE `exposure-vote`).

    `report` names the signed report that the party keeps.
    """

    version: Literal[1] = 1
    run: ShardId
    epoch: int
    model: Digest
    party: PartyName
    front: Cut
    report: Digest
