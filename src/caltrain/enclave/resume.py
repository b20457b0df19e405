"""A run taken up by another enclave, once a quorum of parties has verified it and signed where the run stands.

Every answer to a replayed step would be one more adaptive query to the FrontNet, so the host alone cannot restart a
run: the checkpoint's key comes together only from the parties, each of whom signs the chain's head that it knows
(DESIGN: the protocol, 7). That head must be the end of the chain that the host shows, and the chain's last checkpoint
event must name this very checkpoint; so an older, another or a mixed one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from caltrain.boundary.messages import Done, Rejoin, Resume
from caltrain.boundary.sealed import ResumeSecret, SealedMessage, open_message
from caltrain.crypto import shares
from caltrain.crypto.digests import digest, same
from caltrain.crypto.dsse import Envelope, SigningKey, envelope_from_json, open_envelope
from caltrain.enclave.checkpoint import (
    CheckpointHeader,
    Snapshot,
    open_checkpoint,
    open_share,
    quorum_of,
    read_checkpoint,
)
from caltrain.enclave.enrol import check_program, take_wheel
from caltrain.enclave.ingest import make_pool, start_training
from caltrain.enclave.run import Resuming, Run, State, present
from caltrain.errors import IntegrityError, LineageError
from caltrain.models.weights import State as Weights
from caltrain.plan import plan_from_json
from caltrain.provenance.chain import Chain, Event, verify_chain

_MAX_CHAIN = 1 << 28


def resume(run: Run, message: Resume) -> tuple[Done, State]:
    """Take the plan and look at the checkpoint; nothing of it can be opened yet."""
    plan = plan_from_json(message.plan)
    check_program(run, plan)
    header, blob = read_checkpoint(run, message.checkpoint)
    if header.plan != plan.digest():
        raise _refuse("resume.other-plan", f"it belongs to the plan {header.plan}")
    take_wheel(run, plan)
    run.plan, run.resuming = plan, Resuming(header.run, digest("checkpoint/v1", blob), message.checkpoint)
    return Done(), State.RESUMING


def rejoin(run: Run, message: Rejoin) -> tuple[Done, State]:
    """Take a party's word; with the last one that it takes, open the checkpoint and go on from there."""
    plan, resuming = present(run.plan), present(run.resuming)
    party = plan.party(message.party)
    sealed = open_envelope(message.envelope, "rejoin", party.public_key, SealedMessage, step="resume")
    if sealed.sender != party.name:
        raise _refuse("resume.other-sender", f"{party.name} sent a word in another name")
    binding = run.vault.redeem(sealed, "resume")
    secret = open_message(sealed, ResumeSecret, binding=binding, key=run.vault.encryption, step="resume")
    if secret.run != resuming.run:
        raise _refuse("resume.other-run", f"{party.name} signed for the run {secret.run}")
    header, blob = _same_checkpoint(run, resuming)
    words = resuming.words | {party.name: (secret.head, open_share(header, party.name, secret.data_key))}
    agreed = {name: share for name, (head, share) in words.items() if head == secret.head}
    if len(agreed) < quorum_of(plan):
        resuming.words = words
        return Done(), State.RESUMING
    key = shares.join(list(agreed.values()), threshold=quorum_of(plan))
    snapshot, tensors = open_checkpoint(blob, header, key)
    events = _chain(run, resuming, snapshot, head=secret.head)
    _restore(run, resuming, snapshot, tensors, events)
    run.record("resume", {"at": _place(run), "parties": sorted(agreed)})
    return _reply(run, snapshot.state), snapshot.state


def _same_checkpoint(run: Run, resuming: Resuming) -> tuple[CheckpointHeader, bytes]:
    header, blob = read_checkpoint(run, resuming.checkpoint)
    if not same(digest("checkpoint/v1", blob), resuming.digest):
        raise _refuse("resume.exchanged", "the host exchanged it while the parties signed")
    return header, blob


def _chain(run: Run, resuming: Resuming, snapshot: Snapshot, *, head: str) -> tuple[Event, ...]:
    """The chain that ends in the head that the parties signed, and whose last checkpoint is this one."""
    raw = run.door.read_all("chain.jsonl", limit=_MAX_CHAIN)
    envelopes: list[Envelope] = [envelope_from_json(line, step="resume") for line in raw.splitlines()]
    key = SigningKey(snapshot.signing_key).public
    events = verify_chain(envelopes, run=resuming.run, signing_key=key)
    if not events or not same(events[-1].digest(), head):
        raise LineageError(
            "resume.other-chain",
            "the host's chain does not end in the head that the parties signed",
            step="resume",
            fix="Get the whole chain back from a party that kept it.",
        )
    named = [event.body.get("sealed") for event in events if event.kind == "checkpoint"]
    if not named or named[-1] != resuming.digest:
        raise _refuse("resume.older", "the run has a newer checkpoint than this one")
    stops = [str(event.body.get("code")) for event in events if event.kind == "stopped"]
    caught = [code for code in stops if code.startswith("audit.")]
    if caught:
        raise _refuse("resume.caught", f"the audit stopped the run for good ({caught[0]})")
    return events


def _restore(
    run: Run, resuming: Resuming, snapshot: Snapshot, tensors: dict[str, Tensor], events: Sequence[Event]
) -> None:
    plan = present(run.plan)
    if snapshot.manifest.run != resuming.run or snapshot.manifest.plan != plan.digest():
        raise _refuse("resume.other-plan", "what is sealed in it belongs to another run or plan")
    run.vault.take_over(snapshot.manifest.run, SigningKey(snapshot.signing_key), snapshot.parties)
    run.chain = Chain(run.vault.signing, run=run.vault.run, events=events)
    run.manifest, run.seed, run.custody = snapshot.manifest, snapshot.seed, snapshot.custody
    run.custody.written += 1  # sealed before it was counted itself: the next one must not take its place
    run.countersigned = {party.name for party in plan.parties}
    run.spent = _spent(events)
    if snapshot.course is not None:
        start_training(run, snapshot.course, snapshot.audit)
        for side, zone in (("front", run.front), ("head", run.head)):
            if zone is not None:
                zone.load(_of_side(tensors, side), step="resume")
        run.pool = make_pool(run, "pool", present(snapshot.pool))
        run.held_out = make_pool(run, "held-out", snapshot.held_out) if snapshot.held_out else None


def _of_side(tensors: dict[str, Tensor], side: str) -> Weights:
    return {n.removeprefix(f"{side}/"): value for n, value in tensors.items() if n.startswith(f"{side}/")}


def _spent(events: Sequence[Event]) -> dict[str, int]:
    """Budgets survive a restart: what was asked is in the chain."""
    spent: dict[str, int] = {}
    for event in events:
        if event.kind == "query":
            user = str(event.body["user"])
            spent[user] = spent.get(user, 0) + int(event.body["inputs"])
    return spent


def _place(run: Run) -> tuple[int, int] | None:
    return (run.course.epoch, run.course.step) if run.course else None


def _reply(run: Run, state: State) -> Done:
    front = run.course.front if run.course else 0
    return Done(state=state, center_seed=run.seeds.center, at=_place(run), front=front)


def _refuse(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code,
        f"the checkpoint was refused: {what}",
        step="resume",
        fix="Resume from the newest checkpoint of this run, with the whole chain, both as the host kept them.",
    )
