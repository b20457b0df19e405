"""What parties and model users send through the host to the enclave, and what comes back: the host carries it blind.

Every such message is HPKE-sealed to the enclave's key with the transcript as `info`, and signed over transcript and
ciphertext. The transcript is the verified binding (purpose, keys, plan, nonce) and the sender's name, so a message
opens in one enclave, for one plan, one purpose and one nonce only.
"""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Literal, TypeVar

import msgspec

from caltrain.accountability.reference import Basis
from caltrain.attestation.evidence import Binding, Nonce
from caltrain.crypto import dsse, hpke
from caltrain.crypto.aead import KEY_BYTES, seal, unseal
from caltrain.crypto.decoders import msgpack_decoder
from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.crypto.kdf import derive
from caltrain.errors import UNDECODABLE, IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.plan import MAX_PARTIES, MAX_SHARDS, ManifestShard, Method, Right
from caltrain.records.commitment import PartyName, RecordRef, ShardId

MAX_SEALED = 48 << 20
MAX_QUESTIONS = 1024
LEFT_OUT = 0xFFFF
Scan = Literal["disagreement", "labels", "spectral", "clusters"]
"""How the hunt looks for suspicious records: nearest fingerprints of another label, what a witness of the contents
takes the label for, the main direction of a class, its smaller cluster."""
Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
SealedKind = Literal["provision", "rejoin", "query", "grant", "session"]
T = TypeVar("T")


class SealedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Signed by the sender (DSSE kind: a `SealedKind`)."""

    sender: PartyName
    nonce: Nonce
    transcript: Digest
    sealed: Annotated[str, msgspec.Meta(max_length=MAX_SEALED)]


class PartySecret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party provisions: its data key, 32 bytes of entropy for the run seed, its shards in order."""

    data_key: Key
    entropy: Key
    shards: Annotated[tuple[ManifestShard, ...], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]


class ResumeSecret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's word to a restarted enclave: its data key, and the chain's head up to which it knows the run."""

    data_key: Key
    run: ShardId
    head: Digest


class ProvisionReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The enclave's word that it opened a party's message (DSSE kind `provision-receipt`)."""

    transcript: Digest


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A user's inputs: `count` arrays of the plan's shape and element type, concatenated; a key for the answer.

    Traces look at the predicted class, or with `any_label` at all; at all `contributors`, or at these; `method` ranks.
    """

    kind: Right
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUESTIONS)]
    inputs: bytes
    answer_key: Key
    any_label: bool = False
    contributors: Annotated[tuple[PartyName, ...], msgspec.Meta(max_length=MAX_PARTIES)] = ()
    method: Method = "fingerprint"


class Neighbour(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One traced record: where it is, its label, how far at most, its commitment.

    `distance` is a multiple of the plan's step, and no less than the plan's floor has it. `unusual` is the share of
    clean queries whose neighbour of this rank is at most as far, in steps of 0.01: near 1 for an input that lies
    farther from its class than clean ones do, None where there is nothing to compare with. It follows from the distance
    as it is told, so it tells no more of it. A second opinion tells neither: its scores are nobody's to see.
    """

    rank: int
    record: RecordRef
    label: int
    distance: float | None
    commitment: Digest
    unusual: float | None


class TraceStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the enclave signs about one traced input (DSSE kind `trace`). `head` is the chain's when it was asked.

    Where fewer records count than the plan has neighbours, all of them are named: none where the class is empty. By
    another `method` than fingerprints it is a second opinion: the records that it holds to speak for the prediction.
    `basis` says which clean queries a distance is compared with, `references` how many.
    """

    run: ShardId
    model: Digest
    user: PartyName
    nonce: Nonce
    index: int
    input_commitment: Digest
    head: Digest
    predicted: int
    any_label: bool
    contributors: tuple[PartyName, ...]
    neighbours: tuple[Neighbour, ...]
    basis: Basis
    references: int
    audit_rate: float
    """Share of the center's steps that the enclave repeated in training; 0: center not audited."""
    resumes: int
    simulated: bool
    method: Method = "fingerprint"

    def records(self) -> dict[RecordRef, str]:
        """The records that it names, with their commitments."""
        return {n.record: n.commitment for n in self.neighbours}


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What comes back, sealed under the question's answer key."""

    model: Digest
    predicted: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...] = ()
    traces: tuple[dsse.Envelope, ...] = ()
    verdict: dsse.Envelope | None = None
    budget_left: int
    padding: bytes = b""
    """Makes a verdict as long as any of this run: its length would tell whether somebody is named."""


class ReleasedPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each party gets under its own key: FrontNet and HeadNet (safetensors), and the seed if the plan says so."""

    model: Digest
    weights: bytes
    run_seed: bytes = b""


class SuspicionReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the hunt found before the release of a party's own records: suspicion by each scan, in steps of 1/1000.

    Two bytes a record and scan (little endian), so that the size of the sealed report does not tell how many are
    suspicious; `LEFT_OUT` for a record that was not trained on. `wrong_labels` is the estimated share of wrong labels:
    the party's own, and of all where the plan says so (`trace.share_quality`).

    `out_of_fold` are class probabilities by fits that have not seen the record: float16, two bytes a class, records by
    leaf; every class `LEFT_OUT` (which is no number) where they are unknown. There are none in a run whose records and
    classes are too many for them.
    """

    model: Digest
    scores: dict[Scan, dict[ShardId, bytes]]
    out_of_fold: dict[ShardId, bytes] = {}
    wrong_labels: dict[PartyName, Estimate] = {}

    def of(self, shard: str, *, scan: Scan = "disagreement") -> tuple[int | None, ...]:
        """Scores of a shard's records by one scan, by leaf; None for one that was left out."""
        raw = self.scores[scan][shard]
        return tuple(None if score == LEFT_OUT else score for score in struct.unpack(f"<{len(raw) // 2}H", raw))


class DisclosureNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party signs for the chain when it discloses a record (DSSE kind `disclosure-note`)."""

    run: ShardId
    party: PartyName
    commitment: Digest


def commit_input(nonce: str, elements: bytes) -> str:
    """What a statement says of its input. The nonce is the user's own: with both they show which input it was."""
    return digest("input/v1", bytes.fromhex(nonce), elements)


def transcript_digest(binding: Binding, sender: str) -> str:
    """Digest of everything that a sealed message is bound to."""
    return digest("transcript/v1", canonical_json(binding), sender.encode())


def seal_message(
    kind: SealedKind, secret: msgspec.Struct, *, binding: Binding, sender: str, signer: dsse.SigningKey
) -> dsse.Envelope:
    """Seal `secret` to the enclave of a *verified* binding, and sign it."""
    transcript = transcript_digest(binding, sender)
    sealed = hpke.seal_to(binding.encryption_key, msgspec.msgpack.encode(secret), info=transcript.encode())
    message = SealedMessage(
        sender=sender, nonce=binding.nonce, transcript=transcript, sealed=base64.b64encode(sealed).decode()
    )
    return signer.sign(kind, message)


def open_message(message: SealedMessage, type_: type[T], *, binding: Binding, key: hpke.HpkePrivateKey, step: str) -> T:
    """Open a sealed message whose signature was verified. Raises IntegrityError."""
    transcript = transcript_digest(binding, message.sender)
    if transcript != message.transcript:
        raise _malformed("its transcript is not that of this enclave, plan, purpose and nonce", step)
    try:
        plain = key.unseal(base64.b64decode(message.sealed, validate=True), info=transcript.encode(), step=step)
        return msgpack_decoder(type_).decode(plain)
    except UNDECODABLE as error:  # or not base64
        raise _malformed(str(error), step) from None


def seal_for(key: bytes, purpose: str, payload: msgspec.Struct, *, context: str) -> bytes:
    """Seal a payload to whoever holds `key`, for one purpose and context (a run, a transcript)."""
    return seal(derive(key, purpose), msgspec.msgpack.encode(payload), aad=context.encode())


def open_for(key: bytes, purpose: str, sealed: bytes, type_: type[T], *, context: str, step: str) -> T:
    """Inverse of `seal_for`. Raises IntegrityError."""
    plain = unseal(derive(key, purpose), sealed, aad=context.encode(), step=step)
    try:
        return msgpack_decoder(type_).decode(plain)
    except UNDECODABLE as error:
        raise _malformed(str(error), step) from None


def _malformed(what: str, step: str) -> IntegrityError:
    return IntegrityError(
        "sealed.malformed",
        f"a sealed message was refused: {what}",
        step=step,
        fix="Attest again and seal anew; both ends must run the same version.",
    )
