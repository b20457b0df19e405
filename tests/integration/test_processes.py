"""Host server, enclave program and parties as processes and threads of their own, over real sockets.

One finished run serves all tests that only look at it; the others end a process in the middle of training.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import pytest

from caltrain.auditor.bundle import verify_bundle
from caltrain.auditor.collect import collect_bundle
from caltrain.auditor.verdict import check_inputs, verify_verdict
from caltrain.client.ask import ask
from caltrain.crypto.dsse import Envelope
from caltrain.errors import EnvironmentFault, ProtocolError
from caltrain.host.kept import newest_checkpoint
from caltrain.host.store import Store
from caltrain.participant.disclose import disclose, note_disclosure
from caltrain.participant.hunt import fetch_report, kept_report, most_suspicious
from caltrain.participant.join import join
from caltrain.participant.receive import RunRecord, run_folder
from caltrain.participant.seal import own_shards, shard_path
from caltrain.plan import Method, RunManifest
from caltrain.provenance.chain import Event, verify_chain
from support.bundles import with_opinions
from support.company import SECONDS, Company, alive, eventually
from support.disk import tree
from support.samples import refused
from support.world import pictures

pytestmark = pytest.mark.processes
FOREVER = 10_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """A run that is over: two parties, two epochs. Its enclave runs without bubblewrap."""
    company = Company(tmp_path_factory.mktemp("finished"), epochs=2, confined=False, change=with_opinions)
    company.join()
    company.joined()
    assert not company.errors, (company.errors, (company.folder / "host.log").read_text())
    yield company
    company.end()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Company]:
    """A run that trains for ever."""
    company = Company(tmp_path, epochs=FOREVER)
    try:
        company.training()
        yield company
    finally:
        company.end()


def chain_of(company: Company) -> tuple[Event, ...]:
    """The chain in the host's folder, verified as far as it goes."""
    lines = (company.store / "chain.jsonl").read_bytes().splitlines()
    manifest = msgspec.json.decode((company.store / "manifest.json").read_bytes(), type=Envelope)
    chain = [msgspec.json.decode(line, type=Envelope) for line in lines]
    run = msgspec.json.decode(base64.b64decode(manifest.payload), type=RunManifest).run
    return verify_chain(chain, run=run, signing_key=manifest.signer)


# -- a finished run ----------------------------------------------------------------------------------------------


def test_all_parties_hold_the_same_model_of_the_same_run(finished: Company) -> None:
    manifest = finished.results["alpha"]
    assert finished.results["beta"] == manifest
    models, records = set(), set()
    for party in finished.parties:
        kept = tree(run_folder(party, manifest.run))
        record = msgspec.json.decode(kept["run.json"], type=RunRecord)
        records.add((record.model, record.head))
        models.add(kept["model.safetensors"])
    assert len(models) == len(records) == 1
    assert finished.status().phase == "linked"


@pytest.mark.parametrize("method", ["fingerprint", "gradient", "trak"])
def test_a_trace_of_the_run_is_verified_without_it(finished: Company, method: Method) -> None:
    with finished.client() as client:
        answered = ask(
            client,
            finished.plan,
            finished.policy,
            kind="trace",
            user="una",
            signer=finished.user.signer,
            inputs=pictures(2, seed=0),
            clock=lambda: datetime.now(UTC),
            method=method,
        )
        named = answered.traces[0].neighbours[0].record
        owner = next(party for party in finished.parties if party.name == named.party)
        envelope, commitment = disclose(owner, finished.plan, named, model=answered.answers.model)
        note_disclosure(client, owner, run=answered.traces[0].run, commitment=commitment)
        bundle = collect_bundle(
            client, finished.plan, answered.envelopes[0], evidence=answered.evidence, disclosures=[envelope]
        )
    verified = verify_bundle(bundle, plan_digest=finished.plan.digest(), policy=finished.policy)
    assert set(verified.records) == {named}
    assert verified.trace.method == method
    noted = [event.body for event in chain_of(finished) if event.kind == "disclosure"]
    assert noted.count({"party": named.party, "commitment": commitment}) == 1


def test_a_verdict_of_the_run_is_verified_without_it_and_each_party_has_read_its_hunt(finished: Company) -> None:
    inputs = pictures(3, seed=0)
    with finished.client() as client:
        answered = ask(
            client,
            finished.plan,
            finished.policy,
            kind="verdict",
            user="una",
            signer=finished.user.signer,
            inputs=inputs,
            clock=lambda: datetime.now(UTC),
        )
        bundle = collect_bundle(client, finished.plan, answered.envelopes[0], evidence=answered.evidence)
        reports = {party.name: fetch_report(client, party, seconds=SECONDS) for party in finished.parties}
    verified = verify_verdict(bundle, plan_digest=finished.plan.digest(), policy=finished.policy)
    (said,) = answered.verdicts
    assert verified.verdict == said
    check_inputs(verified, inputs)
    assert said.inputs == 3
    assert not verified.center_audited
    kinds = [event.kind for event in chain_of(finished)]
    assert kinds.index("hunt") < kinds.index("release") < kinds.index("link")
    for party in finished.parties:
        run, report = reports[party.name]
        assert report == kept_report(party, run)
        assert set(report.wrong_labels) == {party.name}
        assert all(found.score <= 1 for found in most_suspicious(report, "labels", top=99))


def test_who_joins_a_finished_run_again_gets_its_model_again(finished: Company) -> None:
    party, kept = finished.parties[0], finished.results["alpha"]
    model = run_folder(party, kept.run) / "model.safetensors"
    before = model.read_bytes()
    model.unlink()
    with finished.client() as client:
        again = join(client, finished.plan, party, finished.policy, clock=lambda: datetime.now(UTC))
    assert again == kept
    assert model.read_bytes() == before


def shard_url(company: Company) -> tuple[str, Path]:
    """Where a shard of alpha goes, and its file."""
    shard = own_shards(company.parties[0])[0].shard
    return f"/v1/parties/alpha/shards/{shard}", shard_path(company.parties[0], shard)


def test_an_upload_of_ten_gigabytes_is_refused_at_once_and_by_name(finished: Company, tmp_path: Path) -> None:
    before = tree(finished.store)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10_000_000_000)  # a hole: it takes no room
    began = time.monotonic()
    with finished.client() as client, refused(ProtocolError, "upload.too-large"):
        client.upload(shard_url(finished)[0], tmp_path / "huge")
    assert time.monotonic() - began < 20
    assert tree(finished.store) == before


@pytest.mark.parametrize("sound", [True, False])
def test_a_stream_without_length_is_refused_by_name_as_soon_as_it_is_too_long(finished: Company, sound: bool) -> None:
    before = tree(finished.store)
    path, file = shard_url(finished)
    sent: list[int] = []

    def body() -> Iterator[bytes]:
        if sound:
            yield file.read_bytes()
        for _ in range(10_000):
            sent.append(1 << 16)
            yield bytes(1 << 16)

    with httpx.Client(base_url=finished.url, trust_env=False, timeout=SECONDS) as client:
        answer = client.put(path, content=body())
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == ((413, "upload.too-large") if sound else (422, "shard.damaged"))
    assert sum(sent) < 100 << 20
    assert tree(finished.store) == before


def test_an_upload_that_breaks_off_leaves_nothing(finished: Company) -> None:
    before = tree(finished.store)
    path, file = shard_url(finished)
    raw = file.read_bytes()
    host, port = finished.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
        head = f"PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n\r\n"
        sock.sendall(head.encode() + raw[: len(raw) // 2])
        eventually(lambda: any((finished.store / "incoming").iterdir()), "the upload has begun")
    eventually(lambda: not any((finished.store / "incoming").iterdir()), "the upload is gone")
    assert tree(finished.store) == before


def test_no_path_leads_out_of_the_folder(finished: Company) -> None:
    host, port = finished.url.removeprefix("http://").split(":")
    for name in ("../root", "..%2froot", "%2e%2e/root", "release/..%2f..%2froot", "/etc/passwd", "%2fetc%2fpasswd"):
        with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
            sock.sendall(f"GET /v1/artifacts/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 404 "), (name, answer)
        assert b'"code":"http.no-such-' in answer


# -- processes that are ended in the middle of training ----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_host_that_is_told_to_end_takes_its_enclave_with_it(training: Company, number: signal.Signals) -> None:
    children = training.descendants()
    assert training.enclave() in children
    training.process.send_signal(number)
    assert training.process.wait(SECONDS) == -number
    eventually(lambda: not any(alive(pid) for pid in children), "nothing of the enclave is left")
    still_waiting(training, "does not answer")
    whole_store(training)


def still_waiting(company: Company, told: str) -> None:
    """No join has ended: each was told what it waits for."""
    eventually(lambda: all(told in steps[-1] for steps in company.steps.values()), "all are told")
    assert (company.errors, company.results) == ({}, {})


def whole_store(company: Company) -> None:
    """Nothing in the host's folder is half written."""
    kept = tree(company.store)
    assert not any(name.startswith("incoming/") for name in kept)
    of_the_run = ("pool-", "checkpoint-", "center-at-")  # how many there are depends on when it ended
    assert {name for name in kept if not name.startswith(of_the_run)} == {
        *("plan.json", "manifest.json", "chain.jsonl", "log.jsonl", "enclave.log", "lock"),
        *("countersignatures/alpha.json", "countersignatures/beta.json"),
        *(f"shards/{p.name}/{shard.shard}" for p in company.parties for shard in own_shards(p)),
    }
    for party in company.parties:
        for shard in own_shards(party):
            assert kept[f"shards/{party.name}/{shard.shard}"] == shard_path(party, shard.shard).read_bytes()
    assert chain_of(company)[-1].kind in {"epoch", "checkpoint"}
    assert newest_checkpoint(Store(company.store)).startswith("checkpoint-")


def test_an_enclave_that_is_killed_fails_the_run_by_name_and_the_parties_wait(training: Company) -> None:
    children = training.descendants()
    os.kill(training.enclave(), signal.SIGKILL)
    eventually(lambda: training.status().phase == "failed", "the run has failed")
    error = training.status().error
    assert error is not None
    assert error["code"] == "enclave.died"
    still_waiting(training, "the enclave has ended")
    with training.client() as client, refused(EnvironmentFault, "enclave.died"):
        ask(
            client,
            training.plan,
            training.policy,
            kind="predict",
            user="una",
            signer=training.user.signer,
            inputs=pictures(1, seed=0),
            clock=lambda: datetime.now(UTC),
        )
    eventually(lambda: not any(alive(pid) for pid in children), "nothing of the enclave is left")
    whole_store(training)


def test_last_a_host_that_is_killed_takes_its_enclave_with_it(finished: Company) -> None:
    # Nothing but the end of the stream tells this enclave: there is no bubblewrap that would end with its parent.
    children = finished.descendants()
    assert children == [finished.enclave()]
    finished.process.kill()
    finished.process.wait()
    eventually(lambda: not any(alive(pid) for pid in children), "the enclave has ended")
    with finished.client() as client, refused(EnvironmentFault, "host.unreachable"):
        client.status()
