"""The training plan, its approvals and the run manifest: what every party signs.

A plan is written as TOML by people and digested as a structure: defaults filled in, unknown keys refused, canonical
JSON (RFC 8785). Needs no torch.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from caltrain.crypto import dsse
from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.crypto.hpke import HpkePublicKey
from caltrain.errors import UNDECODABLE, AccessError, ConfigError, IntegrityError
from caltrain.exposure.policy import Policy, check_policy
from caltrain.models.spec import Cut, ModelSpec, Partition, check_model, inner_weights
from caltrain.records.commitment import PartyName, RecordRef, ShardId
from caltrain.records.quarantine import Repair
from caltrain.records.schema import DataSchema, check_schema
from caltrain.records.shard import MAX_SHARD_RECORDS
from caltrain.records.shown import MAX_READERS
from caltrain.training.augment import check_augment
from caltrain.training.spec import CenterSpec, TrainingSpec

MAX_PLAN_BYTES = 1 << 20
MAX_PARTIES = 256
MAX_SHARDS = 4096
MAX_RELEASE = 48 << 20
"""Bytes of all sealed parts together: they leave the enclave in one frame."""

Measurement = Annotated[str, msgspec.Meta(pattern=r"^sha384:[0-9a-f]{96}\Z")]
Right = Literal["predict", "trace", "verdict"]
Method = Literal["fingerprint", "gradient", "trak"]
"""How a trace ranks records: by nearest fingerprints; the others are second opinions (`accountability.attribution`)."""
T = TypeVar("T")


class Party(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A contributor: its name in every record reference, its signing key, the least it must contribute."""

    name: PartyName
    public_key: dsse.PublicKey
    min_records: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS * MAX_SHARD_RECORDS)] = 1


class User(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model user: what they may ask of the enclave, and how often (one input is one question).

    `budget` is for the whole run; `per_hour` (0: no such bound) is how many may come at once, and in each hour then on.
    """

    name: PartyName
    public_key: dsse.PublicKey
    may: Annotated[tuple[Right, ...], msgspec.Meta(min_length=1, max_length=3)]
    budget: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
    per_hour: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 0


class EnclaveSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The program that the parties trust, by measurement."""

    measurement: Measurement


class Reader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Somebody to whom records are disclosed: a user, a party or an auditor, with the key that they are sealed to."""

    name: PartyName
    encryption_key: HpkePublicKey


class TraceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a trace answers: neighbours, and how their distances are told; what the hunt tells a party.

    Distances are rounded to a step, and one shorter than that of the share `distance_floor` of clean queries is told
    as theirs: else a distance near 0 tells that the input itself was trained on.
    """

    neighbours: Annotated[int, msgspec.Meta(ge=1, le=100)] = 9
    distance_step: Annotated[float, msgspec.Meta(ge=0.001, le=1)] = 0.01
    distance_floor: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    suspicion_neighbours: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    share_quality: bool = False
    """Every party learns the estimated share of wrong labels of all; else of its own records alone."""
    filters: bool = False
    """Users may ask for the nearest of any class, and of single contributors."""
    disclose_to: Annotated[tuple[Reader, ...], msgspec.Meta(max_length=MAX_READERS)] = ()
    """Disclosed records are sealed to these; without any, each contributor hands them to whom it will."""
    methods: Annotated[tuple[Method, ...], msgspec.Meta(min_length=1, max_length=3)] | UnsetType = UNSET
    """By which methods users may ask. Unset, by fingerprints alone, it is in no digest."""

    @property
    def answered(self) -> tuple[Method, ...]:
        """The methods that are answered."""
        return self.methods or ("fingerprint",)

    @property
    def opinions(self) -> bool:
        """Whether second opinions are among them, which take more memory."""
        return any(method != "fingerprint" for method in self.answered)


class ReleaseSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What leaves after the run. `reveal_seed` seals the run seed to the parties: they can then repeat the run."""

    reveal_seed: bool = False


class ExposureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the cut is judged before the first epoch and every `every` epochs after it, as CALTRAIN has it (IV-B).

    Bounds on measures are checked inside, on `sample` sealed records (held-out ones, if there are any); bounds on
    attacks by each party on its own records, with a vote. The cut deepens to what all of them accept, or the run ends.
    """

    policy: Policy
    every: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    sample: Annotated[int, msgspec.Meta(ge=8, le=512)] = 64


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that the parties agree on before a run."""

    version: Literal[1]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    model: ModelSpec
    partition: Partition
    data: DataSchema
    training: TrainingSpec
    parties: Annotated[tuple[Party, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTIES)]
    users: Annotated[tuple[User, ...], msgspec.Meta(max_length=MAX_PARTIES)] = ()
    enclave: EnclaveSpec
    center: CenterSpec = CenterSpec()
    resume_quorum: Annotated[int, msgspec.Meta(ge=0, le=MAX_PARTIES)] = 0
    """Parties whose word a restarted enclave needs before it goes on; 0: all."""
    trace: TraceSpec = TraceSpec()
    exposure: ExposureSpec | None = None
    release: ReleaseSpec = ReleaseSpec()
    repair: Repair | UnsetType = UNSET
    """What this run leaves out of an earlier one. Unset, it is in no digest: such plans have the digest they had."""

    def digest(self) -> str:
        """Digest of the parsed structure, never of the TOML text."""
        return digest("plan/v1", canonical_json(self))

    def party(self, name: str) -> Party:
        """The party of that name. Raises AccessError `party.unknown`."""
        return _named(self.parties, name, "party")

    def user(self, name: str) -> User:
        """The model user of that name. Raises AccessError `user.unknown`."""
        return _named(self.users, name, "user")


class PlanApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's signature over a plan's digest (the first approval)."""

    plan: Digest
    party: PartyName


class ManifestShard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One shard of the run."""

    shard: ShardId
    root: Digest
    records: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARD_RECORDS)]
    held_out: bool = False
    """Not trained on: the enclave measures the model on it after each epoch."""


class ManifestParty(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's key and its shards, in the order in which their records are counted."""

    name: PartyName
    key_id: Digest
    shards: Annotated[tuple[ManifestShard, ...], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]


class RunManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the enclave signs once all keys are in, and every party countersigns (the second approval)."""

    version: Literal[1] = 1
    run: ShardId
    plan: Digest
    evidence_kind: Annotated[str, msgspec.Meta(max_length=40)]
    simulated: bool
    measurement: Measurement
    enclave_encryption_key: HpkePublicKey
    enclave_signing_key: dsse.PublicKey
    parties: Annotated[tuple[ManifestParty, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTIES)]

    def digest(self) -> str:
        """Digest that the parties countersign."""
        return digest("run-manifest/v1", canonical_json(self))

    def records(self, *, held_out: bool = False) -> int:
        """Number of records over all parties: those to train on (less what a repair leaves out), or those held out."""
        return sum(s.records for party in self.parties for s in party.shards if s.held_out == held_out)

    def trained(self, plan: Plan) -> int:
        """Number of records that are trained on, under the plan of this run."""
        return self.records() - (plan.repair.records if plan.repair else 0)

    def references(self, *, without: Container[RecordRef] = ()) -> Iterator[RecordRef]:
        """Every record to train on, in the order in which the plain loop takes them, but those left out."""
        for party in self.parties:
            for shard in party.shards:
                everything = (RecordRef(party.name, shard.shard, leaf) for leaf in range(shard.records))
                yield from (ref for ref in everything if not shard.held_out and ref not in without)


class CutApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's word that the FrontNet may become shallower: layers that were inside go out."""

    run: ShardId
    head: Digest
    party: PartyName
    front: Cut


class ManifestApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's countersignature over a run manifest."""

    manifest: Digest
    party: PartyName


def parse_plan(text: bytes) -> Plan:
    """Parse and check a plan from TOML. Raises ConfigError; the plan is usable as returned."""
    return check_plan(parse_toml(text, Plan, what="plan"))


def plan_from_json(raw: bytes) -> Plan:
    """The plan from JSON, checked like one from TOML: how it crosses a wire."""
    try:
        if len(raw) > MAX_PLAN_BYTES:
            raise msgspec.ValidationError("longer than the limit")
        return check_plan(msgspec.json.decode(raw, type=Plan))
    except UNDECODABLE as error:
        raise _invalid("plan", error) from None


def parse_toml(text: bytes, type_: type[T], *, what: str) -> T:
    """Decode TOML of at most 1 MiB into a Struct; unknown keys and bad values are ConfigErrors."""
    try:
        if len(text) > MAX_PLAN_BYTES:
            raise msgspec.ValidationError("longer than the limit")
        return msgspec.convert(tomllib.loads(text.decode()), type=type_)
    except msgspec.ValidationError as error:
        raise _invalid(what, error) from None
    except UNDECODABLE as error:  # bad syntax, bad UTF-8, digits or nesting without end
        raise ConfigError(
            f"{what}.not-toml", f"the {what} is not TOML: {error}", step=f"read {what}", fix="Correct the file."
        ) from None


def _invalid(what: str, error: Exception) -> ConfigError:
    unknown = "unknown field" in str(error)
    return ConfigError(
        f"{what}.unknown-key" if unknown else f"{what}.invalid",
        f"the {what} was refused: {error}",
        step=f"read {what}",
        fix="Remove or rename the key." if unknown else "Correct the value; docs/plan.md lists each one.",
    )


def check_plan(plan: Plan) -> Plan:
    """Check what types cannot: names, keys, model against data. Returns the plan or raises ConfigError/DataError."""
    check_schema(plan.data)
    check_model(plan.model, plan.partition, input_shape=plan.data.shape, classes=len(plan.data.classes))
    released = 4 * inner_weights(plan.model, plan.partition, plan.data.shape) * len(plan.parties)
    if released > MAX_RELEASE:
        raise ConfigError(
            "plan.release-too-large",
            f"FrontNet and HeadNet, sealed to each of {len(plan.parties)} parties, take {released} bytes",
            step="check plan",
            fix=f"Cut so that they take at most {MAX_RELEASE} bytes in all: the run could not be released.",
        )
    check_augment(plan.training.augment, plan.data.shape, plan.model.size)
    _check_center(plan)
    _check_cut_policy(plan)
    _check_repair(plan)
    people: list[Party | User] = [*plan.parties, *plan.users]
    for kind, values in (
        ("name", [p.name for p in people]),
        ("public_key", [p.public_key for p in people]),
        ("name among readers", [reader.name for reader in plan.trace.disclose_to]),
    ):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise ConfigError(
                "plan.duplicate",
                f"two parties or users have the same {kind}: {repeated[0]}",
                step="check plan",
                fix="Give every party and user a name and a key of its own.",
            )
    return plan


def possible_cuts(plan: Plan, front: int) -> tuple[int, ...]:
    """Layers that the FrontNet may have from here on: `front`, and all deeper cuts that the plan could have, too."""
    return tuple(cut for cut in range(front, len(plan.model.layers) - plan.partition.head) if _possible(plan, cut))


def _possible(plan: Plan, front: int) -> bool:
    try:
        check_plan(msgspec.structs.replace(plan, partition=plan.partition.at(front)))
    except ConfigError:
        return False
    return True


def _check_center(plan: Plan) -> None:
    center, frozen = plan.center, plan.training.initial.frozen if plan.training.initial else 0
    wrong = {
        "an audited center computes in float32 on the CPU, or its steps could not be repeated": center.audit_rate > 0
        and (center.device, center.precision) != ("cpu", "f32"),
        "an audit at less than one step in 10,000 would be none": 0 < center.audit_rate < 1e-4,
        "resume_quorum is larger than the number of parties": plan.resume_quorum > len(plan.parties),
        "more layers are frozen than the model has": frozen > len(plan.model.layers),
        "the cut deepens after the last epoch (they count from 0)": any(
            step.epoch >= plan.training.epochs for step in plan.partition.deepen
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise ConfigError("plan.contradiction", what, step="check plan", fix="Change one of the two in the plan.")


def _check_cut_policy(plan: Plan) -> None:
    if plan.exposure is None:
        return
    policy = check_policy(plan.exposure.policy)
    wrong = {
        "perceptual distances are in features that the host trains, and a bound on them needs center.audit_rate = 1": (
            plan.center.audit_rate < 1 and any(bound.measure == "perceptual" for bound in policy.bounds)
        ),
        # Each party's figures hold from its own cut on, and the deepest one that is asked for is due.
        "with all_deeper = false the deepest vote could be a cut that another's figures miss": not policy.all_deeper,
    }
    for what, holds in wrong.items():
        if holds:
            raise ConfigError(
                "plan.cut-policy",
                f"the policy for the cut cannot be kept to in training: {what}",
                step="check plan",
                fix="Change that part of [exposure.policy], or what it needs.",
            )


def _check_repair(plan: Plan) -> None:
    if not plan.repair:
        return
    if not plan.repair.records and not plan.repair.without:
        raise _bad_repair("it leaves out neither a record nor a party")
    former = {value for party in plan.repair.without for value in (party.name, party.public_key)}
    back = [party.name for party in plan.parties if {party.name, party.public_key} & former]
    if back:
        raise _bad_repair(f"{back[0]} is left out, and takes part, by its name or by its key")


def _bad_repair(what: str) -> ConfigError:
    return ConfigError(
        "plan.repair",
        f"the repair contradicts itself: {what}",
        step="check plan",
        fix="Have `caltrain remedy plan` write it again.",
    )


def _named(entries: Iterable[T], name: str, kind: Literal["party", "user"]) -> T:
    for entry in entries:
        if getattr(entry, "name", None) == name:
            return entry
    raise AccessError(
        f"{kind}.unknown",
        f"the plan names no {kind} {name[:60]!r}",
        step=f"look up {kind}",
        fix="Use the name that the plan gives, or have the plan changed and approved again.",
    )


def check_approval(plan: Plan, party: str, envelope: dsse.Envelope) -> PlanApproval:
    """Verify that `party` approved this very plan. Raises AccessError or IntegrityError."""
    key = plan.party(party).public_key
    approval = dsse.open_envelope(envelope, "plan-approval", key, PlanApproval, step="check approval")
    if approval != PlanApproval(plan=plan.digest(), party=party):
        raise _other("plan", party)
    return approval


def check_countersignature(plan: Plan, manifest: RunManifest, party: str, envelope: dsse.Envelope) -> ManifestApproval:
    """Verify that `party` countersigned this very manifest. Raises AccessError or IntegrityError."""
    key = plan.party(party).public_key
    approval = dsse.open_envelope(envelope, "manifest-approval", key, ManifestApproval, step="check countersignature")
    if approval != ManifestApproval(manifest=manifest.digest(), party=party):
        raise _other("manifest", party)
    return approval


def _other(what: Literal["plan", "manifest"], party: str) -> IntegrityError:
    return IntegrityError(
        f"approval.other-{what}",
        f"{party} signed another {what}, or in another name",
        step=f"check approval of {what}",
        fix=f"Have {party} read this {what} and sign it.",
    )
