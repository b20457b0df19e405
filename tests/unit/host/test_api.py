"""The HTTP interface: who is refused with which status and body, and that nothing comes of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.boundary import messages as m
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.run import State
from caltrain.errors import EnvironmentFault
from caltrain.host.api import ARTIFACTS, MAX_NOTE, create_app
from caltrain.host.conductor import Conductor
from caltrain.host.store import Store
from caltrain.plan import Plan, PlanApproval
from support.asgi import call, get, post
from support.disk import files_end_at, tree
from support.members import Member
from support.world import Change, World, pictures
from support.world_enclave import WorldEnclave, attach

NONCE = "ab" * 32


class Site:
    """The application, a conductor that nobody set going, and a world's enclave behind it."""

    def __init__(self, folder: Path, *, budget: int = 20, change: Change = lambda plan: plan) -> None:
        self.world = World(budget=budget, change=change)
        self.conductor = Conductor(self.world.plan, Store(folder), root_secret=bytes(32), auto_start=True)
        self.app = create_app(self.conductor)
        self.enclave: WorldEnclave = attach(self.conductor, self.world)

    def run_to(self, state: State) -> Site:
        """Bring the enclave honestly so far, and tell the conductor."""
        self.world.run_to(state)
        self.conductor.manifest = self.world.run.manifest
        return self

    def kept_nothing(self) -> None:
        """Nothing was stored, counted or sent to the enclave."""
        assert tree(self.conductor.store.root) == {}
        assert self.conductor.approvals == {}
        assert self.conductor.provisioned == self.conductor.countersigned == set()
        assert not self.enclave.requests


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A host that has just started."""
    return Site(tmp_path / "host")


def envelope_of(member: Member) -> Envelope:
    """Something that the member signed."""
    return member.signer.sign("plan-approval", PlanApproval(plan="sha256:" + "0" * 64, party=member.name))


@pytest.mark.parametrize("what", ["approval", "provision", "countersignature", "disclosure"])
@pytest.mark.parametrize("name", ["mallory", "una", "Alpha", "alpha ", "alpha\n", ".."])
def test_nobody_but_a_party_of_the_plan_is_heard(site: Site, what: str, name: str) -> None:
    got = post(site.app, f"/v1/parties/{name}/{what}", envelope_of(site.world.parties["alpha"]))
    fields = got.refused(403, "party.unknown")
    assert fields["family"] == "AccessError"
    assert name[:1] in fields["what"]
    site.kept_nothing()


@pytest.mark.parametrize("name", ["mallory", "alpha", "una "])
def test_nobody_but_a_user_of_the_plan_may_ask(site: Site, name: str) -> None:
    site.run_to(State.LINKED)
    asked = site.world.question("predict", pictures(1, seed=5))
    got = post(site.app, f"/v1/users/{name}/query", asked.envelope)
    assert got.refused(403, "user.unknown")["family"] == "AccessError"
    site.kept_nothing()


def test_an_unknown_name_is_refused_before_its_body_is_read(site: Site) -> None:
    for path in ("/v1/parties/mallory/approval", "/v1/users/mallory/query"):
        got = call(site.app, "POST", path, chunks=[bytes(1000)])
        assert got.status == 403
        assert got.pulled == 0


def test_a_party_approves_this_plan(site: Site) -> None:
    alpha = site.world.parties["alpha"]
    got = post(site.app, "/v1/parties/alpha/approval", alpha.approve(site.world.plan))
    assert (got.status, got.body) == (200, b'{"accepted":true}')
    assert set(site.conductor.approvals) == {"alpha"}


def test_a_party_that_approved_another_plan_is_refused(site: Site) -> None:
    other = msgspec.structs.replace(site.world.plan, name="another")
    got = post(site.app, "/v1/parties/alpha/approval", site.world.parties["alpha"].approve(other))
    got.refused(422, "approval.other-plan")
    site.kept_nothing()


def test_an_approval_in_another_partys_name_is_refused(site: Site) -> None:
    alpha, plan = site.world.parties["alpha"], site.world.plan
    post(site.app, "/v1/parties/beta/approval", alpha.approve(plan)).refused(422, "signature.invalid")
    named = alpha.approve(plan, party="beta")
    post(site.app, "/v1/parties/alpha/approval", named).refused(422, "approval.other-plan")
    site.kept_nothing()


def test_a_signature_for_another_purpose_is_refused(site: Site) -> None:
    alpha = site.world.parties["alpha"]
    approval = PlanApproval(plan=site.world.plan.digest(), party="alpha")
    got = post(site.app, "/v1/parties/alpha/approval", alpha.signer.sign("manifest-approval", approval))
    got.refused(422, "signature.invalid")
    site.kept_nothing()


def test_what_another_key_signed_is_refused_at_every_step(site: Site) -> None:
    mallory = Member("alpha")
    site.run_to(State.ENROLLING)
    sealed = mallory.provision(site.world.attest().binding)
    post(site.app, "/v1/parties/alpha/provision", sealed).refused(422, "signature.invalid")
    assert not site.world.run.vault.parties
    site.run_to(State.AGREEING)
    signed = mallory.countersign(site.world.manifest)
    post(site.app, "/v1/parties/alpha/countersignature", signed).refused(422, "signature.invalid")
    site.run_to(State.LINKED)
    note = mallory.note(run=site.world.run.vault.run, commitment="sha256:" + "0" * 64)
    post(site.app, "/v1/parties/alpha/disclosure", note).refused(422, "signature.invalid")
    assert tree(site.conductor.store.root) == {}
    assert site.conductor.provisioned == site.conductor.countersigned == set()


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"null", b"[1]", b"<html>", b"\xff\xfe", b'{"a":' * 50_000, b'{"payloadType":1}'],
    ids=["empty", "object", "null", "list", "html", "no text", "deep", "wrong type"],
)
@pytest.mark.parametrize("path", ["/v1/parties/alpha/approval", "/v1/users/una/query"])
def test_a_body_that_is_no_envelope_is_refused(site: Site, path: str, body: bytes) -> None:
    call(site.app, "POST", path, chunks=[body]).refused(422, "envelope.malformed")
    site.kept_nothing()


def test_a_message_that_is_too_long_is_not_read_to_its_end(site: Site) -> None:
    for path, limit in (("/v1/parties/alpha/provision", MAX_NOTE), ("/v1/users/una/query", 8 << 20)):
        got = call(site.app, "POST", path, chunks=(bytes(1 << 16) for _ in range(100_000)))
        got.refused(413, "upload.too-large")
        assert got.pulled <= limit + (1 << 16)
    site.kept_nothing()


def test_a_message_that_breaks_off_is_refused(site: Site) -> None:
    got = call(site.app, "POST", "/v1/parties/alpha/approval", chunks=[b'{"pay'], breaks_off=True)
    got.refused(422, "upload.cut-short")
    site.kept_nothing()


def test_too_early_is_said_so(tmp_path: Path) -> None:
    world = World()
    conductor = Conductor(world.plan, Store(tmp_path), root_secret=bytes(32), auto_start=True)
    app, alpha = create_app(conductor), world.parties["alpha"]
    world.run_to(State.AGREEING)
    get(app, "/v1/manifest").refused(409, "host.not-yet")
    get(app, "/v1/attestation", query=f"purpose=training&nonce={NONCE}").refused(409, "host.not-yet")
    post(app, "/v1/parties/alpha/provision", envelope_of(alpha)).refused(409, "host.not-yet")
    post(app, "/v1/parties/alpha/countersignature", alpha.countersign(world.manifest)).refused(409, "host.not-yet")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "query",
    [
        "",
        f"nonce={NONCE}",
        "purpose=training",
        f"purpose=sealing&nonce={NONCE}",
        "purpose=training&nonce=ab",
        f"purpose=training&nonce={NONCE}%0a",
        f"purpose=training&nonce={NONCE.upper()}",
    ],
)
def test_evidence_is_asked_for_in_one_form_only(site: Site, query: str) -> None:
    get(site.app, "/v1/attestation", query=query).refused(409, "http.bad-argument")
    site.kept_nothing()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("DELETE", "/v1/run", 405)],
)
def test_what_there_is_not_has_an_error_of_the_same_form(site: Site, method: str, path: str, status: int) -> None:
    call(site.app, method, path).refused(status, "http.no-such-route")


def test_an_unforeseen_failure_has_a_code_and_tells_no_detail(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the operator's own secret")

    monkeypatch.setattr(site.conductor, "attest", fail)
    got = get(site.app, "/v1/attestation", query=f"purpose=training&nonce={NONCE}")
    got.refused(500, "host.internal")
    assert b"secret" not in got.body
    assert isinstance(got.raised, RuntimeError)  # and the server's log gets all of it


ELSEWHERE = (
    "../plan.json",
    "release/../plan.json",
    "release/../../host/plan.json",
    "plan.json",
    "manifest.json",
    "enclave.log",
    "shards/alpha/00",
    "pool-0",
    "/etc/passwd",
    "release/alpha/x",
    "center\n",
    "countersignatures/..json",
    "release",
    "",
)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_artifact_lies_elsewhere(site: Site, name: str) -> None:
    for stored in ("plan.json", "manifest.json", "enclave.log", "shards/alpha/00", "pool-0", "release/alpha"):
        site.conductor.store.put(stored, b"not for this route")
    get(site.app, f"/v1/artifacts/{name}").refused(404, "http.no-such-artifact")


def test_an_artifact_is_there_once_its_phase_is_over(site: Site) -> None:
    names = ("center", "release.json", "release/alpha", "suspicion/beta", "countersignatures/alpha.json", "chain.jsonl")
    for name in names:
        assert ARTIFACTS.fullmatch(name)
        get(site.app, f"/v1/artifacts/{name}").refused(404, "http.no-such-artifact")
        site.conductor.store.put(name, name.encode() * 1000)
        got = get(site.app, f"/v1/artifacts/{name}")
        assert (got.status, got.body) == (200, name.encode() * 1000)
        assert got.headers["content-length"] == str(len(got.body))


def test_the_plan_comes_as_it_is_digested(site: Site) -> None:
    got = get(site.app, "/v1/plan")
    assert msgspec.json.decode(got.body, type=type(site.world.plan)) == site.world.plan


def test_evidence_receipt_and_manifest_reach_the_party(site: Site) -> None:
    site.run_to(State.ENROLLING)
    got = get(site.app, "/v1/attestation", query=f"purpose=training&nonce={NONCE}")
    bundle = msgspec.json.decode(got.body, type=EvidenceBundle)
    assert bundle.binding.nonce == NONCE
    sealed = site.world.parties["alpha"].provision(bundle.binding)
    got = post(site.app, "/v1/parties/alpha/provision", sealed)
    assert msgspec.json.decode(got.body, type=Envelope).signer == site.world.run.vault.signing.public
    assert site.conductor.provisioned == {"alpha"}
    post(site.app, "/v1/parties/alpha/provision", sealed).refused(409, "nonce.unknown")


def test_a_countersignature_is_kept_for_those_who_check_later(site: Site) -> None:
    site.run_to(State.AGREEING)
    signed = site.world.parties["alpha"].countersign(site.world.manifest)
    assert post(site.app, "/v1/parties/alpha/countersignature", signed).status == 200
    assert tree(site.conductor.store.root)["countersignatures/alpha.json"] == msgspec.json.encode(signed)
    assert site.world.run.countersigned == site.conductor.countersigned == {"alpha"}


def test_a_countersignature_that_cannot_be_kept_can_be_sent_again(site: Site) -> None:
    site.run_to(State.AGREEING)
    signed = site.world.parties["alpha"].countersign(site.world.manifest)
    with files_end_at(10):
        post(site.app, "/v1/parties/alpha/countersignature", signed).refused(507, "storage.full")
    assert tree(site.conductor.store.root) == {}
    assert site.world.run.countersigned == site.conductor.countersigned == set()
    assert post(site.app, "/v1/parties/alpha/countersignature", signed).status == 200


def test_a_countersignature_under_another_manifest_is_refused(site: Site) -> None:
    site.run_to(State.AGREEING)
    other = msgspec.structs.replace(site.world.manifest, run="0" * 32)
    got = post(site.app, "/v1/parties/alpha/countersignature", site.world.parties["alpha"].countersign(other))
    got.refused(422, "approval.other-manifest")
    site.kept_nothing()


def test_a_user_asks_until_the_budget_is_spent(tmp_path: Path) -> None:
    site = Site(tmp_path, budget=2).run_to(State.LINKED)
    asked = site.world.question("predict", pictures(2, seed=5))
    got = post(site.app, "/v1/users/una/query", asked.envelope)
    assert (got.status, got.headers["content-type"]) == (200, "application/octet-stream")
    assert asked.open(got.body).budget_left == 0
    again = site.world.question("predict", pictures(1, seed=6))
    got = post(site.app, "/v1/users/una/query", again.envelope)
    got.refused(429, "user.budget-spent")
    assert got.headers["retry-after"]


def test_a_user_who_asks_too_fast_is_told_when_to_come_again(tmp_path: Path) -> None:
    def paced(plan: Plan) -> Plan:
        return msgspec.structs.replace(
            plan, users=tuple(msgspec.structs.replace(user, per_hour=1) for user in plan.users)
        )

    site = Site(tmp_path, change=paced).run_to(State.LINKED)
    asked = [site.world.question("predict", pictures(1, seed=5)) for _ in range(2)]
    assert post(site.app, "/v1/users/una/query", asked[0].envelope).status == 200
    told = post(site.app, "/v1/users/una/query", asked[1].envelope).refused(429, "user.too-fast")
    assert told["fix"].startswith("Ask again in 3")


def test_a_party_notes_a_disclosure_in_the_chain(site: Site) -> None:
    site.run_to(State.LINKED)
    alpha = site.world.parties["alpha"]
    commitment = "sha256:" + alpha.shards[0].commitment(0).hex()
    note = alpha.note(run=site.world.run.vault.run, commitment=commitment)
    assert post(site.app, "/v1/parties/alpha/disclosure", note).status == 200
    assert site.world.chain()[-1].kind == "disclosure"
    assert len(tree(site.conductor.store.root)["chain.jsonl"].splitlines()) == 1


def test_a_busy_enclave_is_asked_again_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> m.Done:
        raise EnvironmentFault("enclave.busy", "at work", step="request", fix="Try again.")

    monkeypatch.setattr(site.enclave, "request", busy)
    got = get(site.app, "/v1/attestation", query=f"purpose=training&nonce={NONCE}")
    got.refused(503, "enclave.busy")
    assert got.headers["retry-after"] == "2"


def test_the_operator_starts_the_run(tmp_path: Path) -> None:
    conductor = Conductor(World().plan, Store(tmp_path), root_secret=bytes(32), auto_start=False)
    assert not conductor._started
    got = post(create_app(conductor), "/v1/run/start")
    assert msgspec.json.decode(got.body)["phase"] == "starting"
    assert conductor._started
