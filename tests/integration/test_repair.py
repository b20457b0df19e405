"""A model is repaired: host, enclave and commands as processes of their own, from a trace to the proof of what was not
used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.attestation.verify import Policy
from caltrain.auditor.collect import collect_bundle
from caltrain.client.ask import Answered, ask
from caltrain.host_client import HostClient
from caltrain.models.weights import decode_state, model_digest
from caltrain.participant.identity import Identity, create_identity
from caltrain.participant.join import join
from caltrain.participant.receive import RunRecord, run_folder
from caltrain.participant.seal import read_own_header, shard_path
from caltrain.plan import Plan, ReleaseSpec, parse_plan
from caltrain.records import shard as shards
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import decode_quarantine
from caltrain.records.schema import decode_record
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from support.company import SECONDS, Company
from support.world import pictures

pytestmark = pytest.mark.processes


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "caltrain", *map(str, words), "--format", "json"]


def ran(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """What a command prints that ends with this code."""
    done = subprocess.run(command(*words), capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def served(*words: str | Path) -> Iterator[str]:
    """The address of a host."""
    with subprocess.Popen(command("host", "serve", *words), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=SECONDS)


def reveals(plan: Plan) -> Plan:
    """The parties can repeat the run."""
    return msgspec.structs.replace(plan, release=ReleaseSpec(reveal_seed=True))


def traced(company: Company, url: str, plan: Plan, policy: Policy) -> Answered:
    """What a model user is told about an input."""
    with HostClient(url) as host:
        return ask(
            host,
            plan,
            policy,
            kind="trace",
            user="una",
            signer=company.user.signer,
            inputs=pictures(2, seed=77),
            clock=lambda: datetime.now(UTC),
        )


def first_run(company: Company, out: Path) -> Path:
    """A run, and a trace in it; returns the file of signed traces."""
    company.join()
    company.joined()
    assert not company.errors, (company.errors, (company.folder / "host.log").read_text())
    answered = traced(company, company.url, company.plan, company.policy)
    out.write_bytes(msgspec.json.encode(answered.envelopes))
    company.stop()
    return out


def joined(company: Company, url: str, plan: Plan, policy: Policy) -> RunRecord:
    """Both parties join the repaired run, from the folders of the first one; what alpha keeps of it."""
    errors: list[Exception] = []

    def take_part(party: Identity) -> None:
        try:
            with HostClient(url) as host:
                join(host, plan, party, policy, clock=lambda: datetime.now(UTC), seconds=SECONDS)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=take_part, args=(party,)) for party in company.parties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not errors, errors
    (alpha, _) = company.parties
    runs = [path for path in (alpha.folder / "runs").iterdir() if path.name != company.results["alpha"].run]
    assert len(runs) == 1
    return msgspec.json.decode((runs[0] / "run.json").read_bytes(), type=RunRecord)


def opened(company: Company) -> dict[RecordRef, tuple[np.ndarray[Any, Any], int]]:
    """All records that both parties have sealed."""
    found = {}
    for party in company.parties:
        for path in sorted((party.folder / "shards").glob("*.shard")):
            header = read_own_header(party, path)
            with shard_path(party, header.shard).open("rb") as file:
                shards.read_header(file, step="test")
                chunks, schema = shards.read_chunks(file), company.plan.data
                for leaf, _, record in shards.open_frames(header, party.data_key, chunks, schema=schema, step="test"):
                    found[RecordRef(party.name, header.shard, leaf)] = decode_record(schema, record)
    return found


def plain_digest(company: Company, record: RunRecord, plan: Plan, without: set[RecordRef]) -> str:
    """The model of the plain loop, with the run's seed, over all records of the manifest but some."""
    records = opened(company)
    rows = [records[ref] for ref in record.manifest.references(without=without)]
    model = train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=torch.from_numpy(np.stack([pixels for pixels, _ in rows])),
        labels=torch.tensor([label for _, label in rows]),
        seeds=RunSeeds.from_run_seed(bytes.fromhex(record.run_seed)),
    )
    return model_digest(plan.model, model.state_dict())


def test_a_traced_record_is_left_out_and_anybody_can_check_it(tmp_path: Path) -> None:
    company = Company(tmp_path, epochs=1, confined=False, change=reveals)
    try:
        traces = first_run(company, tmp_path / "traces.json")
    finally:
        company.end()
    first, out, operator = company.results["alpha"], tmp_path / "remedy", create_identity(tmp_path / "op", "op")
    said = ran("remedy", "plan", run_folder(company.parties[0], first.run), traces, "--out", out)
    plan, raw = parse_plan((out / "plan.toml").read_bytes()), (out / "quarantine.json").read_bytes()
    quarantine = decode_quarantine(raw)
    left_out = set(quarantine.commitments())
    assert (said["records"], said["digest"]) == (len(left_out), plan.digest())
    assert len(left_out) in range(3, 7)
    policy = msgspec.structs.replace(company.policy, simulated_roots=(operator.signer.public,))
    serve = ("--plan", out / "plan.toml", "--folder", tmp_path / "second", "--root", operator.folder, "--port", "0")
    assert ran("host", "serve", *serve, code=10)["error"]["code"] == "given.missing"
    with served(*serve, "--auto-start", "--quarantine", out / "quarantine.json") as url:
        record = joined(company, url, plan, policy)
        answered = traced(company, url, plan, policy)
        with HostClient(url) as host:
            bundle = collect_bundle(host, plan, answered.envelopes[0], evidence=answered.evidence)
        (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(bundle))
    state = decode_state(
        (run_folder(company.parties[1], record.manifest.run) / "model.safetensors").read_bytes(), step=""
    )
    assert model_digest(plan.model, state) == record.model == plain_digest(company, record, plan, left_out)
    assert plain_digest(company, record, plan, set()) != record.model
    commitment = quarantine.entries[0].commitment
    given = (
        "verify",
        tmp_path / "bundle.json",
        "--plan-digest",
        plan.digest(),
        "--quarantine",
        out / "quarantine.json",
    )
    shown = ran(*given, "--left-out", commitment)
    assert shown["repair"]["model"] == quarantine.model
    assert (shown["repair"]["run"], shown["left_out"]) == (first.run, [commitment])
    assert ran(*given, "--left-out", "sha256:" + "0" * 64, code=17)["error"]["code"] == "quarantine.not-listed"
