"""A serving host and its enclave in memory: real keys and evidence, a made-up model. Honest until told otherwise."""

from __future__ import annotations

import base64
import os
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.evidence import Binding, EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import SealedMessage, open_message, seal_for, transcript_digest
from caltrain.client.served import AsyncServedModel, Expectations, ServedModel
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import AccessError, CaltrainError, EnvironmentFault, ProtocolError
from caltrain.models.spec import ModelSpec
from caltrain.records.schema import DataSchema
from caltrain.serving.oip import LENGTH_HEADER, pack_sealed_reply, unpack_sealed
from caltrain.serving.package import BatchSpec, Package, ServedUser, Terms, UserCredential, user_of
from caltrain.serving.session import Answer, Offer, SessionKeys, SessionOpened, SessionRequest, SessionSecret, read_head
from support.samples import signer
from support.tiny import CLASSES, MEASUREMENT, MODEL, SHAPE

URL = "http://host.test"
OWNER, ROOT, USER = signer("model owner"), signer("served root"), signer("una")
Edit = Callable[[bytes], bytes | httpx.Response]


def package(
    *, dtype: str = "u8", budget: int = 100, named: bool = True, model: ModelSpec = MODEL, **terms: Any
) -> Package:
    """The owner's package of a tiny model, which names `una` and, with an issuer, whom that names."""
    given: dict[str, Any] = {
        "name": "tiny",
        "front": 2,
        "batch": BatchSpec(rows=4),
        "users": (ServedUser(name="una", public_key=USER.public, budget=budget),) if named else (),
        "issuer": signer("issuer").public,
        "measurement": MEASUREMENT,
    }
    classes = tuple(map(str, range(len(CLASSES))))
    return Package(
        id="0123456789abcdef" * 2,
        owner=OWNER.public,
        terms=Terms(**(given | terms)),
        model=digest("test-model", str(terms).encode()),
        spec=model,
        data=msgspec.convert({"shape": SHAPE, "dtype": dtype, "classes": classes}, DataSchema),
        inside=digest("test", b"inside"),
        center_weights=digest("test", b"center"),
    )


def expectations(**changes: Any) -> Expectations:
    """What `una` relies on."""
    given: dict[str, Any] = {
        "owner": OWNER.public,
        "policy": Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=(ROOT.public,)),
        "user": "una",
        "signer": USER,
    }
    return Expectations(**(given | changes))


def credential(of: Package, name: str = "cleo", *, issuer: str = "issuer") -> Envelope:
    """What the issuer signs for a user whom the package does not name."""
    user = ServedUser(name=name, public_key=signer(name).public, budget=5)
    return signer(issuer).sign("user-credential", UserCredential(package=of.digest(), user=user))


def probabilities_of(records: NDArray[np.generic]) -> NDArray[np.float32]:
    """What the made-up model says of records (N, C, H, W)."""
    total = records.reshape(len(records), -1).astype(np.float64) @ np.arange(1, records[0].size + 1)
    scores = np.exp(np.stack([np.cos(total), np.sin(total), np.zeros_like(total)], axis=1))
    found: NDArray[np.float32] = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
    return found


def busy(code: str = "serving.busy", *, after: str | None = "1", status: int = 503) -> httpx.Response:
    """The host asks to come again."""
    kind = AccessError if code == "session.busy" else ProtocolError if code == "session.unknown" else EnvironmentFault
    error = kind(code, "come again", step="test", fix="Wait.")
    return _failed(error, status=status, headers={"Retry-After": after} if after else {})


class ScriptedServed:
    """One package, one enclave at a time. What it is told to do wrong:

    `edit` changes answers by the last word of their path; `instead` are replies to the coming infer requests;
    `opened`, `answer` and `bound` change what the enclave seals and attests. `paths`, `frames` are what came.
    """

    def __init__(self, served: Package | None = None) -> None:
        self.edit: dict[str, Edit] = {}
        self.instead: deque[httpx.Response] = deque()
        self.opened: Callable[[SessionOpened], SessionOpened] = lambda opened: opened
        self.answer: Callable[[Answer], Answer] = lambda answer: answer
        self.bound: Callable[[Binding], Binding] = lambda binding: binding
        self.signer, self.root, self.measurement = OWNER, ROOT, MEASUREMENT
        self.paths: list[str] = []
        self.frames: list[bytes] = []
        self.answers: list[bytes] = []
        self.spent = 0
        self.package = served or package()
        self.restart()

    def restart(self, served: Package | None = None) -> None:
        """A new enclave with new keys, which knows no session."""
        self.package = served or self.package
        self.key, self.signing = HpkePrivateKey(), signer("enclave")
        self.bindings: dict[str, Binding] = {}
        self.sessions: dict[str, tuple[SessionKeys, ServedUser]] = {}

    def connect(self, **changes: Any) -> ServedModel:
        """A client that reaches this host and nothing else."""
        options = {name: changes.pop(name) for name in ("version", "patience") if name in changes}
        transport = httpx.MockTransport(self.handle)
        return ServedModel.connect(URL, "tiny", expectations(**changes), clock=now, transport=transport, **options)

    async def connect_async(self, **changes: Any) -> AsyncServedModel:
        """The same, for an event loop."""
        transport = httpx.MockTransport(self.handle)
        return await AsyncServedModel.connect(URL, "tiny", expectations(**changes), clock=now, transport=transport)

    @property
    def posts(self) -> list[str]:
        """What was sent to the enclave: last words of the paths."""
        return [path.rpartition("/")[2] for path in self.paths if path.rpartition("/")[2] in {"sessions", "infer"}]

    def offer(self, nonce: str) -> Offer:
        """The package and evidence for a nonce."""
        binding = self.bound(
            Binding(
                purpose="serving",
                encryption_key=self.key.public,
                signing_key=self.signing.public,
                plan=self.package.digest(),
                nonce=nonce,
            )
        )
        self.bindings[nonce] = binding
        evidence = SimulatedAttester(self.root, measurement=self.measurement).evidence(binding.report_data())
        bundle = EvidenceBundle(binding=binding, evidence=evidence)
        return Offer(package=self.signer.sign("package", self.package), bundle=bundle)

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        path = request.url.path
        self.paths.append(path)
        what = path.rpartition("/")[2]
        try:
            body, headers = self._answer(what, request)
        except CaltrainError as error:
            return _failed(error, status=409)
        if isinstance(body, httpx.Response):
            return body
        if what in self.edit:
            edited = self.edit[what](body)
            if isinstance(edited, httpx.Response):
                return edited
            body = edited
        return httpx.Response(200, content=body, headers=headers)

    def _answer(self, what: str, request: httpx.Request) -> tuple[bytes | httpx.Response, dict[str, str]]:
        match what:
            case "attestation":
                return msgspec.json.encode(self.offer(request.url.params["nonce"])), {}
            case "sessions":
                return self.open_session(msgspec.json.decode(request.read(), type=SessionRequest)), {}
            case "ready":
                return b"", {}
            case "infer":
                request_id, frame = unpack_sealed(request.read(), request.headers[LENGTH_HEADER])
                self.frames.append(frame)
                if self.instead:
                    return self.instead.popleft(), {}
                self.answers.append(self.infer(frame))
                return pack_sealed_reply("tiny", "1", request_id, self.answers[-1])
        raise AssertionError(f"no such request: {request}")

    def open_session(self, asked: SessionRequest) -> bytes:
        """What the enclave does with a user's sealed key."""
        message = msgspec.json.decode(_payload(asked.envelope), type=SealedMessage)
        user = user_of(self.package, message.sender, asked.credential)
        signed = open_envelope(asked.envelope, "session", user.public_key, SealedMessage, step="test")
        binding = self.bindings.pop(signed.nonce, None)
        if binding is None:
            raise ProtocolError("nonce.unknown", "no such nonce", step="test", fix="Attest again.")
        key = open_message(signed, SessionSecret, binding=binding, key=self.key, step="test").key
        session = os.urandom(16).hex()  # never that of an enclave before
        self.sessions[session] = (SessionKeys(key, package=self.package.digest(), session=session), user)
        opened = SessionOpened(session=session, classes=CLASSES, budget_left=user.budget - self.spent, simulated=True)
        context = transcript_digest(binding, user.name)
        return seal_for(key, "session-opened/v1", self.opened(opened), context=context)

    def infer(self, frame: bytes) -> bytes:
        """What the enclave does with a frame."""
        head = read_head(frame)
        if head.session not in self.sessions:
            raise ProtocolError("session.unknown", "no such session", step="test", fix="Attest again.")
        keys, user = self.sessions[head.session]
        data = self.package.data
        records = np.frombuffer(keys.open_request(frame, head), data.numpy_dtype).reshape(-1, *data.shape)
        if self.spent + len(records) > user.budget:
            raise AccessError("user.budget-spent", "nothing is left", step="test", fix="Ask the owner.")
        self.spent += len(records)
        probabilities = probabilities_of(records).tobytes()
        answer = Answer(audited=False, wrong=0, budget_left=user.budget - self.spent, probabilities=probabilities)
        return keys.seal_answer(head, self.answer(answer))


def now() -> datetime:
    """The clock of these tests."""
    return datetime(2026, 11, 1, tzinfo=UTC)


def _failed(error: CaltrainError, *, status: int, headers: dict[str, str] | None = None) -> httpx.Response:
    status = 429 if error.code in {"user.budget-spent", "session.busy"} else status
    body = {"error": str(error), "detail": error.diagnostics()}
    return httpx.Response(status, content=msgspec.json.encode(body), headers=headers)


def _payload(envelope: Envelope) -> bytes:
    return base64.b64decode(envelope.payload)
