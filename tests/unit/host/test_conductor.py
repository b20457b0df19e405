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
import torch

from caltrain.boundary import messages as m
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, EnvironmentFault, IntegrityError, ProtocolError
from caltrain.exposure.policy import Bound, Policy
from caltrain.host import launcher
from caltrain.host.conductor import Conductor
from caltrain.host.sizes import slot_bytes
from caltrain.host.store import Store
from caltrain.models.spec import Deepen, Partition
from caltrain.models.weights import state_of
from caltrain.plan import ExposureSpec, Plan
from caltrain.provenance.chain import verify_chain
from support.disk import files_end_at, tree
from support.recovery import DEEP, planned
from support.samples import refused
from support.world import PARTIES, World
from support.world_enclave import WorldEnclave

SECONDS = 30


class Site:
    """A conductor whose enclave is a world's. `launched` replaces what launching does."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        auto_start: bool = True,
        world: World | None = None,
        resume: bool = False,
    ) -> None:
        self.world, self.store = world or World(), Store(folder)
        self.conductor = Conductor(
            self.world.plan, self.store, root_secret=bytes(32), auto_start=auto_start, resume=resume
        )
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

    def rejoin(self, *names: str, head: str | None = None) -> None:
        """These parties say that the run may be taken up."""
        self.wait("resume")
        run = self.world.chain_of_host()[-1].run
        for name in names:
            binding = self.conductor.attest("resume", os.urandom(32).hex()).binding
            word = self.world.parties[name].rejoin(binding, run=run, head=head or self.world.host_head)
            self.conductor.rejoin(name, word)

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
    assert {name for name in kept if not name.startswith(("pool-", "linkage-", "shards/"))} == {
        *("log.jsonl", "center-state", "center-at-1-0", "center-at-2-0", "checkpoint-0", "checkpoint-1"),
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
    assert slot_bytes(site.world.plan) == 4096
    wide = msgspec.structs.replace(site.world.plan.training, batch=300)
    assert slot_bytes(msgspec.structs.replace(site.world.plan, training=wide)) == 5 * 4096
    # Without pooling before the cut it is four times as large; what it will deepen to is counted from the start.
    early = Partition(front=1, deepen=(Deepen(epoch=1, front=2),))
    late = Partition(front=2)
    sizes = [slot_bytes(msgspec.structs.replace(site.world.plan, training=wide, partition=p)) for p in (early, late)]
    assert sizes == [19 * 4096, 5 * 4096]
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


# -- the cut deepens, and a run is taken up --------------------------------------------------------------------------


def short(**changes: Any) -> Callable[[Plan], Plan]:
    """Checkpoints after every step; with a schedule for the cut."""

    def change(plan: Plan) -> Plan:
        training = msgspec.structs.replace(plan.training, checkpoint_steps=1)
        return msgspec.structs.replace(plan, training=training, **changes)

    return change


DEEPENING = Partition(front=2, deepen=(Deepen(epoch=1, front=3), Deepen(epoch=2, front=4)))


def is_the_plain_model(world: World) -> None:
    """The run ended with the weights of the plain loop, bit for bit."""
    assert world.run.model is not None
    ours, plain = state_of(world.run.model), state_of(world.plain(world.run.seed))
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


def test_the_cut_deepens_as_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, world=World(head=0, epochs=3, change=short(partition=DEEPENING)))
    site.run()
    site.wait("linked")
    asked = [r for r in site.enclave.requests if isinstance(r, m.Train | m.MoveCut)]
    steps = [m.Train(0, step) for step in range(3)], [m.Train(1, step) for step in range(3)]
    assert asked == [*steps[0], m.MoveCut(3), *steps[1], m.MoveCut(4), *(m.Train(2, step) for step in range(3))]
    is_the_plain_model(site.world)
    site.conductor.stop()


# -- votes on the cut ------------------------------------------------------------------------------------------------


def voting(plan: Plan) -> Plan:
    """A policy that parties check once, before the first epoch."""
    spec = ExposureSpec(policy=Policy(bounds=(Bound(measure="ssim", at_most=0.3),)), every=2, sample=8)
    return msgspec.structs.replace(planned(model=DEEP)(plan), exposure=spec)


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A run that waits for the parties' votes."""
    made = Site(tmp_path / "host", monkeypatch, world=World(change=voting))
    made.run()
    made.wait("assess").awaits("alpha", "beta", "gamma")
    figures = tree(made.store.root)["semi-trained.json"]
    made.world.statements["assessed-model"] = msgspec.json.decode(figures, type=Envelope)
    yield made
    made.conductor.stop()


def vote(site: Site, name: str, *, front: int) -> None:
    """A party's vote for so many layers."""
    site.conductor.vote(name, site.world.vote(name, front=front).envelope)


def heard(site: Site) -> list[str | m.MoveCut]:
    """Votes that the enclave was given, and what came of them."""
    return [r.party if isinstance(r, m.Vote) else r for r in site.enclave.requests if isinstance(r, m.Vote | m.MoveCut)]


def test_a_repeated_vote_is_ignored(asking: Site) -> None:
    vote(asking, "alpha", front=3)
    vote(asking, "alpha", front=5)
    asking.awaits("beta", "gamma")
    assert heard(asking) == ["alpha"], "a refusal inside would be seen as the run's"
    vote(asking, "beta", front=2)
    vote(asking, "gamma", front=2)
    vote(asking, "gamma", front=5)
    asking.wait("linked")
    assert heard(asking) == ["alpha", "beta", "gamma", m.MoveCut(3)]


def test_a_vote_that_overtakes_itself_counts_once(asking: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last party sends its vote again before the first one is answered: what is due then stays due."""
    vote(asking, "alpha", front=3)
    vote(asking, "beta", front=2)
    request = asking.enclave.request

    def overtaken(message: m.Request, *, wait: float = 5) -> m.Done:
        monkeypatch.setattr(asking.enclave, "request", request)
        vote(asking, "gamma", front=4)
        return request(message, wait=wait)

    monkeypatch.setattr(asking.enclave, "request", overtaken)
    with refused(ProtocolError, "session.not-now"):
        vote(asking, "gamma", front=5)
    asking.wait("linked")
    assert m.MoveCut(4) in heard(asking)


def test_a_vote_that_comes_too_early_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path / "host", monkeypatch, world=World(change=voting), auto_start=False)
    site.run()
    site.wait("start")
    with refused(ProtocolError, "session.not-now"):
        site.conductor.vote("alpha", site.world.parties["alpha"].approve(site.world.plan))
    site.conductor.start_training()
    site.wait("assess").awaits("alpha", "beta", "gamma")
    site.conductor.stop()


def dies_before(site: Site, number: int, kind: type[m.Message]) -> None:
    """The enclave is gone when it is asked for that the `number`th time."""
    request, count = site.enclave.request, 0

    def asked(message: m.Request, *, wait: float = 5) -> m.Done:
        nonlocal count
        count += isinstance(message, kind)
        site.enclave.alive = site.enclave.alive and count < number
        return request(message, wait=wait)

    site.enclave.request = asked  # type: ignore[method-assign]


INTERRUPTED: dict[str, tuple[int, type[m.Message]]] = {
    "before the records are in": (1, m.Ingest),
    "before the first step": (1, m.Train),
    "in an epoch": (3, m.Train),
    "between epochs": (4, m.Train),
    "before the cut moves": (1, m.MoveCut),
    "after the cut has moved": (5, m.Train),
    "before the release": (1, m.Release),
    "before the link": (1, m.Link),
}


@pytest.mark.parametrize(("number", "kind"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupted_run_is_taken_up_and_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[m.Message]
) -> None:
    world = World(head=0, epochs=2, change=short(partition=Partition(front=2, deepen=(Deepen(epoch=1, front=4),))))
    before = Site(tmp_path, monkeypatch, world=world)
    dies_before(before, number, kind)
    before.run()
    before.failed_with("enclave.died")
    world.restart()
    site = Site(tmp_path, monkeypatch, world=world, resume=True)
    site.conductor.begin()
    site.wait("resume").awaits(*PARTIES)
    site.rejoin(*PARTIES)
    site.wait("linked")
    assert [type(r) for r in site.enclave.requests].count(m.Resume) == 1
    assert not any(isinstance(r, m.Configure | m.MakeManifest | m.Provision) for r in site.enclave.requests)
    is_the_plain_model(world)
    lines = tree(site.store.root)["chain.jsonl"].splitlines()
    events = verify_chain(
        [msgspec.json.decode(line, type=Envelope) for line in lines],
        run=world.run.vault.run,
        signing_key=world.run.vault.signing.public,
        head=world.run.chain.head,
    )
    assert [event.kind for event in events].count("resume") == 1
    site.conductor.stop()


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Plan], Plan]) -> Site:
    """A host that has come back after its enclave died in the first epoch, and waits for the parties."""
    world = World(change=change)
    before = Site(tmp_path, monkeypatch, world=world)
    dies_before(before, 2, m.Train)
    before.run()
    before.failed_with("enclave.died")
    world.restart()
    site = Site(tmp_path, monkeypatch, world=world, resume=True)
    site.conductor.begin()
    return site.wait("resume")


def test_a_quorum_is_enough_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = interrupted(tmp_path, monkeypatch, short(resume_quorum=2))
    site.rejoin("gamma")
    site.awaits("alpha", "beta")
    assert site.conductor.status.phase == "resume"
    site.rejoin("alpha")
    site.wait("linked")
    is_the_plain_model(site.world)
    site.conductor.stop()


def test_parties_that_do_not_agree_where_the_run_is_fail_it_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = interrupted(tmp_path, monkeypatch, short())
    site.rejoin("alpha", head=site.world.chain_of_host()[-2].digest())
    site.rejoin("beta", "gamma")
    site.failed_with("resume.no-quorum")
    assert not any(isinstance(r, m.Train) for r in site.enclave.requests)


def test_a_word_that_is_refused_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = interrupted(tmp_path, monkeypatch, short())
    site.rejoin("alpha", "beta")
    with refused(IntegrityError, "signature.invalid"):
        site.conductor.rejoin("gamma", site.world.parties["gamma"].approve(site.world.plan))
    site.awaits("gamma")
    assert site.conductor.rejoined == {"alpha", "beta"}
    site.rejoin("gamma")
    site.wait("linked")
    site.conductor.stop()


def test_a_chain_whose_checkpoint_is_lost_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = interrupted(tmp_path, monkeypatch, short())
    site.conductor.stop()
    for path in site.store.root.glob("checkpoint-*"):
        path.unlink()
    site.world.restart()
    again = Site(tmp_path, monkeypatch, world=site.world, resume=True)
    again.conductor.begin()
    again.failed_with("resume.nothing")
