"""A package that is served and asked about over real processes, of which everything that the host can see is kept.

The serving host is a process of its own, with the enclave program below it; the model's owner and a user work in this
process and reach the host over HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import open_for
from caltrain.client.served import Expectations, ServedModel, handshake
from caltrain.client.served.session import Prediction
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.kdf import derive
from caltrain.errors import CaltrainError
from caltrain.exposure.subject import Subject, subject_of
from caltrain.host_client import HostClient
from caltrain.models.layers import Linear
from caltrain.models.network import Network, zone_of
from caltrain.models.spec import ModelSpec, zone_ranges
from caltrain.models.weights import State, state_of
from caltrain.owner import package as packaging
from caltrain.owner.grant import await_enclave, grant
from caltrain.participant.identity import Identity, create_identity
from caltrain.records.schema import DataSchema
from caltrain.serving import session
from caltrain.serving.package import INSIDE, BatchSpec, InsidePart, Package, ServedUser, Terms
from caltrain.serving.precision import narrow, widen
from caltrain.serving.session import SessionSecret
from caltrain.training.batches import normalise
from support.canary_host import Haystack, TappedHost
from support.canary_run import MODEL as TRAINED
from support.canary_run import SHAPE, noisy_pictures, noted_secrets
from support.exposed import drawn
from support.tapped_host import Config

ROWS, BATCHES = 16, 3
NAME, USER = "canary", "una"
CLASSES = tuple(f"finding {sha256(bytes([number])).hexdigest()[:24]}" for number in range(16))
MODEL = ModelSpec(layers=(*TRAINED.layers[:-1], Linear(units=len(CLASSES))))
DATA = DataSchema(shape=SHAPE, classes=CLASSES, mean=(0.45,), std=(0.3,))
LAST = tuple(f"{len(MODEL.layers) - 1}.linear.{name}" for name in ("weight", "bias"))
PICTURES = noisy_pictures(ROWS * BATCHES, seed=11)[0]
_TRIES = 1500  # ten in a second


@dataclass(frozen=True)
class Batch:
    """One batch as it passes the zones: `x`, `logits` and `probabilities` stay inside, the others cross as they are."""

    x: Tensor
    ir: list[Tensor]
    out: list[Tensor]
    logits: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Scene:
    """A model, its owner, a user of it, and the package in the host's folder.

    `order`: which class each output of the center stands for; empty where they are in their own order.
    """

    folder: Path
    owner: Identity
    user: Identity
    subject: Subject
    package: Package
    order: tuple[int, ...]
    root: SigningKey = field(default_factory=SigningKey)

    @classmethod
    def make(cls, folder: Path, **terms: Any) -> Scene:
        """Everybody, and a package on these terms."""
        owner, user = (create_identity(folder / name, name) for name in ("owner", USER))
        subject = outspoken(drawn(MODEL, DATA, seed=3))
        path = folder / "host" / "package"
        package = packaging.package_model(
            subject, make_terms(user, **terms), signer=owner.signer, data_key=owner.data_key, folder=path
        )
        key = packaging.package_key(owner.data_key, package.id)
        sealed = (path / INSIDE).read_bytes()
        inside = open_for(key, "package-inside/v1", sealed, InsidePart, context=package.id, step="test")
        return cls(folder, owner, user, subject, package, inside.order)

    @property
    def policy(self) -> Policy:
        """What owner and user accept of an enclave."""
        trusted = (self.package.terms.measurement,)
        return Policy(measurements=trusted, allow_simulated=True, simulated_roots=(self.root.public,))

    @property
    def package_key(self) -> bytes:
        """What the enclave is given."""
        return packaging.package_key(self.owner.data_key, self.package.id)

    @cached_property
    def served(self) -> Subject:
        """The model as it is split: the last layer's outputs in the package's order."""
        state = dict(state_of(self.subject.module))
        for name in LAST if self.order else ():
            state[name] = state[name][list(self.order)]
        return subject_of(MODEL, DATA, state)

    def states(self) -> tuple[State, State, State]:
        """Weights of FrontNet, CenterNet and HeadNet."""
        front, center, head = (state_of(zone) for zone in self._zones())
        return front, center, head

    @torch.inference_mode()
    def batches(self) -> list[Batch]:
        """What enclave and host compute for `PICTURES`."""
        torch.set_num_threads(1)
        across, (front, center, head) = self.package.terms.across, self._zones()
        batches = []
        for pictures in torch.from_numpy(PICTURES).view(BATCHES, ROWS, *SHAPE):
            x = normalise(pictures, DATA, channels_last=True)
            ir = narrow([front(x)], across)
            out = narrow([center(*widen(ir, across))], across)
            (scores,) = widen(out, across)
            logits = head(scores) if len(head) else scores
            if self.order:
                logits = logits[:, torch.tensor(self.order).argsort()]
            batches.append(Batch(x, ir, out, logits, logits.softmax(1)))
        return batches

    def _zones(self) -> list[Network]:
        parts = zone_ranges(MODEL, self.package.terms.partition)
        return [zone_of(self.served.module, MODEL, part) for part in parts]

    def add_unsealed(self) -> tuple[int, ...]:
        """One more package beside the one that is served, by a writer that does not encrypt; its secret order."""
        parts = []

        def unsealed(_key: bytes, _domain: str, part: InsidePart, *, context: str) -> bytes:
            del context
            parts.append(part)
            return msgspec.msgpack.encode(part)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packaging, "seal_for", unsealed)
            packaging.package_model(
                self.subject,
                make_terms(self.user, mapped=True),
                signer=self.owner.signer,
                data_key=self.owner.data_key,
                folder=self.folder / "host" / "unsealed",
            )
        return parts[0].order


def make_terms(user: Identity, **terms: Any) -> Terms:
    """Terms under which this user may ask, and all batches are audited."""
    return Terms(
        name=NAME,
        front=3,
        audit=1.0,
        batch=BatchSpec(rows=ROWS),
        users=(ServedUser(name=USER, public_key=user.signer.public, budget=100),),
        measurement=measure_enclave(),
        **terms,
    )


def outspoken(subject: Subject) -> Subject:
    """The same model with scores that differ: for `PICTURES` each class has scores of mean 0 and deviation 2."""
    with torch.inference_mode():
        scores = subject.module(normalise(torch.from_numpy(PICTURES), DATA, channels_last=True))
    state, (weight, bias), scale = dict(state_of(subject.module)), LAST, 2 / scores.std(dim=0)
    state[weight] = state[weight] * scale[:, None]
    state[bias] = (state[bias] - scores.mean(dim=0)) * scale
    return subject_of(MODEL, DATA, state)


@dataclass(frozen=True)
class Outcome:
    """A service that was asked: what the host could see, what the user got, and what only they know.

    `session_keys`: of the one session, those of its two directions and the one that these come from.
    """

    scene: Scene
    answer: Prediction | CaltrainError
    session_keys: list[bytes]
    seen: list[Haystack]
    unreadable: set[str]


class Wire(httpx.BaseTransport):
    """HTTP to the host, both ways kept: heads and contents."""

    def __init__(self) -> None:
        self._inner = httpx.HTTPTransport()
        self.sent, self.got = bytearray(), bytearray()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass it on."""
        self.sent += f"{request.method} {request.url} {request.headers.multi_items()}\n".encode() + request.read()
        response = self._inner.handle_request(request)
        body = response.read()
        self.got += f"{response.status_code} {response.headers.multi_items()}\n".encode() + body
        return httpx.Response(response.status_code, headers=response.headers, content=body)

    def close(self) -> None:
        """End the connections."""
        self._inner.close()


def serve_and_ask(scene: Scene, *, moments: Sequence[str], enclave: Path | None = None) -> Outcome:
    """The owner grants, the user asks about `PICTURES`; seen at `moments` and at the end.

    Without moments all but the memory is seen. `enclave` runs in the enclave's place.
    """
    config = Config(
        folder=str(scene.folder / "host"),
        package=str(scene.folder / "host" / "package"),
        tap=str(scene.folder / "tap"),
        root=scene.root.private_bytes(),
        moments=tuple(moments),
        enclave=str(enclave or ""),
    )
    host, wire = TappedHost(config, log=scene.folder / "host.log"), Wire()
    try:
        _grant(host, scene, wire)
        with noted_secrets(handshake) as secrets, _noted_keys() as keys, ThreadPoolExecutor(1) as pool:
            (answer,) = host.at_each(moments, of=[pool.submit(_ask, host.url, scene, wire)])
        host.at_last(memory=bool(moments))
    finally:
        host.end()
    http = [Haystack("door", "http-in", bytes(wire.sent)), Haystack("door", "http-out", bytes(wire.got))]
    keys += [secret.key for _, secret in secrets if isinstance(secret, SessionSecret)]
    return Outcome(scene, answer, keys, [*host.seen, *http], host.memory.unreadable)


def _grant(host: TappedHost, scene: Scene, wire: Wire) -> None:
    """As the owner, hand over the key once the enclave waits for it."""

    def pause() -> None:
        assert host.process.poll() is None, "the host has ended"
        time.sleep(0.1)

    owner = scene.owner
    with HostClient(host.url, transport=wire) as client:
        await_enclave(client, scene.package, tries=_TRIES, pause=pause)
        grant(client, scene.package, scene.policy, signer=owner.signer, data_key=owner.data_key, clock=_now)


def _ask(url: str, scene: Scene, wire: Wire) -> Prediction | CaltrainError:
    """As the user, ask about `PICTURES`: what comes of it."""
    expected = Expectations(scene.owner.signer.public, scene.policy, USER, scene.user.signer)
    with ServedModel.connect(url, NAME, expected, clock=_now, transport=wire) as model:
        try:
            return model.predict(PICTURES)
        except CaltrainError as error:
            return error


@contextmanager
def _noted_keys() -> Iterator[list[bytes]]:
    """Note the keys that the user's end of a session derives."""
    noted: list[bytes] = []

    def noting(*of: Any) -> bytes:
        noted.append(derive(*of))
        return noted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "derive", noting)
        yield noted


def _now() -> datetime:
    return datetime.now(UTC)
