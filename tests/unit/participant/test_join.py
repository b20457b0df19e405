"""Joining a run: what a party checks, in which order, and what it has handed over when a check fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import ProvisionReceipt
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import (
    AccessError,
    AttestationError,
    CaltrainError,
    ConfigError,
    DataError,
    EnvironmentFault,
    IntegrityError,
    ProtocolError,
    ProvisioningError,
)
from caltrain.host_client import RunStatus
from caltrain.participant.identity import Identity
from caltrain.participant.join import approval_of, join
from caltrain.plan import ManifestParty, Plan, RunManifest
from support.disk import tree
from support.folders import identity_of, policy_of
from support.members import Member
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import MEASUREMENT, World

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OTHER = "sha256:" + "0" * 64
JOURNAL = "journal.json"


@pytest.fixture(autouse=True)
def _nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


@dataclass
class Joining:
    """Alpha, about to join the run of a world."""

    world: World
    folder: Path
    steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host = ScriptedHost(self.world, joining="alpha")
        self.alpha: Identity = identity_of(self.world.parties["alpha"], self.folder)
        self.plan: Plan = self.world.plan
        self.policy: Policy = policy_of(self.world)
        self.before = tree(self.folder)

    def join(self, *, seconds: float = 60, **more: Any) -> RunManifest:
        """All of it."""
        with self.host.client() as client:
            return join(
                client,
                self.plan,
                self.alpha,
                self.policy,
                clock=lambda: NOW,
                seconds=seconds,
                on_step=self.steps.append,
                **more,
            )

    def refused(self, family: type[CaltrainError], code: str, *, posts: int, **more: Any) -> None:
        """Joining fails after so many POSTs; the folder is as it was."""
        with refused(family, code):
            self.join(**more)
        assert [path.rsplit("/")[-1] for path in self.host.sent("POST")] == [
            *("approval", "provision", "countersignature")
        ][:posts]
        assert tree(self.folder) == self.before


@pytest.fixture
def world() -> World:
    """A world in which nothing has happened."""
    return World()


@pytest.fixture
def joining(world: World, tmp_path: Path) -> Joining:
    """A party that could join."""
    return Joining(world, tmp_path / "alpha")


def test_a_party_joins_and_keeps_the_model(joining: Joining) -> None:
    manifest = joining.join()
    assert manifest == joining.world.manifest
    made = [(method, path.removeprefix("/v1/").rsplit("/", 1)[-1]) for method, path in joining.host.requests]
    shards = [("PUT", shard.header.shard) for shard in joining.world.parties["alpha"].shards]
    assert made[:2] == [("GET", "plan"), ("POST", "approval")]
    assert sorted(made[2:4]) == sorted(shards)
    assert [entry for entry in made[4:] if entry != ("GET", "run")][:4] == [
        ("GET", "attestation"),
        ("POST", "provision"),
        ("GET", "manifest"),
        ("POST", "countersignature"),
    ]
    kept = tree(joining.folder).keys() - joining.before.keys()
    names = ("model.safetensors", "plan.json", "suspicion.sealed", "chain.jsonl", "run.json")
    assert kept == {JOURNAL, "heads.json", *(f"runs/{manifest.run}/{name}" for name in names)}
    assert len(joining.steps) == 4
    assert "simulated" in joining.steps[1]


def test_what_crosses_holds_neither_key_nor_record(joining: Joining) -> None:
    joining.join()
    member = joining.world.parties["alpha"]
    for body in joining.host.bodies:
        for secret in (member.data_key, member.signer.private_bytes(), member.shards[0].records[0][-16:]):
            assert secret not in body
            assert secret.hex().encode() not in body


# -- before anything is sent -------------------------------------------------------------------------------------


def test_a_host_with_another_plan_gets_nothing(joining: Joining) -> None:
    other = msgspec.structs.replace(joining.plan, name="another")
    joining.host.edit["/v1/plan"] = lambda _: canonical_json(other)
    joining.refused(ProvisioningError, "plan.other-at-host", posts=0)
    assert joining.host.requests == [("GET", "/v1/plan")]


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"{}", b"null", b'{"version":2}', b'{"model":' + b"[" * 100_000])
def test_a_host_with_no_plan_gets_nothing(joining: Joining, garbage: bytes) -> None:
    joining.host.edit["/v1/plan"] = lambda _: garbage
    joining.refused(ProtocolError, "host.garbage", posts=0)
    assert joining.host.requests == [("GET", "/v1/plan")]


def test_a_party_that_the_plan_does_not_name_asks_for_nothing(joining: Joining, tmp_path: Path) -> None:
    joining.alpha = identity_of(Member("mallory"), tmp_path / "mallory")
    joining.refused(AccessError, "party.unknown", posts=0)
    assert joining.host.requests == []


def test_a_party_with_another_key_asks_for_nothing(joining: Joining, tmp_path: Path) -> None:
    joining.alpha = identity_of(Member("alpha"), tmp_path / "other")
    joining.refused(ProvisioningError, "plan.other-key", posts=0)
    with refused(ProvisioningError, "plan.other-key"):
        approval_of(joining.plan, joining.alpha)
    assert joining.host.requests == []


def test_a_party_without_shards_does_not_even_approve(joining: Joining) -> None:
    for path in (joining.folder / "shards").iterdir():
        path.unlink()
    joining.before = tree(joining.folder)
    joining.refused(DataError, "seal.nothing", posts=0)
    assert joining.host.requests == []


def test_a_refused_shard_ends_the_join_before_any_evidence(joining: Joining) -> None:
    error = IntegrityError("upload.other-schema", "no", step="receive shard", fix="Seal again.").diagnostics()
    first = f"/v1/parties/alpha/shards/{min(s.header.shard for s in joining.world.parties['alpha'].shards)}"
    joining.host.edit[first] = lambda _: httpx.Response(422, content=msgspec.json.encode({"error": error}))
    joining.refused(IntegrityError, "upload.other-schema", posts=1)
    assert ("GET", "/v1/attestation") not in joining.host.requests


# -- evidence ----------------------------------------------------------------------------------------------------

BundleEdit = Callable[[EvidenceBundle], EvidenceBundle]


def bind(**changes: Any) -> BundleEdit:
    """The bundle with other plain fields than were signed."""
    return lambda bundle: msgspec.structs.replace(bundle, binding=msgspec.structs.replace(bundle.binding, **changes))


def quoted(
    joining: Joining, *, root: SigningKey | None = None, measurement: str = MEASUREMENT, **changes: Any
) -> BundleEdit:
    """A bundle over other fields, soundly signed by a development root."""

    def edit(bundle: EvidenceBundle) -> EvidenceBundle:
        binding = msgspec.structs.replace(bundle.binding, **changes)
        attester = SimulatedAttester(root or joining.world.root, measurement=measurement)
        return EvidenceBundle(binding=binding, evidence=attester.evidence(binding.report_data()))

    return edit


def evidence(**changes: Any) -> BundleEdit:
    """The bundle with other evidence."""
    return lambda bundle: msgspec.structs.replace(bundle, evidence=msgspec.structs.replace(bundle.evidence, **changes))


EVIDENCE: dict[str, tuple[Callable[[Joining], BundleEdit], str]] = {
    "of another program": (lambda j: quoted(j, measurement="sha384:" + "cd" * 48), "evidence.other-measurement"),
    "for another nonce": (lambda j: quoted(j, nonce="ab" * 32), "evidence.other-nonce"),
    "for another plan": (lambda j: quoted(j, plan=OTHER), "evidence.other-plan"),
    "for another purpose": (lambda j: quoted(j, purpose="query"), "evidence.other-purpose"),
    "of a root that we do not know": (lambda j: quoted(j, root=SigningKey()), "evidence.unknown-root"),
    "with the host's own encryption key": (
        lambda _: bind(encryption_key=HpkePrivateKey().public),
        "evidence.other-key",
    ),
    "with the host's own signing key": (lambda _: bind(signing_key=SigningKey().public), "evidence.other-key"),
    "of an unknown kind": (lambda _: evidence(kind="trust-me"), "evidence.unknown-kind"),
    "that is none": (lambda _: evidence(blob="AAAA"), "evidence.malformed"),
}


@pytest.mark.parametrize("what", EVIDENCE)
def test_evidence_that_does_not_convince_gets_no_key(joining: Joining, what: str) -> None:
    make, code = EVIDENCE[what]
    edit = make(joining)

    def edited(body: bytes) -> bytes:
        return msgspec.json.encode(edit(msgspec.json.decode(body, type=EvidenceBundle)))

    joining.host.edit["/v1/attestation"] = edited
    joining.refused(AttestationError, code, posts=1)
    assert joining.world.run.vault.parties == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"allow_simulated": False}, "evidence.simulated"),
        ({"measurements": ("sha384:" + "cd" * 48,)}, "evidence.other-measurement"),
        ({"simulated_roots": ()}, "evidence.unknown-root"),
    ],
)
def test_an_enclave_that_the_policy_does_not_accept_gets_no_key(
    joining: Joining, changes: dict[str, Any], code: str
) -> None:
    joining.policy = msgspec.structs.replace(joining.policy, **changes)
    joining.refused(AttestationError, code, posts=1)
    assert joining.world.run.vault.parties == {}


def test_a_program_that_we_accept_but_the_plan_does_not_name_gets_no_key(joining: Joining) -> None:
    other = "sha384:" + "cd" * 48
    joining.policy = msgspec.structs.replace(joining.policy, measurements=(*joining.policy.measurements, other))
    edit = quoted(joining, measurement=other)
    joining.host.edit["/v1/attestation"] = lambda body: msgspec.json.encode(
        edit(msgspec.json.decode(body, type=EvidenceBundle))
    )
    joining.refused(AttestationError, "evidence.not-the-plans", posts=1)
    assert joining.world.run.vault.parties == {}


def test_evidence_that_the_enclave_gave_for_another_request_gets_no_key(joining: Joining) -> None:
    joining.host.edit["/v1/attestation"] = lambda _: msgspec.json.encode(joining.world.attest())
    joining.refused(AttestationError, "evidence.other-nonce", posts=1)


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"{}", b'{"binding":{},"evidence":{}}'])
def test_evidence_without_form_gets_no_key(joining: Joining, garbage: bytes) -> None:
    joining.host.edit["/v1/attestation"] = lambda _: garbage
    joining.refused(ProtocolError, "host.garbage", posts=1)


# -- the receipt -------------------------------------------------------------------------------------------------

PROVISION = "/v1/parties/alpha/provision"


def test_a_receipt_for_another_message_ends_the_join(joining: Joining) -> None:
    receipt = ProvisionReceipt(transcript=OTHER)
    sign = joining.world.run.vault.signing.sign
    joining.host.edit[PROVISION] = lambda _: msgspec.json.encode(sign("provision-receipt", receipt))
    joining.refused(ProvisioningError, "provision.other-receipt", posts=2)
    assert ("GET", "/v1/manifest") not in joining.host.requests


def test_a_receipt_that_the_enclave_did_not_sign_ends_the_join(joining: Joining) -> None:
    receipt = ProvisionReceipt(transcript=OTHER)
    joining.host.edit[PROVISION] = lambda _: msgspec.json.encode(SigningKey().sign("provision-receipt", receipt))
    joining.refused(IntegrityError, "signature.invalid", posts=2)
    assert ("GET", "/v1/manifest") not in joining.host.requests


# -- the manifest ------------------------------------------------------------------------------------------------

ManifestEdit = Callable[[RunManifest], RunManifest]


def entry(name: str, change: Callable[[ManifestParty], ManifestParty]) -> ManifestEdit:
    """The manifest with one party's entry changed."""
    return lambda manifest: msgspec.structs.replace(
        manifest, parties=tuple(change(party) if party.name == name else party for party in manifest.parties)
    )


def parties(change: Callable[[tuple[ManifestParty, ...]], tuple[ManifestParty, ...]]) -> ManifestEdit:
    """The manifest with other parties."""
    return lambda manifest: msgspec.structs.replace(manifest, parties=change(manifest.parties))


def says(**changes: Any) -> ManifestEdit:
    """The manifest with other fields."""
    return lambda manifest: msgspec.structs.replace(manifest, **changes)


def shards_of(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> ManifestEdit:
    """The manifest with alpha's shards changed."""
    return entry("alpha", lambda party: msgspec.structs.replace(party, shards=change(party.shards)))


def first(**changes: Any) -> ManifestEdit:
    """The manifest with alpha's first shard changed."""
    return shards_of(lambda shards: (msgspec.structs.replace(shards[0], **changes), *shards[1:]))


MANIFESTS: dict[str, ManifestEdit] = {
    "of another plan": says(plan=OTHER),
    "with another encryption key": says(enclave_encryption_key=HpkePrivateKey().public),
    "with another signing key": says(enclave_signing_key=SigningKey().public),
    "of another program": says(measurement="sha384:" + "cd" * 48),
    "that calls the enclave real": says(simulated=False),
    "without a party": parties(lambda all_: all_[:-1]),
    "with a party twice": parties(lambda all_: (*all_, all_[-1])),
    "with a stranger": parties(lambda all_: (*all_, msgspec.structs.replace(all_[-1], name="mallory"))),
    "with a stranger in a party's place": entry("beta", lambda p: msgspec.structs.replace(p, name="mallory")),
    "with the parties in another order": parties(lambda all_: all_[::-1]),
    "without us": parties(lambda all_: all_[1:]),
    "without one of our shards": shards_of(lambda shards: shards[:1]),
    "with our shards in another order": shards_of(lambda shards: shards[::-1]),
    "with a shard of ours twice": shards_of(lambda shards: (*shards, shards[0])),
    "with a shard that is not ours": shards_of(
        lambda shards: (*shards, msgspec.structs.replace(shards[0], shard="0" * 32))
    ),
    "with another root": first(root=OTHER),
    "with another shard": first(shard="0" * 32),
    "with fewer records of ours": first(records=1),
    "with too few records of another party": entry(
        "beta", lambda party: msgspec.structs.replace(party, shards=party.shards[:1])
    ),
}


@pytest.fixture
def demanding(tmp_path: Path) -> Joining:
    """A run whose plan asks every party for all its nine records."""

    def nine(plan: Plan) -> Plan:
        asked = tuple(msgspec.structs.replace(party, min_records=9) for party in plan.parties)
        return msgspec.structs.replace(plan, parties=asked)

    return Joining(World(change=nine), tmp_path / "alpha")


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_is_not_ours_is_not_signed(demanding: Joining, what: str) -> None:
    def edited(_: bytes) -> bytes:
        manifest = MANIFESTS[what](demanding.world.manifest)
        return msgspec.json.encode(demanding.world.run.vault.signing.sign("run-manifest", manifest))

    demanding.host.edit["/v1/manifest"] = edited
    demanding.refused(IntegrityError, "manifest.mismatch", posts=2)
    assert demanding.world.run.countersigned == set()


def test_the_manifest_of_a_demanding_plan_is_signed_as_it_is(demanding: Joining) -> None:
    assert demanding.join() == demanding.world.manifest


def test_a_manifest_that_the_enclave_did_not_sign_is_not_signed(joining: Joining) -> None:
    joining.host.edit["/v1/manifest"] = lambda _: msgspec.json.encode(
        SigningKey().sign("run-manifest", joining.world.manifest)
    )
    joining.refused(IntegrityError, "signature.invalid", posts=2)


def test_another_statement_of_the_enclave_is_no_manifest(joining: Joining) -> None:
    joining.host.edit["/v1/manifest"] = lambda _: msgspec.json.encode(
        joining.world.run.vault.signing.sign("model", joining.world.manifest)
    )
    joining.refused(IntegrityError, "signature.invalid", posts=2)


# -- one manifest for one plan -----------------------------------------------------------------------------------


def remembered(joining: Joining, manifest: str) -> None:
    """As if the party had countersigned that manifest before."""
    entries = {joining.plan.digest(): manifest}
    (joining.folder / JOURNAL).write_bytes(msgspec.json.encode(entries))
    joining.before = tree(joining.folder)


def test_a_second_manifest_for_the_plan_is_not_signed(joining: Joining) -> None:
    remembered(joining, OTHER)
    joining.refused(ProvisioningError, "manifest.second", posts=0)
    assert joining.world.run.countersigned == set()


def test_two_joins_at_once_do_not_sign_two_manifests(joining: Joining) -> None:
    def meanwhile(body: bytes) -> bytes:
        remembered(joining, OTHER)  # another join of the same party came first, at another host
        return body

    joining.host.edit["/v1/manifest"] = meanwhile
    joining.refused(ProvisioningError, "manifest.second", posts=2)
    assert joining.world.run.countersigned == set()


def test_a_second_manifest_is_signed_where_that_was_agreed(joining: Joining) -> None:
    remembered(joining, OTHER)
    manifest = joining.join(allow_second_manifest=True)
    assert msgspec.json.decode((joining.folder / JOURNAL).read_bytes()) == {joining.plan.digest(): manifest.digest()}


def test_a_run_anew_is_refused_after_a_restart(joining: Joining) -> None:
    joining.join()
    second = World()
    second.parties, second.plan, second.root = joining.world.parties, joining.plan, joining.world.root
    again = Joining(second, joining.folder)
    again.policy = policy_of(second)
    again.world.run.vault.attester = joining.world.run.vault.attester
    again.refused(ProvisioningError, "manifest.second", posts=0)


def test_the_manifest_is_remembered_before_the_signature_leaves(joining: Joining) -> None:
    seen: list[bytes] = []

    def lost(_: bytes) -> httpx.Response:
        seen.append((joining.folder / JOURNAL).read_bytes())
        raise httpx.ReadError("the connection breaks while the signature is on its way")

    joining.host.edit["/v1/parties/alpha/countersignature"] = lost
    with refused(EnvironmentFault, "host.unreachable"):
        joining.join()
    noted = {joining.plan.digest(): joining.world.manifest.digest()}
    assert [msgspec.json.decode(raw) for raw in seen] == [noted]
    assert msgspec.json.decode((joining.folder / JOURNAL).read_bytes()) == noted


def test_without_a_journal_nothing_is_signed(joining: Joining) -> None:
    (joining.folder / JOURNAL).write_bytes(b"damaged")
    joining.before = tree(joining.folder)
    joining.refused(ConfigError, "journal.unreadable", posts=0)
    assert joining.world.run.countersigned == set()


# -- waiting -----------------------------------------------------------------------------------------------------


def status(phase: str, error: CaltrainError | None = None) -> Callable[[bytes], bytes]:
    """What the host says of the run."""
    said = RunStatus(phase=phase, error=None if error is None else error.diagnostics())
    return lambda _: msgspec.json.encode(said)


def test_a_run_that_fails_fails_for_the_party_by_the_same_name(joining: Joining) -> None:
    error = EnvironmentFault("enclave.died", "gone", step="train", fix="Start again.")
    joining.host.edit["/v1/run"] = status("failed", error)
    joining.refused(EnvironmentFault, "enclave.died", posts=1)


def test_a_run_that_never_asks_for_keys_is_given_up(joining: Joining) -> None:
    joining.host.edit["/v1/run"] = status("approvals")
    joining.refused(EnvironmentFault, "host.too-slow", posts=1, seconds=0)


@pytest.mark.parametrize("phase", ["countersignatures", "train", "linked"])
def test_a_join_that_broke_off_is_told_so_instead_of_waiting(joining: Joining, phase: str) -> None:
    joining.host.edit["/v1/run"] = status(phase)
    joining.refused(ProvisioningError, "join.too-late", posts=1)
