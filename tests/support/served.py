"""A tiny served package in one process: the real enclave loop in a thread, the test is its host, owner and users.

with served(tmp_path, head=2) as world:
    world.start()                                  # load, attest, grant
    una = world.session("una")
    admitted, ir = world.infer(0, [una.seal(world.pictures(3))])
    answered = world.give(0, world.center(ir))     # the CenterNet's real weights
    una.open(answered.answers[0])
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.attestation.evidence import Binding, EvidenceBundle
from caltrain.attestation.measurement import with_wheel
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary import serving as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import STORAGE_CALLS, Attest, Data, Failed, Read, Stop
from caltrain.boundary.sealed import open_for, seal_message, transcript_digest
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.enclave.serve import serving_main
from caltrain.errors import EnvironmentFault
from caltrain.exposure.subject import Subject, subject_of
from caltrain.models.network import Network, build, lay_out
from caltrain.models.spec import ModelSpec, zone_ranges
from caltrain.models.weights import decode_state, load_zone, state_of
from caltrain.models.wheel import Factory, no_wheel
from caltrain.owner.package import package_key, package_model
from caltrain.records.schema import DataSchema
from caltrain.serving.folder import PackageFolder, open_folder, part_digest
from caltrain.serving.package import BatchSpec, InsidePart, Package, PackageKey, ServedUser, Terms
from caltrain.serving.precision import narrow, widen
from caltrain.serving.session import Answer, SessionKeys, SessionOpened, SessionSecret
from caltrain.training.batches import normalise
from support.samples import signer
from support.tiny import CLASSES, MEASUREMENT, MODEL, SHAPE, Element

DATA_KEY = bytes(range(32))
USERS = ("una", "pat")
Records = NDArray[np.generic]


def tiny_subject(
    *,
    spec: ModelSpec = MODEL,
    dtype: Element = "u8",
    classes: tuple[str, ...] = CLASSES,
    seed: int = 7,
    factory: Factory = no_wheel,
) -> Subject:
    """A model with random weights and random statistics of its batch normalisations."""
    data = DataSchema(shape=SHAPE, dtype=dtype, classes=classes)
    generator = torch.Generator().manual_seed(seed)
    state = state_of(build(spec, input_shape=SHAPE, factory=factory))
    for name, value in state.items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            state[name] = drawn.abs() + 0.5 if name.endswith("running_var") else drawn
    return subject_of(spec, data, state, factory=factory)


def tiny_terms(*, budget: int = 100, rows: int = 4, fixed: bool = False, **changes: Any) -> Terms:
    """Terms of a tiny package, with two users."""
    users = tuple(ServedUser(name=name, public_key=signer(name).public, budget=budget) for name in USERS)
    fields: dict[str, Any] = {
        "name": "tiny",
        "front": 2,
        "users": users,
        "batch": BatchSpec(rows=rows, fixed=fixed),
        "measurement": MEASUREMENT,
    }
    return Terms(**(fields | changes))


def tiny_package(folder: Path, subject: Subject, terms: Terms, *, wheel: bytes = b"") -> PackageFolder:
    """The package of `signer("owner")`."""
    package_model(subject, terms, signer=signer("owner"), data_key=DATA_KEY, folder=folder, wheel=wheel)
    return open_folder(folder, signer("owner").public)


def opened_inside(package: PackageFolder) -> InsidePart:
    """What only owner and enclave can open."""
    identity = package.package.id
    key = package_key(DATA_KEY, identity)
    return open_for(key, "package-inside/v1", package.inside(), InsidePart, context=identity, step="test")


class User:
    """A user's end of a session."""

    def __init__(self, opened: SessionOpened, key: bytes, package: Package) -> None:
        self.opened = opened
        self.keys = SessionKeys(key, package=package.digest(), session=opened.session)
        self.sent: dict[int, int] = {}

    def seal(self, records: Records | bytes, *, lane: int = 0, number: int | None = None) -> bytes:
        """The next request of a lane."""
        raw = records if isinstance(records, bytes) else records.tobytes()
        self.sent[lane] = self.sent.get(lane, -1) + 1 if number is None else number
        return self.keys.seal_request(lane, self.sent[lane], raw)

    def open(self, answer: bytes, *, lane: int = 0, number: int | None = None) -> Answer:
        """The answer to the last request of a lane, or to that one."""
        return self.keys.open_answer(answer, lane, self.sent[lane] if number is None else number)

    def table(self, answer: bytes, **where: int) -> Tensor:
        """The probabilities of an answer (rows, classes)."""
        raw = self.open(answer, **where).probabilities
        return torch.from_numpy(np.frombuffer(raw, "<f4").copy()).reshape(-1, len(self.opened.classes))


class ServedWorld:
    """See the module."""

    def __init__(self, subject: Subject, opened: PackageFolder, *, wheel: bytes = b"") -> None:
        self.subject, self.opened, self.package = subject, opened, opened.package
        self.storage: dict[str, bytes] = {"inside.sealed": opened.inside(), "center.safetensors": opened.center()}
        self.reads: list[str] = []
        self.root = SigningKey()
        self.threads: list[threading.Thread] = []
        self.launch(wheel)

    def launch(self, wheel: bytes) -> None:
        """The enclave's loop and the host's store, each in a thread; the enclave was started with that wheel."""
        (self.sock, theirs), (ours, storage) = socket.socketpair(), socket.socketpair()
        self.channel = Channel(self.sock)
        said = with_wheel(MEASUREMENT, part_digest(wheel)) if wheel else MEASUREMENT
        attester = SimulatedAttester(self.root, measurement=said)
        ends = Channel(theirs), attester, Channel(storage), wheel
        self.threads = [
            threading.Thread(target=_serve_enclave, args=ends, daemon=True),
            threading.Thread(target=self.serve_storage, args=(Channel(ours),), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop the enclave, which must still be there to answer."""
        try:
            assert isinstance(self.ask(Stop()), m.Served)
        finally:
            self.channel.close()
            for thread in self.threads:
                thread.join(timeout=10)

    # -- the host ----------------------------------------------------------------------------------------------------

    def ask(self, message: m.ServingRequest) -> m.ServingReply:
        """One message, and its reply."""
        self.channel.send(message)
        return self.channel.receive(m.SERVING_REPLIES)

    def served(self, message: m.ServingRequest) -> m.Served:
        """A message that must succeed."""
        reply = self.ask(message)
        assert isinstance(reply, m.Served), reply
        return reply

    def refused(self, message: m.ServingRequest, code: str) -> dict[str, str]:
        """A message that must fail with `code`, and not for good."""
        reply = self.ask(message)
        assert isinstance(reply, Failed), reply
        assert (reply.error["code"], reply.fatal) == (code, False)
        return reply.error

    def infer(self, batch: int, frames: Sequence[bytes]) -> tuple[m.Admitted, tuple[Tensor, ...]]:
        """A batch; the IR that came, if it should."""
        admitted = self.ask(m.Infer(batch, tuple(frames)))
        assert isinstance(admitted, m.Admitted), admitted
        if not admitted.rows:
            return admitted, ()
        ir = self.channel.receive_tensors(
            role="ir", run=self.package.id, epoch=0, step=batch, or_message=m.SERVING_REPLIES
        )
        assert isinstance(ir, tuple), ir
        return admitted, ir

    def give(self, batch: int, out: Sequence[Tensor], **changes: Any) -> m.Answered:
        """The center's output for a batch."""
        head: dict[str, Any] = {"role": "center-out", "run": self.package.id, "epoch": 0, "step": batch}
        self.channel.send_tensors(out, **(head | changes))
        answered = self.channel.receive(m.SERVING_REPLIES)
        assert isinstance(answered, m.Answered), answered
        return answered

    def center(self, ir: Sequence[Tensor]) -> list[Tensor]:
        """What an honest center gives."""
        across, net = self.package.terms.across, self.center_net()
        with torch.inference_mode():
            return narrow(net.through(widen(ir, across))[0], across)

    def center_net(self) -> Network:
        """The CenterNet with the weights that the host has."""
        package = self.package
        layers = zone_ranges(package.spec, package.terms.partition)[1]
        net = build(package.spec, input_shape=package.data.shape, layers=layers, factory=self.subject.factory)
        load_zone(net, decode_state(self.opened.center(), step="test"), step="test")
        lay_out(net, channels_last=True)
        return net.eval()

    def predict(self, batch: int, *frames: bytes) -> dict[int, bytes]:
        """Sealed answers to requests that must all be admitted."""
        admitted, ir = self.infer(batch, frames)
        assert not admitted.refused
        answered = self.give(batch, self.center(ir))
        assert answered.error is None, answered.error
        return answered.answers

    def serve_storage(self, channel: Channel) -> None:
        """Give the enclave what it reads."""
        with contextlib.suppress(EnvironmentFault):
            while True:
                call = channel.receive(STORAGE_CALLS)
                assert isinstance(call, Read), call
                self.reads.append(call.name)
                channel.send(Data(self.storage[call.name][call.offset : call.offset + call.length]))
        channel.close()

    # -- owner and users ---------------------------------------------------------------------------------------------

    def start(self) -> ServedWorld:
        """To the point where users may come."""
        self.served(m.LoadPackage(self.opened.envelope))
        self.served(self.grant())
        return self

    def attest(self, nonce: str | None = None) -> EvidenceBundle:
        """Evidence for a fresh nonce."""
        bundle = self.served(Attest("serving", nonce or os.urandom(32).hex())).bundle
        assert bundle is not None
        return bundle

    def grant(self, binding: Binding | None = None, *, by: str = "owner", key: bytes | None = None) -> m.Grant:
        """The owner's key for the attested enclave."""
        secret = PackageKey(key=key or package_key(DATA_KEY, self.package.id))
        binding = binding or self.attest().binding
        return m.Grant(seal_message("grant", secret, binding=binding, sender="owner", signer=signer(by)))

    def demand(
        self, name: str, key: bytes, *, by: str | None = None, binding: Binding | None = None, **fields: Envelope
    ) -> tuple[m.OpenSession, str]:
        """A user's demand for a session, signed with the key of `by`; its transcript."""
        binding = binding or self.attest().binding
        envelope = seal_message(
            "session", SessionSecret(key=key), binding=binding, sender=name, signer=signer(by or name)
        )
        return m.OpenSession(envelope, **fields), transcript_digest(binding, name)

    def session(self, name: str, **how: Any) -> User:
        """A session of that user."""
        key = os.urandom(32)
        message, transcript = self.demand(name, key, **how)
        served = self.served(message)
        opened = open_for(
            key, "session-opened/v1", served.sealed, SessionOpened, context=transcript, step="open session"
        )
        assert served.session == opened.session
        return User(opened, key, self.package)

    # -- what is true ------------------------------------------------------------------------------------------------

    def pictures(self, count: int, *, seed: int = 0) -> Records:
        """Distinct random records."""
        values = np.random.default_rng(seed).integers(0, 256, (count, *self.package.data.shape))
        return values.astype(np.uint8) if self.package.data.dtype == "u8" else (values / 256).astype("<f4")

    def expected(self, records: Records, *, rows: int = 0) -> Tensor:
        """Probabilities of the unsplit model, computed in a batch of at least `rows` with zeros after the records."""
        padded = np.zeros((max(rows, len(records)), *records.shape[1:]), records.dtype)
        padded[: len(records)] = records
        with torch.inference_mode():
            x = normalise(torch.from_numpy(padded), self.package.data, channels_last=True)
            logits: Tensor = self.subject.module(x)
            return logits.softmax(1)[: len(records)]


def _serve_enclave(channel: Channel, attester: SimulatedAttester, storage: Channel, wheel: bytes) -> None:
    with contextlib.suppress(EnvironmentFault):
        serving_main(channel, attester, storage, wheel=wheel)
    channel.close()
    storage.close()


@contextlib.contextmanager
def served(
    folder: Path,
    *,
    subject: Subject | None = None,
    dtype: Element = "u8",
    wheel: bytes = b"",
    started_with: bytes | None = None,
    **terms: Any,
) -> Iterator[ServedWorld]:
    """A world of its own; at its end the enclave must still answer. `wheel` is the package's."""
    subject = subject or tiny_subject(dtype=dtype)
    opened = tiny_package(folder, subject, tiny_terms(**terms), wheel=wheel)
    world = ServedWorld(subject, opened, wheel=wheel if started_with is None else started_with)
    try:
        yield world
    finally:
        world.stop()
