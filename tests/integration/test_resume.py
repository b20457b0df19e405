"""Host, enclave or both are killed at any moment; the run is taken up again and ends with the same bits."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from caltrain.errors import EnvironmentFault, LineageError
from caltrain.participant.heads import look
from caltrain.participant.receive import RunRecord, run_folder
from caltrain.participant.rejoin import rejoin
from caltrain.plan import Plan, ReleaseSpec
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import CenterSpec
from support.company import LABELS, SECONDS, Company, eventually
from support.disk import tree
from support.samples import refused
from support.world import pictures

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]
PATIENCE = 600  # for four hosts, one after the other
EPOCHS = 4


def resumable(plan: Plan) -> Plan:
    """Checkpoints in the middle of epochs, an audited center, and the seed for the plain loop."""
    return msgspec.structs.replace(
        plan,
        training=msgspec.structs.replace(plan.training, checkpoint_steps=2),
        center=CenterSpec(audit_rate=0.5, audit_steps=1),
        release=ReleaseSpec(reveal_seed=True),
    )


def now() -> datetime:
    return datetime.now(UTC)


def give_word(company: Company) -> int:
    """Every party rejoins; returns how many words were needed."""
    with company.client() as client:
        words = [rejoin(client, company.plan, p, company.policy, clock=now, seconds=SECONDS) for p in company.parties]
    return sum(word is not None for word in words)


def plain_weights(company: Company) -> dict[str, torch.Tensor]:
    """What the plain loop makes of the same records, in the manifest's order, with the seed that was revealed."""
    manifest = company.results["alpha"]
    raw = (run_folder(company.parties[0], manifest.run) / "run.json").read_bytes()
    seed = bytes.fromhex(msgspec.json.decode(raw, type=RunRecord).run_seed)
    pixels, labels = [], []
    for number, entry in enumerate(manifest.parties):
        sealed = company.sealed[number]
        rows = {header.shard: rows for header, rows in zip(sealed.headers, sealed.rows, strict=True)}
        order = [row for shard in entry.shards for row in rows[shard.shard]]
        pixels.append(pictures(16, seed=number)[order])
        labels.append(LABELS[order])
    plan = company.plan
    model = train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=torch.from_numpy(np.concatenate(pixels)),
        labels=torch.from_numpy(np.concatenate(labels)),
        seeds=RunSeeds.from_run_seed(seed),
    )
    return dict(model.state_dict())


def same_bits(company: Company) -> None:
    """Every party's model is, bit for bit, that of the plain loop."""
    expected = plain_weights(company)
    for party in company.parties:
        found = load_file(run_folder(party, company.results[party.name].run) / "model.safetensors")
        assert found.keys() == expected.keys()
        assert [n for n, value in expected.items() if not torch.equal(value.contiguous(), found[n])] == []


def enclave_gone(company: Company) -> bool:
    """The host is gone, or says that its enclave is."""
    if company.process.poll() is not None:
        return True
    try:
        status = company.status()
    except EnvironmentFault:
        return False
    assert status.phase != "linked", "nothing died"
    return status.error is not None and status.error["code"] == "enclave.died"


def told(company: Company, what: str) -> bool:
    """Whether every join has said so."""
    return all(any(what in step for step in steps) for steps in company.steps.values())


def take_up(company: Company, death: str = "") -> None:
    """Take up the run; `death` may strike while the parties still give their word."""
    company.serve("resume", *([death] if death else []))
    if not death:
        # A word given before a join looks again would leave that join nothing to be told.
        eventually(lambda: told(company, "caltrain party rejoin"), "every join is told to rejoin")
    try:
        give_word(company)
    except EnvironmentFault:
        assert death


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """A run that has ended after three deaths; `old` in its folder is a copy of the host's at the first."""
    folder, draw = tmp_path_factory.mktemp("survived"), random.Random(7)
    # Operations of the store: the first dozen come before the countersignatures, where no run can be resumed yet.
    deaths = [f"{who}:{draw.randrange(12, 60)}" for who in ("host", "enclave", "both")]
    company = Company(folder, epochs=EPOCHS, change=resumable, death=deaths[0], patience=PATIENCE)
    try:
        company.join()
        for death in [*deaths[1:], ""]:
            eventually(lambda: enclave_gone(company) or bool(company.errors), "death has come")
            assert not company.errors, (company.errors, (folder / "host.log").read_text())
            company.stop()
            eventually(lambda: told(company, "does not answer"), "every join has found nobody")
            if not (folder / "old").exists():
                shutil.copytree(company.store, folder / "old")
            take_up(company, death)
        company.joined()
        yield company
    finally:
        company.end()


def test_deaths_at_random_moments_change_no_bit_and_end_no_join(survived: Company) -> None:
    log = (survived.folder / "host.log").read_text()
    assert not survived.errors, (survived.errors, log)
    assert log.count("death of") == 3, log
    assert told(survived, "does not answer")
    assert told(survived, "caltrain party rejoin")
    same_bits(survived)


def test_last_a_folder_that_was_put_back_is_refused_and_gets_no_word(survived: Company) -> None:
    survived.stop()
    shutil.rmtree(survived.store)
    shutil.copytree(survived.folder / "old", survived.store)
    survived.serve("resume")
    before, run = tree(survived.parties[0].folder), survived.results["alpha"].run
    for party in survived.parties:
        with survived.client() as client, refused(LineageError, "chain.rolled-back"):
            rejoin(client, survived.plan, party, survived.policy, clock=now, seconds=SECONDS)
    assert tree(survived.parties[0].folder) == before
    status = survived.status()
    assert (status.phase, status.waiting_for) == ("resume", ["alpha", "beta"])
    with survived.client() as client, refused(LineageError, "chain.rolled-back"):
        look(client, survived.parties[0], run)
