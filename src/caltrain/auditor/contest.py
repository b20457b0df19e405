"""What a contributor says to a trace or verdict that names its records, and who is right: decided record by record.

    outcome         the contributor                                      who is shown to be wrong
    --------------  ---------------------------------------------------  -----------------------------------------
    disclosed       shows the record, salt and proof that fit            nobody: the record is what was trained on
    sealed          has sealed them to readers, and this is none         -
    refused         has signed that it will not                          -
    undisclosed     has said nothing                                     -
    substituted     signed another record or salt                        the contributor
    not-in-shard    signed the record with a proof that does not fit     the contributor
    unreadable      has sealed to readers what this one of them cannot   the contributor, to its readers alone
                    open, or what is not the record it is said to be
    disproves       shows what was sealed there, and it is not what      the enclave: its trace contradicts the
                    the trace names                                      manifest that all parties signed

What answers no record of this trace (another record, another model, another signer) is an error, not an outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import AccessError, CaltrainError, LineageError
from caltrain.plan import ManifestShard, Party, Plan, RunManifest
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure, Refusal, check_disclosure
from caltrain.records.shown import Reading, SealedDisclosure, open_disclosure

Outcome = Literal[
    "disclosed", "sealed", "refused", "undisclosed", "substituted", "not-in-shard", "unreadable", "disproves"
]
_STEP = "verify disclosure"
_FAULTS: dict[str, Outcome] = {
    "disclosure.substituted": "substituted",
    "disclosure.malformed": "substituted",
    "merkle.malformed-proof": "not-in-shard",
    "disclosure.not-in-shard": "not-in-shard",
    "disclosure.disproves": "disproves",
}


@dataclass(frozen=True)
class Decision:
    """What is known of one traced record; `content` are its canonical bytes once disclosed, `fault` why not."""

    rank: int
    record: RecordRef
    outcome: Outcome
    content: bytes = b""
    fault: LineageError | None = None


class _Named(NamedTuple):
    """A record that a trace or verdict names, and where in its order."""

    rank: int
    record: RecordRef
    commitment: str


class _Asked(NamedTuple):
    """What contributors are asked to answer for."""

    model: str
    records: dict[RecordRef, _Named]


def decide(
    answers: Sequence[Envelope],
    plan: Plan,
    manifest: RunManifest,
    named: Mapping[RecordRef, str],
    *,
    model: str,
    reading: Reading | None = None,
) -> tuple[Decision, ...]:
    """A decision for each record that the enclave named (with its commitment), in its order, by what was signed.

    Of several answers for one record the last one counts, unless one of them was a fault. Raises LineageError,
    IntegrityError, AccessError for what is no answer about `model`.
    """
    if reading is not None:
        _is_reader(reading, plan)
    asked = _Asked(model, {r: _Named(rank, r, commitment) for rank, (r, commitment) in enumerate(named.items(), 1)})
    found = {n.record: Decision(n.rank, n.record, "undisclosed") for n in asked.records.values()}
    for answer in answers:
        decision = _decided(answer, plan, manifest, asked, reading)
        if found[decision.record].fault is None:
            found[decision.record] = decision
    return tuple(found.values())


def _decided(answer: Envelope, plan: Plan, manifest: RunManifest, asked: _Asked, reading: Reading | None) -> Decision:
    owner = next((party for party in plan.parties if party.public_key == answer.signer), None)
    if owner is None:
        raise _refuse("disclosure.unknown-signer", "it is signed by no party of the plan")
    match answer.payload_type.removeprefix("application/vnd.caltrain.").removesuffix(".v1+json"):
        case "refusal":
            refusal = open_envelope(answer, "refusal", owner.public_key, Refusal, step=_STEP)
            named = _named(refusal, owner.name, asked)
            return Decision(named.rank, named.record, "refused")
        case "sealed-disclosure":
            sealed = open_envelope(answer, "sealed-disclosure", owner.public_key, SealedDisclosure, step=_STEP)
            named = _named(sealed, owner.name, asked)
            if reading is None:
                return Decision(named.rank, named.record, "sealed")
            try:
                opened = _opened(sealed, owner, reading)
            except CaltrainError as error:
                # Its contributor signed it: what one seals badly is no reason to hide what the others say.
                why = f"{owner.name} sealed to {reading.name} what does not hold ({error.code}: {error.what})"
                return Decision(named.rank, named.record, "unreadable", fault=_refuse("disclosure.not-opened", why))
            return _checked(opened, named, manifest)
        case _:
            disclosure = open_envelope(answer, "disclosure", owner.public_key, Disclosure, step=_STEP)
            if plan.trace.disclose_to:
                raise _refuse("disclosure.not-sealed", "the plan has records disclosed to its readers only")
            return _checked(disclosure, _named(disclosure, owner.name, asked), manifest)


def _is_reader(reading: Reading, plan: Plan) -> None:
    """Raises AccessError `disclosure.not-a-reader`."""
    known = {reader.name: reader.encryption_key for reader in plan.trace.disclose_to}
    if known.get(reading.name) != reading.key.public:
        raise AccessError(
            "disclosure.not-a-reader",
            f"the plan names no reader {reading.name} with this key; its readers: {', '.join(sorted(known)) or 'none'}",
            step=_STEP,
            fix="Verify as a reader whom the plan names under trace.disclose_to, with the key that stands there, or "
            "as nobody in particular.",
        )


def _opened(sealed: SealedDisclosure, owner: Party, reading: Reading) -> Disclosure:
    """What is sealed, signed by the same contributor, of the same record and model."""
    inner = open_disclosure(sealed, reading)
    opened = open_envelope(inner, "disclosure", owner.public_key, Disclosure, step=_STEP)
    if (opened.record_ref, opened.model) != (sealed.record_ref, sealed.model):
        raise _refuse("disclosure.other-inside", "what is sealed in it is of another record or model")
    return opened


def _named(answer: Disclosure | SealedDisclosure | Refusal, party: str, asked: _Asked) -> _Named:
    """The record that it answers for."""
    if answer.model != asked.model:
        raise _refuse("disclosure.other-model", f"it is of the model {answer.model}, the bundle of {asked.model}")
    named = asked.records.get(answer.record_ref)
    if named is None or named.record.party != party:
        raise _refuse("disclosure.not-traced", f"the bundle names no such record of {party}")
    return named


def _checked(disclosure: Disclosure, named: _Named, manifest: RunManifest) -> Decision:
    shard = _shard(manifest, named.record)
    try:
        content = check_disclosure(disclosure, root=shard.root, records=shard.records, commitment=named.commitment)
    except LineageError as fault:
        return Decision(named.rank, named.record, _FAULTS[fault.code], fault=fault)
    return Decision(named.rank, named.record, "disclosed", content)


def _shard(manifest: RunManifest, reference: RecordRef) -> ManifestShard:
    for party in manifest.parties:
        for shard in party.shards:
            if (party.name, shard.shard) == (reference.party, reference.shard):
                return shard
    raise _refuse("disclosure.not-in-manifest", f"the manifest has no shard {reference.shard} of {reference.party}")


def _refuse(code: str, what: str) -> LineageError:
    return LineageError(
        code,
        f"a disclosure was refused: {what}",
        step=_STEP,
        fix="Have the contributor answer for a record that the bundle names, to those whom the plan names.",
    )
