"""The cut moves between epochs: deeper whenever it is asked for, shallower with every party's signature.

Deeper takes layers in, with their parameters and what the optimiser remembers of them, from the CenterNet's state that
the host committed to. Shallower lets layers out in clear, as it lets out what they know of the records.
"""

from __future__ import annotations

import msgspec

from caltrain.boundary.messages import Done, MoveCut
from caltrain.crypto.digests import to_raw
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.run import Run, State, present
from caltrain.enclave.zones import center_zone, make_zone, same_center, shown_center
from caltrain.errors import AccessError, IntegrityError, ProtocolError
from caltrain.models.spec import zone_ranges
from caltrain.models.weights import encode_state, model_digest
from caltrain.plan import CutApproval, check_plan
from caltrain.training.zone import of_layers


def move_cut(run: Run, message: MoveCut) -> tuple[Done, State]:
    """Move the first cut; the host finds layers that went out as `center-moved`."""
    plan, course = present(run.plan), present(run.course)
    before, after = run.partition, plan.partition.at(message.front)
    check_plan(msgspec.structs.replace(plan, partition=after))  # what leaves in the end must fit through the door, too
    least = plan.partition.front_at(course.epoch)
    first = not course.epoch and run.assessment is None  # the first cut is the plan's, or what was judged due
    if course.step or first or after.front == before.front or after.front < least:
        raise ProtocolError(
            "cut.not-now",
            f"from {before.front} to {after.front} layers (at least {least}) in epoch {course.epoch}.{course.step}",
            step="move cut",
            fix="Move the cut between two epochs, to another layer, no shallower than the plan's schedule.",
        )
    # A restart may have brought back a cut from before the last move: the chain knows how deep it was.
    if after.front < max(before.front, run.chain.last("cut", "front", 0)):
        _check_consent(run, message)
    same_center(run)
    center = center_zone(run)
    # It takes exactly what is its own: a CenterNet with more in it would replace our FrontNet.
    center.load(shown_center(run, (course.epoch, course.step), course.center), step="move cut")
    both = present(run.front).state() | center.state()
    front_layers, center_layers, _ = zone_ranges(plan.model, after)
    front = make_zone(run, front_layers, run.seeds.front)
    front.load(of_layers(both, front_layers), step="move cut")
    if after.front < before.front:
        moved = encode_state(of_layers(both, range(after.front, before.front)))
        run.door.write("center-moved", len(moved).to_bytes(8, "big") + moved, offset=0)
    run.front = front
    course.front = after.front
    course.center = to_raw(model_digest(plan.model, of_layers(both, center_layers)))
    run.record("cut", {"epoch": course.epoch, "before": before.front, "front": after.front})
    return Done(at=(course.epoch, course.step), front=course.front), State.READY


def _check_consent(run: Run, message: MoveCut) -> None:
    """Every party has signed this very cut at this very place of the chain."""
    for party in present(run.plan).parties:
        envelope = message.approvals.get(party.name)
        if envelope is None:
            raise AccessError(
                "cut.not-agreed",
                f"{party.name} has not signed that the FrontNet becomes shallower",
                step="move cut",
                fix="It lets layers out: every party must sign, or the cut stays.",
            )
        approval = open_envelope(envelope, "move-cut", party.public_key, CutApproval, step="move cut")
        due = CutApproval(run=run.vault.run, head=run.chain.head, party=party.name, front=message.front)
        if approval != due:
            raise IntegrityError(
                "cut.other-approval",
                f"{party.name} signed another cut, or at another place of the chain",
                step="move cut",
                fix="Have every party sign for the present head of the chain.",
            )
