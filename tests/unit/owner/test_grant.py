"""The owner hands over the key: to the enclave that was verified, and to no other; again only when it is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.attestation.verify import Claims, Policy
from caltrain.boundary import serving as m
from caltrain.boundary.messages import Attest
from caltrain.crypto.dsse import Envelope
from caltrain.errors import AttestationError, EnvironmentFault, IntegrityError, ProvisioningError
from caltrain.host_client import HostClient
from caltrain.owner.grant import await_enclave, grant, watch_enclave
from caltrain.serving.package import GrantReceipt
from caltrain.serving.session import Offer
from support.samples import refused, signer
from support.served import DATA_KEY, ServedWorld, served
from support.tiny import MEASUREMENT

URL = "http://host"
NO_KEY, STARTING = "serving.no-key", "serving.starting"


class Host:
    """Carries messages between owner and enclave; what it changes and how ready it says it is, tests decide."""

    def __init__(self, world: ServedWorld) -> None:
        self.world = world
        self.asked: dict[str, str] = {}
        self.granted: list[Envelope] = []
        self.bundle: Callable[[EvidenceBundle], EvidenceBundle] = lambda bundle: bundle
        self.instead: Envelope | None = None
        self.receipt: Callable[[Envelope], Envelope] = lambda receipt: receipt
        self.lacks: list[str] = []
        self.client = HostClient(URL, transport=httpx.MockTransport(self.handle))

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/attestation":
            self.asked = dict(request.url.params)
            bundle = self.world.served(Attest("serving", self.asked["nonce"])).bundle
            assert bundle is not None
            offer = Offer(package=self.world.opened.envelope, bundle=self.bundle(bundle))
            return httpx.Response(200, content=msgspec.json.encode(offer))
        terms = self.world.package.terms
        place = f"/v2/models/{terms.name}/versions/{terms.revision}"
        if request.url.path == f"{place}/ready":
            return failure(lack) if (lack := self.lacks.pop(0)) else httpx.Response(200)
        assert request.url.path == f"{place}/grant"
        self.granted.append(msgspec.json.decode(request.read(), type=Envelope))
        signed = self.instead or self.world.served(m.Grant(self.granted[-1])).signed
        assert signed is not None
        return httpx.Response(200, content=msgspec.json.encode(self.receipt(signed)))

    def policy(self, **changes: Any) -> Policy:
        roots = (self.world.root.public,)
        policy = Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=roots)
        return msgspec.structs.replace(policy, **changes)

    def grant(self, **changes: Any) -> Claims:
        return grant(
            self.client,
            self.world.package,
            self.policy(**changes),
            signer=signer("owner"),
            data_key=DATA_KEY,
            clock=lambda: datetime.now(UTC),
        )


def failure(code: str) -> httpx.Response:
    detail = EnvironmentFault(code, "not ready", step="test", fix="Wait.").diagnostics()
    return httpx.Response(503, content=msgspec.json.encode({"error": code, "detail": detail}))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with served(tmp_path) as world:
        world.served(m.LoadPackage(world.opened.envelope))
        yield Host(world)


def test_a_verified_enclave_gets_the_key_and_serves(host: Host) -> None:
    claims = host.grant()
    assert (claims.measurement, claims.simulated) == (MEASUREMENT, True)
    assert (host.asked["model"], host.asked["version"]) == (host.world.package.terms.name, "1")
    una = host.world.session("una")
    records = host.world.pictures(2)
    answer = host.world.predict(0, una.seal(records))[0]
    assert una.table(answer).allclose(host.world.expected(records), atol=1e-6)


def other_plan(bundle: EvidenceBundle) -> EvidenceBundle:
    return msgspec.structs.replace(bundle, binding=msgspec.structs.replace(bundle.binding, plan="sha256:" + "0" * 64))


def other_purpose(bundle: EvidenceBundle) -> EvidenceBundle:
    return msgspec.structs.replace(bundle, binding=msgspec.structs.replace(bundle.binding, purpose="training"))


def other_key(bundle: EvidenceBundle) -> EvidenceBundle:
    key = signer("somebody").public
    return msgspec.structs.replace(bundle, binding=msgspec.structs.replace(bundle.binding, signing_key=key))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (other_plan, "evidence.other-plan"),
        (other_purpose, "evidence.other-purpose"),
        (other_key, "evidence.other-key"),
    ],
)
def test_an_enclave_that_does_not_prove_what_it_is_gets_nothing(
    change: Callable[[EvidenceBundle], EvidenceBundle], code: str, host: Host
) -> None:
    host.bundle = change
    with refused(AttestationError, code):
        host.grant()
    assert host.granted == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"allow_simulated": False}, "evidence.simulated"),
        ({"simulated_roots": (signer("somebody").public,)}, "evidence.unknown-root"),
        ({"measurements": ("sha384:" + "0" * 96,)}, "evidence.other-measurement"),
    ],
)
def test_the_owners_policy_decides(changes: dict[str, Any], code: str, host: Host) -> None:
    with refused(AttestationError, code):
        host.grant(**changes)
    assert host.granted == []


def test_a_program_that_the_package_does_not_trust_gets_nothing(host: Host) -> None:
    """The owner's policy accepts it, the package does not: as if the host had made the enclave take it all the same."""
    other = "sha384:" + "0" * 96
    attester = SimulatedAttester(host.world.root, measurement=other)
    host.bundle = lambda b: EvidenceBundle(binding=b.binding, evidence=attester.evidence(b.binding.report_data()))
    with refused(AttestationError, "evidence.not-the-packages"):
        host.grant(measurements=(MEASUREMENT, other))
    assert host.granted == []


def test_a_receipt_for_another_message_is_refused(host: Host) -> None:
    """The enclave's own, but for another transcript: played with a key that stands for the enclave's."""
    enclave, world = signer("enclave"), host.world

    def played(bundle: EvidenceBundle) -> EvidenceBundle:
        binding = msgspec.structs.replace(bundle.binding, signing_key=enclave.public)
        attester = SimulatedAttester(world.root, measurement=MEASUREMENT)
        return EvidenceBundle(binding=binding, evidence=attester.evidence(binding.report_data()))

    host.bundle = played
    host.instead = enclave.sign("grant-receipt", GrantReceipt(transcript="sha256:" + "0" * 64))
    with refused(ProvisioningError, "grant.other-receipt"):
        host.grant()


def test_a_receipt_of_somebody_else_is_refused(host: Host) -> None:
    host.receipt = lambda _: signer("somebody").sign("grant-receipt", GrantReceipt(transcript="sha256:" + "0" * 64))
    with refused(IntegrityError, "signature.invalid"):
        host.grant()


def test_an_enclave_that_starts_is_waited_for_and_no_longer(host: Host) -> None:
    pauses: list[int] = []
    host.lacks = [STARTING, STARTING, NO_KEY, STARTING]
    await_enclave(host.client, host.world.package, tries=9, pause=lambda: pauses.append(1))
    assert (host.lacks, len(pauses)) == ([STARTING], 2)
    host.lacks = [STARTING] * 5
    await_enclave(host.client, host.world.package, tries=3, pause=lambda: pauses.append(1))
    assert (len(host.lacks), len(pauses)) == (2, 5)


def test_a_watching_owner_grants_only_to_who_waits_and_only_so_often(host: Host) -> None:
    claims = Claims(kind="simulated", simulated=True, measurement=MEASUREMENT, report_data=b"")
    host.lacks = ["", STARTING, NO_KEY, "", NO_KEY, NO_KEY, NO_KEY]
    given: list[Claims] = []
    gone = [False, True, False]  # the second time it ends before it has the key

    def again() -> Claims:
        if gone.pop(0):
            raise EnvironmentFault("serving.restarted", "gone", step="test", fix="Wait.")
        return claims

    watch_enclave(host.client, host.world.package, again, at_most=3, pause=lambda: None, on_grant=given.append)
    assert (given, host.lacks) == ([claims, claims], [NO_KEY])
    watch_enclave(host.client, host.world.package, again, at_most=0, pause=lambda: None, on_grant=given.append)
    assert (len(given), host.lacks) == (2, [NO_KEY])
