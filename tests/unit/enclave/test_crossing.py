"""What crosses, by phase and form: exactly what docs/crossing.md lists, and nothing that must stay inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.tensors import Role
from caltrain.enclave.run import State
from caltrain.models.layers import Conv, Flatten, Linear, Shortcut
from caltrain.models.spec import ModelSpec, Partition, cut_shapes
from caltrain.plan import Plan
from caltrain.provenance.chain import EventKind
from caltrain.training.spec import Augment
from caltrain.training.zone import Zone
from support.tiny import CLASSES, pictures
from support.watched import Seen, Watched, failure, life, object_of, repair
from support.world import World

DOCUMENT = Path(__file__).parents[3] / "docs" / "crossing.md"
FORMS = {"two-way": 0, "ternary": 2}

BOTH: dict[str, str] = {
    "agreement": "answer bundle, answer signed, event plan, event approval, event provision, event manifest, "
    "event countersignature",
    "ingest": "read shards, write pool, write held-out, tell ingest, answer ignored, answer center_seed, answer at, "
    "answer front, event ingest, read quarantine, event repair",
    "assessment": "ask commit, ask show, read center-state, read pool, answer signed, answer sealed, answer due, "
    "answer state, event assess, event vote",
    "training": "read pool, write pool, read pool-cells, write pool-cells, tensor ir, tensor ir-grad, tell train, "
    "ask commit, answer loss, answer at, answer front, answer state, event epoch",
    "measuring": "read held-out, write held-out, tensor eval-ir, tensor eval-out, tell measure, answer held_out",
    "audit": "ask show, read center-state, event audit",
    "checkpoint": "write checkpoint, event checkpoint",
    "cut": "ask commit, ask show, read center-state, write center-moved, answer at, answer front, event cut",
    "resume": "read checkpoint, read chain.jsonl, answer at, answer center_seed, answer front, answer state, "
    "event resume",
    "hunt": "ask commit, ask show, read center-state, read pool, tell hunt, answer sealed, event hunt",
    "release": "answer sealed, answer signed, event release",
    "link": "read held-out, write linkage, read linkage, answer signed, event link",
    "questions": "answer sealed, read pool, event query, event disclosure",
    "failure": "answer error, event stopped",
}
OWN: dict[str, dict[str, str]] = {
    "two-way": {"training": "tensor labels, tensor loss"},
    "ternary": {"training": "tensor center-out, tensor center-grad"},
}
BODIES: dict[EventKind, set[str]] = {
    "plan": {"plan", "form", "simulated"},
    "approval": {"party"},
    "provision": {"party", "key_id", "shards"},
    "manifest": {"manifest", "records"},
    "countersignature": {"party"},
    "repair": {"run", "model", "quarantine", "records", "without"},
    "ingest": {"records", "ignored"},
    "epoch": {"epoch", "loss", "records", "held_out", "top1", "top2"},
    "assess": {"epoch", "front", "model", "least", "statement"},
    "vote": {"party", "epoch", "front", "report"},
    "cut": {"epoch", "before", "front"},
    "audit": {"rate", "runs", "repeated"},
    "checkpoint": {"state", "sealed", "size", "epoch", "step", "front", "center"},
    "resume": {"at", "parties"},
    "stopped": {"state", "code"},
    "hunt": {"model", "records", "scans"},
    "release": {"model", "audit_rate", "seed_revealed"},
    "link": {"model", "records", "statement"},
    "query": {"user", "kind", "inputs", "model", "answer"},
    "disclosure": {"party", "commitment"},
}
Names = dict[str, set[str]]


def listed(form: str) -> Names:
    """By phase, what is to cross in a form."""
    own = OWN[form]
    return {
        phase: set(f"{names}, {own[phase]}".split(", ") if phase in own else names.split(", "))
        for phase, names in BOTH.items()
    }


def observed(form: str) -> list[Seen]:
    """What crossed in a whole life of a run, where a repair begins, and in a run that stopped."""
    stopped = [seen for seen in failure(FORMS[form]).seen if seen.phase == "failure"]
    return life(FORMS[form]).seen + repair(FORMS[form]).seen + stopped


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_exactly_what_is_listed_crosses(form: str) -> None:
    crossed: Names = {}
    for seen in observed(form):
        crossed.setdefault(seen.phase, set()).add(seen.name)
    assert crossed == listed(form)


def document_rows() -> list[tuple[str, str, str]]:
    """(phase, form, what crosses) of each row of the document's table."""
    table = DOCUMENT.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([\w -]+) \| (.+?) \| .+ \|$", table, re.MULTILINE)
    assert len(rows) == table.count("\n| ") > 20, "a row has another form"
    return [(phase, form, cell) for phase, form, cell in rows if phase != "phase"]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`((?:tensor|read|write|ask|tell|answer|event) [\w.-]+)`", cell)


@pytest.mark.parametrize("form", FORMS)
def test_the_document_lists_the_same(form: str) -> None:
    in_document: list[tuple[str, str]] = []
    for phase, of, cell in document_rows():
        assert of in {"both", *FORMS}
        assert names_in(cell), f"a row of {phase} names nothing that a test sees"
        in_document += [(phase, name) for name in names_in(cell) if of in {"both", form}]
    assert len(set(in_document)) == len(in_document), "something is listed twice"
    assert set(in_document) == {(phase, name) for phase, names in listed(form).items() for name in names}


def test_nothing_that_can_cross_is_missing_from_the_table() -> None:
    """A role, event or field of a reply that is added has to be listed here, and so in the document, first."""
    every = {name for form in FORMS for names in listed(form).values() for name in names}
    assert {name.removeprefix("tensor ") for name in every if name.startswith("tensor ")} == set(get_args(Role))
    assert {name.removeprefix("event ") for name in every if name.startswith("event ")} == set(get_args(EventKind))
    fields = {name.removeprefix("answer ") for name in every if name.startswith("answer ")}
    assert fields == {*m.Done.__struct_fields__, "error"} - {"events"}


@pytest.mark.parametrize("form", FORMS)
def test_events_hold_what_the_document_says(form: str) -> None:
    held: dict[str, set[str]] = {}
    for seen in observed(form):
        if seen.body is not None:
            held.setdefault(seen.name.removeprefix("event "), set()).update(seen.body)
    assert held == BODIES
    in_document = [found for _, _, cell in document_rows() for found in re.findall(r"`event (\w+)` \(([^)]*)\)", cell)]
    assert {kind: set(re.findall(r"`(\w+)`", fields)) for kind, fields in in_document} == BODIES


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_with_the_host_came_over_the_door_or_is_its_own(form: str) -> None:
    world = life(FORMS[form])
    written = {seen.name.removeprefix("write ") for seen in world.seen if seen.name.startswith("write ")}
    own = {"shards", "chain.jsonl", "center", "center-at", "center-state"}
    assert {object_of(name) for name in world.host.storage} == written | own


# --- what is in the tensors --------------------------------------------------------------------------------------


def residual(plan: Plan) -> Plan:
    """A model where two tensors are live at the first cut."""
    layers = (Conv(filters=4), Conv(filters=4), Conv(filters=4), Shortcut(source=0), Flatten(), Linear(units=3))
    partition = Partition(front=2, head=min(plan.partition.head, 1))
    return msgspec.structs.replace(plan, model=ModelSpec(layers=layers), partition=partition)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [lambda plan: plan, residual], ids=["one tensor live", "two"])
def test_tensors_have_the_shapes_of_the_cuts(form: str, change: Callable[[Plan], Plan]) -> None:
    world = Watched(head=FORMS[form], held_out=1, change=change)
    world.run_to(State.TRAINED)
    plan, head = world.plan, world.plan.partition.head
    front = cut_shapes(plan.model, plan.partition.front, plan.data.shape)
    back = cut_shapes(plan.model, len(plan.model.layers) - head, plan.data.shape)
    assert len(front) == (2 if change is residual else 1)
    per_record = {
        "ir": front,
        "ir-grad": front,
        "eval-ir": front,
        "eval-out": back,
        "center-out": back,
        "center-grad": back,
    }
    fixed: dict[str, list[tuple[int, ...]]] = {"labels": [(plan.training.batch,)], "loss": [(1,)]}
    tensors = [seen for seen in world.seen if seen.tensors]
    assert len(tensors) > 10
    for seen in tensors:
        role = seen.name.removeprefix("tensor ")
        records = 4 if role.startswith("eval") else plan.training.batch
        due = fixed.get(role) or [(records, *shape) for shape in per_record[role]]
        assert [tuple(x.shape) for x in seen.tensors] == due, role
        assert {x.dtype for x in seen.tensors} == {torch.int64 if role == "labels" else torch.float32}


class Secrets:
    """What the enclave computes with and must not let out, step by step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.records: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        forward, backward = Zone.forward, Zone.backward_from_labels

        def watched_forward(zone: Zone, live: list[Tensor], **more: object) -> object:
            if zone.module.part.start == 0:
                self.records += [x.clone() for x in live]
            return forward(zone, live, **more)  # type: ignore[arg-type]

        def watched_backward(zone: Zone, labels: Tensor, **more: object) -> object:
            self.logits.append(zone._outputs[0].detach().clone())
            self.labels.append(labels.clone())
            return backward(zone, labels, **more)  # type: ignore[arg-type]

        patch.setattr(Zone, "forward", watched_forward)
        patch.setattr(Zone, "backward_from_labels", watched_backward)

    def needles(self) -> dict[str, list[bytes]]:
        """Byte strings to search for: a record's elements, its logits, and the labels of a batch in each type."""
        rows = {"record": self.records, "logits": self.logits}
        found = {name: [row.contiguous().numpy().tobytes() for x in xs for row in x] for name, xs in rows.items()}
        found["labels"] = [
            x.to(kind).numpy().tobytes() for x in self.labels for kind in (torch.int64, torch.float32, torch.uint8)
        ]
        return found


def leaks(seen: list[Seen], secrets: Secrets) -> set[tuple[str, str]]:
    """(secret, name) for everything of a secret that is in a tensor that crossed, whatever its memory layout."""
    return {
        (secret, crossing.name)
        for crossing in seen
        for x in crossing.tensors
        for raw in (x.contiguous().numpy().tobytes(),)
        for secret, needles in secrets.needles().items()
        if any(needle in raw for needle in needles)
    }


def unsafe(plan: Plan) -> Plan:
    """No FrontNet: the records themselves go out."""
    partition = Partition(front=0, head=plan.partition.head, unsafe_cut_at_input=True)
    return msgspec.structs.replace(plan, partition=partition)


def trained(
    head: int, patch: pytest.MonkeyPatch, change: Callable[[Plan], Plan] = lambda plan: plan
) -> set[tuple[str, str]]:
    secrets, world = Secrets(patch), Watched(head=head, held_out=1, change=change)
    world.run_to(State.TRAINED)
    assert len(secrets.labels) == 4
    assert len(secrets.records) >= (0 if change is unsafe else 4)
    return leaks(world.seen, secrets)


def test_no_label_logit_or_record_is_in_a_tensor_of_the_ternary_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(2, monkeypatch) == set()


def test_the_search_finds_the_labels_of_the_two_way_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(0, monkeypatch) == {("labels", "tensor labels")}


def test_the_search_finds_records_and_logits_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, world = Secrets(monkeypatch), Watched(head=2).run_to(State.TRAINED)
    assert isinstance(world, Watched)
    for secret, x in (("record", secrets.records[1].flip(0)), ("logits", secrets.logits[1].flip(0))):
        assert (secret, "tensor ir") in leaks([Seen("training", "tensor ir", tensors=(x,))], secrets)


# --- what depends on the labels ----------------------------------------------------------------------------------


def plain_pictures(plan: Plan) -> Plan:
    """Without dropout's neighbour, augmentation: nothing but the labels differs between two worlds."""
    return msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, augment=Augment()))


def relabelled(head: int, shift: int) -> Watched:
    """A trained world whose labels are moved on by `shift` classes: same records, same run seed."""
    world = Watched(head=head, change=plain_pictures)
    for seed, party in enumerate(world.parties.values()):
        labels = np.random.default_rng(seed).integers(0, len(CLASSES), 9)
        party.shards.clear()
        moved = [int(label + shift) % len(CLASSES) for label in labels]
        party.seal(world.plan.data, pictures(9, seed=seed), moved, shard_records=5)
    world.run_to(State.TRAINED)
    return world


def first_step(world: World) -> dict[str, tuple[Tensor, ...]]:
    assert isinstance(world, Watched)
    first: dict[str, tuple[Tensor, ...]] = {}
    for seen in world.seen:
        if seen.tensors:
            first.setdefault(seen.name.removeprefix("tensor "), seen.tensors)
    return first


def differing(one: World, other: World) -> set[str]:
    mine, theirs = first_step(one), first_step(other)
    assert mine.keys() == theirs.keys()
    return {role for role in mine if not all(torch.equal(a, b) for a, b in zip(mine[role], theirs[role], strict=True))}


def test_two_batches_that_differ_in_labels_only_are_alike_up_to_the_heads_gradient() -> None:
    assert differing(relabelled(2, 0), relabelled(2, 0)) == set(), "the run itself is repeatable"
    assert differing(relabelled(2, 0), relabelled(2, 1)) == {"center-grad", "ir-grad"}
    assert differing(relabelled(0, 0), relabelled(0, 1)) == {"labels", "loss", "ir-grad"}


@pytest.mark.parametrize("form", FORMS)
def test_names_order_and_sizes_of_all_that_crosses_do_not_depend_on_the_labels(form: str) -> None:
    views = [[(s.phase, s.name, s.size) for s in relabelled(FORMS[form], shift).seen] for shift in (0, 1)]
    assert len(views[0]) > 50
    assert views[0] == views[1]
