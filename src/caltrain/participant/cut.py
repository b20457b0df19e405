"""A party's word that the FrontNet may become shallower, which lets trained layers out."""

from __future__ import annotations

from typing import Any

from caltrain.crypto.dsse import Envelope
from caltrain.errors import AccessError
from caltrain.host_client import HostClient
from caltrain.participant.heads import look
from caltrain.participant.identity import Identity
from caltrain.participant.join import check_named
from caltrain.participant.rejoin import same_run
from caltrain.plan import CutApproval, Plan


def agree_to_cut(host: HostClient, plan: Plan, identity: Identity, *, front: int, seconds: float) -> str:
    """Wait until the run asks, then sign for this very cut at this very place of the chain. Returns its head.

    Raises before anything is sent: AccessError `cut.other-asked`, and as `rejoin` does for another run or chain.
    """
    check_named(plan, identity)
    asked = host.wait_for({"cut"}, seconds=seconds).cut
    if asked != front:
        raise AccessError(
            "cut.other-asked",
            f"the operator asks for a FrontNet of {asked} layers, {front} would be agreed to",
            step="agree to a cut",
            fix="Agree to what is asked for, or have the operator ask for this.",
        )
    run = same_run(host, plan, identity)
    head = look(host, identity, run)[-1].digest()
    envelope: Envelope = identity.signer.sign(
        "move-cut", CutApproval(run=run, head=head, party=identity.name, front=front)
    )
    host.post(f"/v1/parties/{identity.name}/cut", envelope, dict[str, Any])
    return head
