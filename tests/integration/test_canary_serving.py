"""What a user asks, what is answered, and what only the enclave has of a model are searched for in everything that a
serving host can see; nothing may be found.

Services are of real processes: one of the ternary form, in which the host sees no scores, and one of the two-way form
with the outputs in a secret order, in which it computes the scores and must not learn what they are of. What the
batches were inside is computed again; that its answers are the user's, bit for bit, is a test of its own. A service
that leaks on purpose shows that each search finds what there is to be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from caltrain.client.served.session import Prediction
from caltrain.errors import ProtocolError
from support import canary_needles as n
from support.canary_correlate import likeness, tensors_in
from support.canary_findings import Finding, findings
from support.canary_host import Place
from support.canary_replay import Step
from support.canary_search import LabelVector, Needle
from support.canary_serving import BATCHES, CLASSES, DATA, PICTURES, ROWS, Outcome, Scene, serve_and_ask

pytestmark = pytest.mark.processes

PLACES: tuple[Place, ...] = get_args(Place)
SECRET = ("question", "answer", "labels", "class", "weights", "secret")
TALKING_ENCLAVE = Path(__file__).parents[1] / "support" / "talking_serving_enclave.py"
MOMENTS = ("infer-1", "center-out-0-2")
MARKED = range(0, ROWS * BATCHES, 5)
FORMS: dict[str, dict[str, Any]] = {"ternary": {"head": 2}, "mapped": {"mapped": True, "across": "int8"}}
KNOWN = [
    *(("center weights", place) for place in ("memory", "disk", "door")),
    *((kind, place) for kind in ("ir", "center output", "root key") for place in ("memory", "door")),
]


class Examined:
    """A service, its batches computed again, and all that was found of it."""

    def __init__(self, outcome: Outcome, *, marked: range = MARKED, order: tuple[int, ...] = ()) -> None:
        self.outcome, self.scene, self.marked = outcome, outcome.scene, marked
        self.batches = self.scene.batches()
        self.front, self.center, self.head = self.scene.states()
        self.needles = [*self._secret(), *self._known()]
        self.found = findings(outcome.seen, needles=self.needles, vectors=self._vectors(self.scene.order or order))

    def _vectors(self, order: tuple[int, ...]) -> list[LabelVector]:
        """The predicted classes of each batch, and what the center's outputs stand for, both ways."""
        best = [batch.probabilities.argmax(1).numpy() for batch in self.batches]
        vectors = [LabelVector(f"predicted in batch {i}", labels, len(CLASSES)) for i, labels in enumerate(best)]
        orders = {"order": np.array(order), "places": np.argsort(order)} if order else {}
        return vectors + [LabelVector(name, each, len(CLASSES), least=len(CLASSES)) for name, each in orders.items()]

    def _secret(self) -> Iterator[Needle]:
        scene = self.scene
        yield from n.question_needles(DATA, torch.from_numpy(PICTURES[self.marked]))
        for number, batch in enumerate(self.batches):
            answers = {"probabilities": batch.probabilities, "logits": batch.logits}
            yield from n.tensor_needles("answer", {f"{name} of batch {number}": x for name, x in answers.items()})
        yield from n.tensor_needles("weights", {**self.front, **self.head})
        for name in CLASSES:
            yield from n.wrapped(Needle("class", name, name.encode()))
        keys = {"package key": scene.package_key}
        for who, person in (("owner", scene.owner), ("user", scene.user)):
            keys |= {f"data key of {who}": person.data_key, f"signing key of {who}": person.signer.private_bytes()}
        keys |= {f"session key {number}": key for number, key in enumerate(self.outcome.session_keys)}
        yield from n.secret_needles(keys)

    def _known(self) -> Iterator[Needle]:
        """What the host does hold: that it is found shows that the search looks where it should."""
        yield from n.tensor_needles("center weights", self.center, text=False)
        for batch in self.batches:
            for kind, tensors in (("ir", batch.ir), ("center output", batch.out)):
                for tensor in tensors:
                    yield from n.byte_needles(kind, kind, tensor)
        yield Needle("root key", "root key", self.scene.root.private_bytes())


@pytest.fixture(scope="module", params=FORMS)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """A service as it should be, in each form."""
    scene = Scene.make(tmp_path_factory.mktemp("service"), **FORMS[request.param])
    return Examined(serve_and_ask(scene, moments=MOMENTS))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """With an enclave that talks, and beside the package another one by a writer that does not encrypt."""
    scene = Scene.make(tmp_path_factory.mktemp("leaky"), **FORMS["ternary"])
    order = scene.add_unsealed()
    return Examined(serve_and_ask(scene, moments=(), enclave=TALKING_ENCLAVE), marked=range(3), order=order)


# --- the needles are true -------------------------------------------------------------------------------------------


def test_the_computed_answers_are_the_users_bit_for_bit(service: Examined) -> None:
    answer = service.outcome.answer
    assert isinstance(answer, Prediction)
    assert answer.audited
    computed = torch.cat([batch.probabilities for batch in service.batches])
    assert n.raw_bytes(computed.flatten()) == answer.probabilities.tobytes()
    assert set(answer.names) == set(CLASSES)
    assert all(len(np.unique(part)) >= 3 for part in np.split(answer.indices, BATCHES)), "labels can be searched for"


def test_everything_that_the_host_can_see_was_looked_at(service: Examined) -> None:
    seen = service.outcome.seen
    for moment in (*MOMENTS, "end"):
        assert sum(len(hay.data) for hay in seen if hay.place == "memory" and hay.name.startswith(moment)) > 10_000_000
    parts = ("center.safetensors", "inside.sealed", "package.json")
    assert {hay.name for hay in seen if hay.place == "disk"} == {f"{MOMENTS[0]}: package/{part}" for part in parts}
    assert [hay.name for hay in seen if hay.place == "log"] == ["standard error"]
    door = {hay.name: hay.data for hay in seen if hay.place == "door"}
    assert door.keys() == {"in", "out", "storage-in", "storage-out", "http-in", "http-out"}
    assert [head.role for head, _ in tensors_in(door["out"])] == BATCHES * ["ir"]
    assert [head.role for head, _ in tensors_in(door["in"])] == BATCHES * ["center-out"]
    assert door["http-in"].count(b"/infer [") == BATCHES
    assert len(service.outcome.session_keys) == 3
    assert all(name.startswith("[v") for name in service.outcome.unreadable), service.outcome.unreadable


@pytest.mark.parametrize(("kind", "place"), KNOWN)
def test_what_the_host_does_hold_is_found(service: Examined, kind: str, place: Place) -> None:
    assert any((f.kind, f.place) == (kind, place) for f in service.found)


# --- nothing is found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SECRET)
def test_the_host_sees_nothing_of(service: Examined, kind: str, place: Place) -> None:
    assert kind == "labels" or any(needle.kind == kind for needle in service.needles)
    assert [f for f in service.found if (f.kind, f.place) == (kind, place)] == []


def test_no_outgoing_channel_is_a_picture_of_its_record(service: Examined) -> None:
    (out,) = (hay.data for hay in service.outcome.seen if (hay.place, hay.name) == ("door", "out"))
    pictures, numbers = torch.from_numpy(PICTURES), torch.arange(len(PICTURES)).view(BATCHES, ROWS)
    steps = [
        Step(0, number, rows, torch.empty(0), pictures[rows], batch.x, batch.ir[0])
        for number, (rows, batch) in enumerate(zip(numbers, service.batches, strict=True))
    ]
    top = likeness(out, steps, plain=torch.cat([batch.x for batch in service.batches]), roles=("ir",))["ir"]
    print(f"greatest |r|: {top.r:.3f}, record {top.record}")  # noqa: T201
    assert not top.found, top


# --- what leaks is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "where", "kind", "form", "how"),
    [
        pytest.param("log", "standard error", "question", " hex", "as it is", id="debug print of hex"),
        pytest.param("log", "standard error", "question", " base64", "as it is", id="debug print of base64"),
        pytest.param("log", "standard error", "question", " u8", "decimals", id="debug print of a list"),
        pytest.param("log", "standard error", "class", "finding ", "as it is", id="debug print of predicted names"),
        pytest.param("log", "standard error", "weights", "0.conv.weight f32", "as it is", id="debug print of weights"),
        pytest.param("door", "out", "weights", "0.conv.weight f32", "as it is", id="weights sent"),
        pytest.param("door", "out", "secret", "package key hex", "as it is", id="package key sent"),
        pytest.param("door", "out", "question", " normalised f32", "inflated", id="deflated records sent"),
        pytest.param("door", "out", "answer", "probabilities of batch 0 f32", "as it is", id="answers in clear"),
        pytest.param("door", "out", "answer", "probabilities of batch 0 f16", "as it is", id="answers rounded"),
        pytest.param("door", "out", "labels", "batch 0 as <i8", "as it is", id="predicted classes sent"),
        pytest.param("door", "http-out", "answer", "batch 0 f32", "as it is", id="answers in clear to the user"),
        pytest.param("disk", ": unsealed/inside.sealed", "weights", "0.conv.weight f32", "as it is", id="no sealing"),
        pytest.param("disk", ": unsealed/inside.sealed", "class", "finding ", "as it is", id="no sealing of names"),
        pytest.param(
            "disk", ": unsealed/inside.sealed", "labels", "order as |u1", "as it is", id="no sealing of order"
        ),
    ],
)
def test_a_leak_is_found(leaky: Examined, place: Place, where: str, kind: str, form: str, how: str) -> None:
    def is_it(f: Finding) -> bool:
        return (f.place, f.kind, f.how) == (place, kind, how) and f.haystack.endswith(where) and form in f.what

    assert any(is_it(f) for f in leaky.found), {(f.place, f.haystack, f.kind, f.how, f.what) for f in leaky.found}


def test_an_answer_in_clear_is_none_to_the_user(leaky: Examined) -> None:
    answer = leaky.outcome.answer
    assert isinstance(answer, ProtocolError)
    assert answer.code == "answer.foreign"
