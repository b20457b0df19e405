"""The run as the host sees it: phases, who is waited for, and how everything that goes wrong is said and ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, EnvironmentFault, IntegrityError, ProtocolError
from caltrain.host import conductor as conducting
from caltrain.host import launcher
from caltrain.host.conductor import Conductor
from caltrain.host.store import Store
from caltrain.provenance.chain import verify_chain
from support.disk import files_end_at, tree
from support.samples import refused
from support.world import World
from support.world_enclave import WorldEnclave

SECONDS = 30


class Site:
    """A conductor whose enclave is a world's. `launched` replaces what launching does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, auto_start: bool = True) -> None:
        self.world, self.store = World(), Store(folder)
        self.conductor = Conductor(self.world.plan, self.store, root_secret=bytes(32), auto_start=auto_start)
        self.enclave = WorldEnclave(self.world, self.conductor._keep_events, store=self.store)
        self.launched: Callable[[], None] = lambda: None
        self.given: dict[str, Any] = {}
        monkeypatch.setattr(launcher, "launch", self._launch)

    def _launch(self, store: Store, **given: Any) -> WorldEnclave:
        assert store is self.store
        self.given = given
        self.launched()
        return self.enclave

    def wait(self, phase: str) -> Site:
        """Until the run is in that phase."""
        deadline = time.monotonic() + SECONDS
        while self.conductor.status.phase != phase:
            assert time.monotonic() < deadline, self.conductor.status
            time.sleep(0.005)
        return self

    def awaits(self, *names: str) -> None:
        """The run waits for these and nobody else."""
        deadline = time.monotonic() + SECONDS
        while self.conductor.status.waiting_for != list(names):
            assert time.monotonic() < deadline, self.conductor.status
            time.sleep(0.005)

    def approve(self) -> None:
        """All parties approve."""
        self.wait("approvals")
        for party in self.world.parties.values():
            self.conductor.approve(party.name, party.approve(self.world.plan))

    def provision(self) -> None:
        """All parties hand over their keys."""
        self.wait("provisioning")
        for party in self.world.parties.values():
            bundle = self.conductor.attest("training", os.urandom(32).hex())
            self.conductor.provision(party.name, party.provision(bundle.binding))

    def countersign(self) -> None:
        """All parties countersign."""
        self.wait("countersignatures")
        for party in self.world.parties.values():
            self.conductor.countersign(party.name, party.countersign(self.world.manifest))

    def send_shards(self, change: Callable[[bytes], bytes] = lambda raw: raw) -> None:
        """All shards arrive."""
        for party in self.world.parties.values():
            for shard in party.shards:
                self.store.put(f"shards/{party.name}/{shard.header.shard}", change(shard.raw))
        self.conductor.notify()

    def run(self) -> None:
        """Begin, and do all that parties do."""
        self.send_shards()
        self.conductor.begin()
        self.approve()
        self.provision()
        self.countersign()

    def failed_with(self, code: str) -> None:
        """The run has failed and says why, whatever is asked; the enclave is gone."""
        self.wait("failed")
        self.conductor._thread.join(SECONDS)
        assert self.conductor.status.error is not None
        assert self.conductor.status.error["code"] == code
        assert self.enclave.stopped
        for request in (
            lambda: self.conductor.attest("query", "0" * 64),
            lambda: self.conductor.query("una", self.world.users["una"].approve(self.world.plan)),
        ):
            with pytest.raises(CaltrainError, match=rf"^{code}: "):
                request()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A conductor that has not begun."""
    made = Site(tmp_path / "host", monkeypatch)
    yield made
    made.conductor.stop()


def test_a_run_leaves_what_parties_and_auditors_need(site: Site) -> None:
    site.run()
    site.wait("linked").awaits("model users")
    names = site.world.parties
    kept = tree(site.store.root)
    assert {name for name in kept if not name.startswith(("pool-", "shards/"))} == {
        *("plan.json", "manifest.json", "center", "release.json", "suspicion.json", "chain.jsonl", "enclave.log"),
        *(f"{what}/{name}" for what in ("release", "suspicion") for name in names),
        *(f"countersignatures/{name}.json" for name in names),
    }
    assert kept["plan.json"] == canonical_json(site.world.plan)
    assert site.conductor.manifest == site.world.manifest
    chain = [msgspec.json.decode(line, type=Envelope) for line in kept["chain.jsonl"].splitlines()]
    signing = site.world.run.vault.signing.public
    events = verify_chain(chain, run=site.world.run.vault.run, signing_key=signing, head=site.world.run.chain.head)
    assert events[-1].kind == "link"
    status = site.conductor.status
    assert (status.epoch, status.epochs, status.simulated, status.sandbox) == (2, 2, True, {"test": "on"})
    assert status.loss is not None
    assert status.error is None


def test_the_run_says_who_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, auto_start=False)
    site.conductor.begin()
    site.wait("approvals").awaits("alpha", "beta", "gamma")
    beta = site.world.parties["beta"]
    site.conductor.approve("beta", beta.approve(site.world.plan))
    site.awaits("alpha", "gamma")
    site.approve()
    site.wait("provisioning").awaits("alpha", "beta", "gamma")
    site.provision()
    site.wait("countersignatures").awaits("alpha", "beta", "gamma")
    site.countersign()
    site.wait("shards").awaits("alpha", "beta", "gamma")
    site.send_shards()
    site.wait("start").awaits("operator")
    site.conductor.start_training()
    site.wait("linked")
    site.conductor.stop()


def test_shards_that_nobody_countersigned_are_left_out_and_named(site: Site) -> None:
    site.store.put("shards/beta/" + "0" * 32, b"no party listed this one")
    site.run()
    site.wait("linked")
    assert site.conductor.status.ignored == ["beta/" + "0" * 32]


def test_a_shard_that_fails_inside_fails_the_run_for_everybody(site: Site) -> None:
    site.conductor.begin()
    site.approve()
    site.provision()
    site.send_shards(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    site.countersign()
    site.failed_with("sealed.not-authentic")
    assert not any(name.startswith(("release", "center")) for name in tree(site.store.root))


@pytest.mark.parametrize("phase", ["approvals", "provisioning", "countersignatures", "linked"])
def test_an_enclave_that_dies_while_the_run_waits_is_noticed(site: Site, phase: str) -> None:
    if phase == "linked":
        site.run()
    else:
        site.conductor.begin()
        steps = {"provisioning": [site.approve], "countersignatures": [site.approve, site.provision]}
        for step in steps.get(phase, []):
            step()
    site.wait(phase)
    site.enclave.alive = False
    site.conductor.notify()
    site.failed_with("enclave.died")


def test_an_enclave_that_does_not_start_is_said_so(site: Site) -> None:
    def fails() -> None:
        raise EnvironmentFault("enclave.did-not-start", "gone", step="launch", fix="Look.")

    site.launched = fails
    site.conductor.begin()
    site.wait("failed")
    assert site.conductor.status.error is not None
    assert site.conductor.status.error["code"] == "enclave.did-not-start"


def test_an_unforeseen_failure_is_seen_by_all(site: Site) -> None:
    def fails() -> None:
        raise RuntimeError("unforeseen")

    site.launched = fails
    site.conductor.begin()
    site.wait("failed")
    assert site.conductor.status.error is not None
    assert site.conductor.status.error["code"] == "host.internal"
    assert "unforeseen" in site.conductor.status.error["what"]


def test_a_disk_that_is_full_fails_the_run_by_name(site: Site) -> None:
    with files_end_at(10):
        site.conductor.begin()
        site.wait("failed")
    assert site.conductor.status.error is not None
    assert site.conductor.status.error["code"] == "storage.full"
    assert tree(site.store.root) == {}


def test_an_event_that_the_disk_cannot_take_is_kept_for_later(site: Site) -> None:
    site.run()
    site.wait("linked")
    before = tree(site.store.root)["chain.jsonl"]
    with files_end_at(len(before) + 100), refused(EnvironmentFault, "storage.full"):
        note(site, 0)
    assert tree(site.store.root)["chain.jsonl"] == before
    note(site, 1)
    lines = tree(site.store.root)["chain.jsonl"].splitlines()
    assert len(lines) == len(before.splitlines()) + 2
    chain = [msgspec.json.decode(line, type=Envelope) for line in lines]
    verify_chain(chain, run=site.world.run.vault.run, signing_key=site.world.run.vault.signing.public)


def note(site: Site, leaf: int) -> None:
    """Alpha notes that it disclosed a record."""
    alpha = site.world.parties["alpha"]
    commitment = "sha256:" + alpha.shards[0].commitment(leaf).hex()
    site.conductor.disclose("alpha", alpha.note(run=site.world.run.vault.run, commitment=commitment))


@pytest.mark.parametrize("phase", ["approvals", "linked"])
def test_stopping_ends_the_enclave_and_is_no_failure(site: Site, phase: str) -> None:
    if phase == "linked":
        site.run()
    else:
        site.conductor.begin()
    site.wait(phase)
    site.conductor.stop()
    assert not site.conductor._thread.is_alive()
    assert site.enclave.stopped
    assert (site.conductor.status.phase, site.conductor.status.error) == (phase, None)


def test_stopping_during_the_launch_ends_the_enclave_that_comes_of_it(site: Site) -> None:
    launching, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        launching.set()
        assert go_on.wait(SECONDS)

    site.launched = slow
    site.conductor.begin()
    assert launching.wait(SECONDS)
    stopper = threading.Thread(target=site.conductor.stop)
    stopper.start()
    while not site.conductor._stopping:
        time.sleep(0.001)
    go_on.set()
    stopper.join(SECONDS)
    assert not site.conductor._thread.is_alive()
    assert site.enclave.stopped


def test_stopping_a_run_that_never_began_is_quiet(site: Site) -> None:
    site.conductor.stop()
    assert site.conductor.status.phase == "starting"


def test_progress_is_passed_on_with_its_pace(site: Site) -> None:
    site.conductor._epoch_began = time.monotonic() - 2
    site.conductor._on_progress(m.Progress("ingest", 3, 9))
    status = site.conductor.status
    assert (status.done, status.total, status.loss, status.images_per_second) == (3, 9, None, None)
    site.conductor._on_progress(m.Progress("train", 5, 10, 0.25))
    assert (status.done, status.total, status.loss) == (5, 10, 0.25)
    assert status.images_per_second == pytest.approx(5 * 8 / 2, rel=0.2)


def test_the_ring_holds_the_largest_tensor_that_crosses(site: Site) -> None:
    # After the FrontNet (4 filters, pooled to 2x2) and before the HeadNet (the same), batches of 8 in float32.
    assert conducting._slot_bytes(site.world.plan) == 4096
    wide = msgspec.structs.replace(site.world.plan.training, batch=300)
    assert conducting._slot_bytes(msgspec.structs.replace(site.world.plan, training=wide)) == 5 * 4096
    site.conductor.begin()
    site.wait("approvals")
    assert site.given["slot_bytes"] == 4096
    assert site.given["threads"] == 1


def test_a_reply_without_what_was_asked_for_is_not_passed_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.conductor.begin()
    site.wait("approvals")
    monkeypatch.setattr(site.enclave, "request", lambda *_, **__: m.Done())
    with refused(ProtocolError, "host.not-yet"):
        site.conductor.attest("training", "0" * 64)
    with refused(ProtocolError, "host.not-yet"):
        site.conductor.provision("alpha", site.world.parties["alpha"].approve(site.world.plan))
    assert site.conductor.provisioned == set()


def test_a_run_without_a_manifest_does_not_go_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    request = site.enclave.request

    def without(message: m.Request, *, wait: float = 5) -> m.Done:
        return m.Done() if isinstance(message, m.MakeManifest) else request(message, wait=wait)

    monkeypatch.setattr(site.enclave, "request", without)
    site.conductor.begin()
    site.approve()
    site.provision()
    site.failed_with("host.not-yet")
    assert "manifest.json" not in tree(site.store.root)


def test_an_approval_that_is_none_is_not_kept(site: Site) -> None:
    with refused(IntegrityError, "signature.invalid"):
        site.conductor.approve("alpha", site.world.parties["beta"].approve(site.world.plan))
    assert site.conductor.approvals == {}
