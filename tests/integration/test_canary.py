"""Marked records, labels and weights are searched for in everything that the host can see; nothing may be found.

The run is ternary and of real processes. Afterwards it is replayed from its revealed seed, so the needles are the very
bits that the enclave held: that the replay ends with the released weights, bit for bit, is a test of its own. Runs
that leak on purpose show that each search finds what there is to be found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import torch

from caltrain.accountability.neighbours import label_disagreement
from caltrain.enclave.run import State
from caltrain.models.spec import Partition
from caltrain.plan import Plan
from caltrain.training.batches import normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from support import canary_needles as n
from support.canary_correlate import likeness, tensors_in
from support.canary_findings import Finding, findings
from support.canary_host import Haystack, Place
from support.canary_replay import replay, weights
from support.canary_run import NAMES, RECORDS, Outcome, People, run, unsealed_shard
from support.canary_search import LabelVector, Needle
from support.world import World

pytestmark = pytest.mark.processes

PLACES: tuple[Place, ...] = get_args(Place)
SECRET = ("record", "labels", "weights", "secret", "fingerprint", "question")
ROLES = ("ir", "center-grad")
TALKING_ENCLAVE = Path(__file__).parents[1] / "support" / "talking_enclave.py"
MOMENTS = ("train-0-0", "center-out-1-2", "release")
KNOWN = [
    *(("center weights", place) for place in ("memory", "disk", "door")),
    *(("center seed", place) for place in ("memory", "door")),
    *(("ir", place) for place in ("memory", "door")),
]


class Examined:
    """A run, its replay, and all that was found of it. Without `marked` the records that a talking enclave shows."""

    def __init__(self, outcome: Outcome, *, marked: Sequence[int] = ()) -> None:
        self.outcome, self.plan = outcome, outcome.people.plan
        self.pixels, self.labels = outcome.people.in_order(outcome.model.record.manifest)
        self.replay = replay(self.plan, pixels=self.pixels, labels=self.labels, seeds=outcome.seeds)
        self.fingerprints = self.replay.fingerprints(self.plan, self.pixels)
        self.marked = marked or [*self.replay.steps[0].batch[:3].tolist(), int(self.replay.order[0]), self._unsealed()]
        self.needles = [*self._secret(), *self._known()]
        parties = {name: slice(i * RECORDS, (i + 1) * RECORDS) for i, name in enumerate(NAMES)}
        vectors = n.label_vectors(self.plan, self.replay, labels=self.labels, parties=parties)
        vectors.append(LabelVector("held-out records", outcome.people.held_out[1], len(self.plan.data.classes)))
        self.found = findings(outcome.seen, needles=self.needles, vectors=vectors)

    def _unsealed(self) -> int:
        """Which record is the first of the first party's before sealing."""
        same = self.pixels == torch.from_numpy(self.outcome.people.images[0][0])
        return int(same.flatten(1).all(dim=1).nonzero())

    def _secret(self) -> Iterator[Needle]:
        people, seeds = self.outcome.people, self.outcome.seeds
        yield from n.record_needles(
            self.plan.data, self.replay, pixels=self.pixels, labels=self.labels, marked=self.marked
        )
        yield from n.held_out_needles(self.plan.data, *map(torch.from_numpy, people.held_out))
        yield from n.weight_needles(self.plan, self.replay)
        yield from n.fingerprint_needles(self.fingerprints)
        yield from n.question_needles(self.plan.data, torch.from_numpy(people.question))
        keys = {f"data key of {p.name}": p.data_key for p in people.parties}
        keys |= {f"signing key of {p.name}": p.signer.private_bytes() for p in (*people.parties, people.user)}
        keys |= {f"entropy of {name}": entropy for name, entropy in self.outcome.entropies.items()}
        keys |= {f"{name} seed": getattr(seeds, name) for name in ("front", "head", "order", "augment")}
        yield from n.secret_needles(keys | {"run seed": bytes.fromhex(self.outcome.model.record.run_seed)})

    def _known(self) -> Iterator[Needle]:
        """What the host does hold: that it is found shows that the search looks where it should."""
        last = self.replay.states[-1]
        outer = last.keys() - self.replay.inner(self.plan, last).keys()
        yield from n.tensor_needles("center weights", {name: last[name] for name in outer}, text=False)
        yield Needle("center seed", "center seed", self.outcome.seeds.center)
        for ir in self.replay.steps[-1].ir:
            yield from n.float_needles("ir", "ir", ir)


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """The run as it should be."""
    people = People.gather(tmp_path_factory.mktemp("ternary"), partition=Partition(front=3, head=3))
    return Examined(run(people, moments=MOMENTS), marked=(0, 17, 30, 50, 95))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """A two-way run with an enclave that talks, and with a shard by a writer that does not encrypt."""
    people = People.gather(tmp_path_factory.mktemp("leaky"), partition=Partition(front=3))
    extra = unsealed_shard(people, people.images[0][:2], people.labels[0][:2])
    return Examined(run(people, moments=(), enclave=TALKING_ENCLAVE, extra=extra))


# --- the needles are true -------------------------------------------------------------------------------------------


def test_the_replay_ends_with_the_released_weights_bit_for_bit(ternary: Examined) -> None:
    released = ternary.outcome.model.module.state_dict()
    plain = train_plain(
        *(ternary.plan.model, ternary.plan.partition, ternary.plan.data, ternary.plan.training),
        pixels=ternary.pixels,
        labels=ternary.labels,
        seeds=ternary.outcome.seeds,
    ).state_dict()
    last = weights(ternary.replay.states[-1])
    assert last.keys() == released.keys() == plain.keys()
    for name, value in last.items():
        bits = n.raw_bytes(value.flatten())
        assert bits == n.raw_bytes(released[name].flatten()) == n.raw_bytes(plain[name].flatten()), name


def test_the_fingerprints_explain_the_reported_suspicion(ternary: Examined) -> None:
    order, manifest = ternary.replay.order, ternary.outcome.model.record.manifest
    k = ternary.plan.trace.suspicion_neighbours
    scores = torch.empty(len(order))
    scores[order] = label_disagreement(ternary.fingerprints, ternary.labels[order], k=k)
    reports = ternary.outcome.suspicion
    trained = [(party.name, e.shard) for party in manifest.parties for e in party.shards if not e.held_out]
    reported = [s for name, shard in trained for s in reports[name].of(shard)]
    assert [round(float(score) * 1000) for score in scores] == reported


def test_everything_that_the_host_can_see_was_looked_at(ternary: Examined) -> None:
    seen = ternary.outcome.seen
    assert {hay.place for hay in seen} == set(PLACES)
    for moment in (*MOMENTS, "end"):
        assert sum(len(hay.data) for hay in seen if hay.place == "memory" and hay.name.startswith(moment)) > 10_000_000
    files = {hay.name for hay in seen if hay.place == "disk"}
    assert {
        "train-0-0: pool-0",
        "center-out-1-2: pool-0",
        "center-out-1-2: pool-1",
        "center-out-1-2: held-out-1",
    } <= files
    assert {"train-0-0: checkpoint-0", "center-out-1-2: checkpoint-0", "release: checkpoint-1"} <= files
    assert {"center-out-1-2: center-at-1-0", "center-out-1-2: center-at-1-2", "release: center-state"} <= files
    door = {hay.name: hay.data for hay in seen if hay.place == "door"}
    assert door.keys() == {"in", "out", "storage-in", "storage-out"}
    assert {head.role for head, _ in tensors_in(door["out"])} == {"ir", "center-grad", "eval-ir"}
    assert {head.role for head, _ in tensors_in(door["in"])} == {"center-out", "ir-grad", "eval-out"}
    assert b"show-center" in door["out"], "the center was audited"
    assert {"release: center", "release: suspicion/alpha", "end: chain.jsonl", "end: release/alpha"} <= files
    assert ternary.outcome.entropies.keys() == set(NAMES)
    assert all(name.startswith("[v") for name in ternary.outcome.unreadable), ternary.outcome.unreadable


@pytest.mark.parametrize(("kind", "place"), KNOWN)
def test_what_the_host_does_hold_is_found(ternary: Examined, kind: str, place: Place) -> None:
    assert any((f.kind, f.place) == (kind, place) for f in ternary.found)


# --- nothing is found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SECRET)
def test_the_host_sees_nothing_of(ternary: Examined, kind: str, place: Place) -> None:
    assert kind == "labels" or any(needle.kind == kind for needle in ternary.needles)
    assert [f for f in ternary.found if (f.kind, f.place) == (kind, place)] == []


def test_the_weights_that_are_searched_for_are_those_of_the_checkpoints_too(ternary: Examined) -> None:
    names = {needle.name for needle in ternary.needles if needle.kind == "weights"}
    assert any(name.startswith("momentum/0.") and "after 8 steps" in name for name in names)
    assert any(name.startswith("0.") and "after 2 steps" in name for name in names)


def test_no_outgoing_channel_is_a_picture_of_its_record(ternary: Examined) -> None:
    (out,) = (hay.data for hay in ternary.outcome.seen if (hay.place, hay.name) == ("door", "out"))
    plain = normalise(ternary.pixels, ternary.plan.data, channels_last=False)
    best = likeness(out, ternary.replay.steps, plain=plain, roles=ROLES)
    assert best.keys() == set(ROLES)
    for role, top in best.items():
        print(f"greatest |r| of {role}: {top.r:.3f}, record {top.record} in step {top.epoch}.{top.step}")  # noqa: T201
        assert not top.found, top


# --- what leaks is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "where", "kind", "form", "how"),
    [
        pytest.param("disk", ": shards/alpha/", "record", "canonical", "as it is", id="sealing switched off"),
        pytest.param("door", "out", "labels", "batch 1.2 as <i8", "as it is", id="labels sent"),
        pytest.param("log", ": enclave.log", "record", " hex", "as it is", id="debug print of hex"),
        pytest.param("log", ": enclave.log", "record", " base64", "as it is", id="debug print of base64"),
        pytest.param("log", ": enclave.log", "record", " u8", "decimals", id="debug print of a list"),
        pytest.param("disk", ": weights", "weights", "after 8 steps f32", "as it is", id="weights stored in clear"),
        pytest.param("door", "out", "weights", "after 4 steps f32", "as it is", id="weights sent in clear"),
        pytest.param("disk", ": checkpoint-", "secret", "run seed", "as it is", id="checkpoint with the seed in clear"),
        pytest.param("disk", ": checkpoint-", "secret", "data key of", "as it is", id="checkpoint with keys in clear"),
        pytest.param(
            "disk", ": checkpoint-", "weights", "momentum/", "as it is", id="checkpoint with momentum in clear"
        ),
        pytest.param("disk", ": notes", "record", " normalised f32", "inflated", id="deflated record"),
    ],
)
def test_a_leak_is_found(leaky: Examined, place: Place, where: str, kind: str, form: str, how: str) -> None:
    def is_it(f: Finding) -> bool:
        return (f.place, f.kind, f.how) == (place, kind, how) and where in f.haystack and form in f.what

    assert any(is_it(f) for f in leaky.found), {(f.place, f.haystack, f.kind, f.how, f.what) for f in leaky.found}


def test_a_cut_at_the_input_is_found() -> None:
    def at_input(plan: Plan) -> Plan:
        cut = Partition(front=0, head=plan.partition.head, unsafe_cut_at_input=True)
        return msgspec.structs.replace(plan, partition=cut)

    world = World(head=2, change=at_input).run_to(State.TRAINED)
    pixels, labels = world.data()
    again = replay(world.plan, pixels=pixels, labels=labels, seeds=RunSeeds.from_run_seed(world.run.seed))
    used = again.steps[0].batch.tolist()
    out = Haystack("door", "out", bytes(world.host.enclave_end.sent))
    needles = n.record_needles(world.plan.data, again, pixels=pixels, labels=labels, marked=used)
    found = {finding.what for finding in findings([out], needles=needles, vectors=[])}
    assert all(any(what.startswith(f"record {number} of epoch 0 f32") for what in found) for number in used)
    plain = normalise(pixels, world.plan.data, channels_last=False)
    assert likeness(out.data, again.steps, plain=plain, roles=ROLES)["ir"].found
