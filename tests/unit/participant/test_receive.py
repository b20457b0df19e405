"""After the run: what a party keeps verifies as a whole, or nothing is kept."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch

from caltrain.boundary.sealed import ReleasedPart, SuspicionReport, seal_for
from caltrain.crypto.dsse import SigningKey
from caltrain.enclave.run import State
from caltrain.errors import CaltrainError, EnvironmentFault, IntegrityError, LineageError, ProtocolError
from caltrain.models.weights import decode_state, encode_state, model_digest
from caltrain.participant import receive as receiving
from caltrain.participant.hunt import kept_report
from caltrain.participant.receive import RunRecord, receive, run_folder
from caltrain.provenance.chain import Chain
from caltrain.provenance.statements import LinkedModel, ModelStatement
from support.disk import files_end_at, tree
from support.folders import identity_of
from support.repairs import repaired
from support.samples import refused
from support.scripted_host import Edit, ScriptedHost
from support.world import World
from support.worlds import finished_world

OTHER = "sha256:" + "0" * 64
ARTIFACTS = "/v1/artifacts/"


class Receiving:
    """Alpha, after a run."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.host = world, ScriptedHost(world)
        self.alpha = identity_of(world.parties["alpha"], folder)
        self.before = tree(folder)
        self.model = world.statement("model", ModelStatement).model

    def receive(self) -> RunRecord:
        """Fetch and verify everything."""
        with self.host.client() as client:
            return receive(client, self.world.plan, self.alpha, self.world.manifest)

    def refused(self, family: type[CaltrainError], code: str, **edits: Edit) -> None:
        """With these artifacts edited, nothing is kept."""
        self.host.edit = {ARTIFACTS + name: edit for name, edit in edits.items()}
        with refused(family, code):
            self.receive()
        assert tree(self.alpha.folder) == self.before

    def sealed(
        self, purpose: str, payload: msgspec.Struct, *, key: bytes | None = None, run: str | None = None
    ) -> Edit:
        """What the enclave could have sealed to alpha instead."""
        context = self.world.manifest.run if run is None else run
        raw = seal_for(key or self.alpha.data_key, purpose, payload, context=context)
        return lambda _: raw

    def signed(self, kind: str, statement: msgspec.Struct, *, signer: SigningKey | None = None) -> Edit:
        """What the enclave could have stated instead."""
        raw = msgspec.json.encode((signer or self.world.run.vault.signing).sign(kind, statement))
        return lambda _: raw


def a_repair() -> World:
    """A run that left out some records."""
    return repaired().run_to(State.LINKED)


@pytest.mark.parametrize("edited", [{"model"}, {"linked-model"}, {"model", "linked-model"}])
def test_release_and_link_must_say_of_the_repair_what_the_plan_says(edited: set[str], tmp_path: Path) -> None:
    first, second = (Receiving(world, tmp_path / str(i)) for i, world in enumerate((finished_world(), a_repair())))
    repair = second.world.plan.repair or None
    assert repair
    first.receive()
    second.receive()
    kinds = {"model": ("release.json", ModelStatement), "linked-model": ("suspicion.json", LinkedModel)}
    for party, said in ((first, repair), (second, None), (second, msgspec.structs.replace(repair, records=3))):
        for kind in edited:
            name, type_ = kinds[kind]
            honest = party.world.statement(kind, type_)
            party.host.edit[ARTIFACTS + name] = party.signed(kind, msgspec.structs.replace(honest, repair=said))
        with refused(IntegrityError, "release.mismatch") as caught:
            party.receive()
        assert "repair" in caught.value.what


@pytest.fixture
def finished() -> World:
    """A world whose run is over."""
    return finished_world()


@pytest.fixture
def receiving_(finished: World, tmp_path: Path) -> Receiving:
    """A party that has not received yet."""
    return Receiving(finished, tmp_path / "alpha")


def test_model_report_and_chain_are_kept_whole(receiving_: Receiving) -> None:
    world, record = receiving_.world, receiving_.receive()
    folder = run_folder(receiving_.alpha, world.manifest.run)
    assert set(tree(folder)) == {"model.safetensors", "plan.json", "suspicion.sealed", "chain.jsonl", "run.json"}
    state = decode_state((folder / "model.safetensors").read_bytes(), step="test")
    assert model_digest(world.plan.model, state) == record.model == receiving_.model
    assert world.run.model is not None
    for name, value in world.run.model.state_dict().items():
        assert torch.equal(value, state[name])
    assert msgspec.json.decode((folder / "run.json").read_bytes(), type=RunRecord) == record
    assert record.head == world.run.chain.head
    assert bytes.fromhex(record.run_seed) == world.run.seed
    report = kept_report(receiving_.alpha, world.manifest.run)
    assert set(report.scores["disagreement"]) == {shard.header.shard for shard in world.parties["alpha"].shards}
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_a_run_can_be_received_again(receiving_: Receiving) -> None:
    receiving_.receive()
    kept = tree(receiving_.alpha.folder)
    receiving_.receive()
    assert tree(receiving_.alpha.folder) == kept


def flipped(at: int) -> Edit:
    """One bit of an artifact flipped."""

    def edit(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[at] ^= 1
        return bytes(changed)

    return edit


def other_center(world: World) -> Edit:
    """A CenterNet of the right form with one weight moved."""

    def edit(raw: bytes) -> bytes:
        state = decode_state(raw, step="test")
        name = next(name for name, value in state.items() if value.is_floating_point())
        state[name].view(-1)[0] += 1
        return encode_state(state)

    return edit


def chain_edit(change: Callable[[list[bytes]], list[bytes]]) -> Edit:
    """The chain's lines changed."""
    return lambda raw: b"".join(change(raw.splitlines(keepends=True)))


GARBAGE = [b"", b"\xff", b"<html>", b"{}", b"[" * 100_000]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_refused_wherever_it_comes(receiving_: Receiving, garbage: bytes) -> None:
    mismatch = "release.mismatch"
    for name, codes in {
        "release/alpha": {"sealed.not-authentic"},
        "suspicion/alpha": {"sealed.not-authentic"},
        "release.json": {mismatch},
        "suspicion.json": {mismatch},
        "center": {"weights.malformed", mismatch},
        "chain.jsonl": {mismatch},
    }.items():
        receiving_.host.edit = {ARTIFACTS + name: lambda _: garbage}
        with pytest.raises(IntegrityError) as caught:
            receiving_.receive()
        assert caught.value.code in codes, name
        assert tree(receiving_.alpha.folder) == receiving_.before


def test_a_center_that_was_exchanged_is_refused(receiving_: Receiving) -> None:
    receiving_.refused(IntegrityError, "release.mismatch", center=other_center(receiving_.world))


def test_a_center_with_more_or_fewer_weights_is_refused(receiving_: Receiving) -> None:
    def without(raw: bytes) -> bytes:
        state = decode_state(raw, step="test")
        state.popitem()
        return encode_state(state)

    def with_more(raw: bytes) -> bytes:
        return encode_state(decode_state(raw, step="test") | {"backdoor": torch.zeros(1)})

    def over_the_front(raw: bytes) -> bytes:
        return encode_state(decode_state(raw, step="test") | {"0.conv.bias": torch.zeros(4)})

    for edit in (without, with_more, over_the_front):
        receiving_.refused(IntegrityError, "release.mismatch", center=edit)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_our_sealed_part_is_refused_when_it_was_touched(receiving_: Receiving, at: int) -> None:
    edits: dict[str, Edit] = {"release/alpha": flipped(at)}
    receiving_.refused(IntegrityError, "sealed.not-authentic", **edits)
    edits = {"suspicion/alpha": flipped(at)}
    receiving_.refused(IntegrityError, "sealed.not-authentic", **edits)


def test_another_partys_part_is_not_ours(receiving_: Receiving) -> None:
    other = receiving_.world.released["beta"]
    edits: dict[str, Edit] = {"release/alpha": lambda _: other}
    receiving_.refused(IntegrityError, "sealed.not-authentic", **edits)


def test_a_part_of_another_run_or_kind_is_not_this_runs(receiving_: Receiving) -> None:
    part = ReleasedPart(model=receiving_.model, weights=b"")
    for edit in (
        receiving_.sealed("release/v1", part, run="0" * 32),
        receiving_.sealed("suspicion/v1", part),
        receiving_.sealed("release/v1", part, key=bytes(32)),
    ):
        edits = {"release/alpha": edit}
        receiving_.refused(IntegrityError, "sealed.not-authentic", **edits)


def test_a_part_without_form_is_refused(receiving_: Receiving) -> None:
    edits = {"release/alpha": receiving_.sealed("release/v1", SuspicionReport(model=OTHER, scores={}))}
    receiving_.refused(IntegrityError, "sealed.malformed", **edits)


def test_a_part_of_another_model_is_refused(receiving_: Receiving) -> None:
    edits = {"release/alpha": receiving_.sealed("release/v1", ReleasedPart(model=OTHER, weights=b""))}
    receiving_.refused(IntegrityError, "release.mismatch", **edits)


def test_a_suspicion_report_of_another_model_is_refused(receiving_: Receiving) -> None:
    edits = {"suspicion/alpha": receiving_.sealed("suspicion/v1", SuspicionReport(model=OTHER, scores={}))}
    receiving_.refused(IntegrityError, "release.mismatch", **edits)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("release.json", {"model": OTHER}),
        ("release.json", {"manifest": OTHER}),
        ("release.json", {"run": "0" * 32}),
        ("suspicion.json", {"model": OTHER}),
        ("suspicion.json", {"run": "0" * 32}),
    ],
)
def test_statements_of_another_model_or_run_are_refused(
    receiving_: Receiving, name: str, changes: dict[str, Any]
) -> None:
    kind, type_ = {"release.json": ("model", ModelStatement), "suspicion.json": ("linked-model", LinkedModel)}[name]
    honest = receiving_.world.statement(kind, type_)
    edits = {name: receiving_.signed(kind, msgspec.structs.replace(honest, **changes))}
    receiving_.refused(IntegrityError, "release.mismatch", **edits)


def test_statements_of_somebody_else_are_refused(receiving_: Receiving) -> None:
    for name, kind, type_ in (
        ("release.json", "model", ModelStatement),
        ("suspicion.json", "linked-model", LinkedModel),
    ):
        honest = receiving_.world.statement(kind, type_)
        for edit in (
            receiving_.signed(kind, honest, signer=SigningKey()),
            receiving_.signed("trace", honest),
        ):
            edits = {name: edit}
            receiving_.refused(IntegrityError, "signature.invalid", **edits)


CHAINS: dict[str, tuple[Edit, type[CaltrainError], str]] = {
    "without its first event": (chain_edit(lambda lines: lines[1:]), LineageError, "chain.broken"),
    "without one in the middle": (chain_edit(lambda lines: lines[:3] + lines[4:]), LineageError, "chain.broken"),
    "with two exchanged": (chain_edit(lambda lines: [lines[1], lines[0], *lines[2:]]), LineageError, "chain.broken"),
    "with one twice": (chain_edit(lambda lines: [*lines, lines[-1]]), LineageError, "chain.broken"),
    "cut before the link": (
        chain_edit(lambda lines: list(itertools.takewhile(lambda line: b"link" not in payload(line), lines))),
        IntegrityError,
        "release.mismatch",
    ),
    "empty": (lambda _: b"", IntegrityError, "release.mismatch"),
    "cut inside a line": (lambda raw: raw[:-20], IntegrityError, "release.mismatch"),
    "not of lines": (lambda raw: raw.replace(b"\n", b" "), IntegrityError, "release.mismatch"),
}


def payload(line: bytes) -> bytes:
    """What an event says."""
    return base64.b64decode(msgspec.json.decode(line)["payload"])


@pytest.mark.parametrize("what", CHAINS)
def test_a_chain_that_is_not_whole_is_refused(receiving_: Receiving, what: str) -> None:
    edit, family, code = CHAINS[what]
    edits = {"chain.jsonl": edit}
    receiving_.refused(family, code, **edits)


def test_a_chain_of_another_enclave_is_refused(receiving_: Receiving) -> None:
    chain = Chain(SigningKey(), run=receiving_.world.manifest.run)
    line = msgspec.json.encode(chain.append("link", {"model": receiving_.model}))
    edits: dict[str, Edit] = {"chain.jsonl": lambda _: line}
    receiving_.refused(IntegrityError, "signature.invalid", **edits)


def test_a_chain_that_links_another_model_is_refused(receiving_: Receiving) -> None:
    chain = Chain(receiving_.world.run.vault.signing, run=receiving_.world.manifest.run)
    line = msgspec.json.encode(chain.append("link", {"model": OTHER}))
    edits: dict[str, Edit] = {"chain.jsonl": lambda _: line}
    receiving_.refused(IntegrityError, "release.mismatch", **edits)


def test_a_chain_without_end_is_not_read(receiving_: Receiving, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(receiving, "MAX_EVENTS", 3)
        receiving_.refused(IntegrityError, "release.mismatch")
    monkeypatch.setattr(receiving, "MAX_CHAIN_BYTES", 100)
    receiving_.refused(ProtocolError, "host.garbage")


@pytest.mark.parametrize(
    "name", ["release/alpha", "release.json", "suspicion.json", "center", "suspicion/alpha", "chain.jsonl"]
)
def test_an_artifact_that_is_not_there_leaves_nothing(receiving_: Receiving, name: str) -> None:
    edits: dict[str, Edit] = {name: lambda _: httpx.Response(404, content=b"")}
    receiving_.refused(ProtocolError, "host.garbage", **edits)


def test_a_disk_that_runs_full_leaves_nothing_of_the_run(receiving_: Receiving) -> None:
    with files_end_at(1000):
        receiving_.refused(EnvironmentFault, "party.not-written")
    receiving_.receive()


def test_a_disk_that_runs_full_later_leaves_the_run_that_was_kept(receiving_: Receiving) -> None:
    receiving_.receive()
    kept = tree(receiving_.alpha.folder)
    with files_end_at(1000), refused(EnvironmentFault, "party.not-written"):
        receiving_.receive()
    assert tree(receiving_.alpha.folder) == kept
