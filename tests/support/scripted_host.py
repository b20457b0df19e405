"""A host for one party or user at a time, over HTTP without a socket: honest, until a test edits its answers.

host = ScriptedHost(world, joining="alpha")
host.edit["/v1/manifest"] = lambda body: body.replace(b"a", b"b")
with host.client() as client: ...
host.sent("POST")  # what was asked of it
"""

from __future__ import annotations

from collections.abc import Callable

import httpx
import msgspec

from caltrain.attestation.evidence import Nonce, Purpose
from caltrain.boundary import messages as m
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.run import State
from caltrain.errors import from_wire
from caltrain.host_client import HostClient, RunStatus
from caltrain.plan import check_approval
from support.folders import signed_manifest
from support.world import World

URL = "http://host.test"
Edit = Callable[[bytes], bytes | httpx.Response]


class ScriptedHost:
    """Plays the other parties by itself whenever `joining` has made its step. `requests` holds (method, path)."""

    def __init__(self, world: World, *, joining: str = "") -> None:
        self.world, self.joining = world, joining
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.edit: dict[str, Edit] = {}

    def client(self) -> HostClient:
        """A client that reaches this host and nothing else."""
        return HostClient(URL, transport=httpx.MockTransport(self.handle))

    def sent(self, method: str) -> list[str]:
        """Paths of the requests of a method."""
        return [path for made, path in self.requests if made == method]

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        path, body = request.url.path, request.read()
        self.requests.append((request.method, path))
        self.bodies.append(body)
        words = path.removeprefix("/v1/").split("/")
        answer = self._got(request, words) if request.method == "GET" else self._taken(words, body)
        if path not in self.edit:
            return httpx.Response(200, content=answer)
        edited = self.edit[path](answer)
        return edited if isinstance(edited, httpx.Response) else httpx.Response(200, content=edited)

    def _got(self, request: httpx.Request, words: list[str]) -> bytes:
        match words:
            case ["plan"]:
                return canonical_json(self.world.plan)
            case ["run"]:
                return msgspec.json.encode(RunStatus(phase=self.phase))
            case ["attestation"]:
                purpose, nonce = msgspec.convert(tuple(request.url.params.values()), tuple[Purpose, Nonce])
                return msgspec.json.encode(self._done(m.Attest(purpose, nonce)).bundle)
            case ["manifest"]:
                return msgspec.json.encode(signed_manifest(self.world))
            case ["artifacts", *name]:
                return self._artifact("/".join(name))
        raise AssertionError(f"no such request: {request}")

    def _taken(self, words: list[str], body: bytes) -> bytes:
        match words:
            case ["parties", party, "shards", shard]:
                self.world.host.storage[f"shards/{party}/{shard}"] = bytearray(body)
                return b"{}"
            case [_, name, what]:
                return self._posted(what, name, msgspec.json.decode(body, type=Envelope))
        raise AssertionError(f"no such request: {words}")

    def _posted(self, what: str, name: str, envelope: Envelope) -> bytes:
        match what:
            case "approval":
                check_approval(self.world.plan, name, envelope)
                self._done(self.world.configure())
            case "provision":
                return msgspec.json.encode(self._provisioned(m.Provision(name, envelope)))
            case "countersignature":
                self._countersigned(m.Countersign(name, envelope))
            case "query":
                return self._done(m.Query(name, envelope)).sealed[name]
            case "disclosure":
                self._done(m.RecordDisclosure(name, envelope))
        return b"{}"

    def _provisioned(self, message: m.Provision) -> Envelope | None:
        receipt = self._done(message).signed
        for other in self._others:
            self._done(self.world.provision(other))
        self._done(m.MakeManifest())
        return receipt

    def _countersigned(self, message: m.Countersign) -> None:
        self._done(message)
        for other in self._others:
            self._done(m.Countersign(other, self.world.parties[other].countersign(self.world.manifest)))
        self.world.run_to(State.LINKED)

    @property
    def _others(self) -> list[str]:
        return [name for name in self.world.parties if name != self.joining]

    def _done(self, message: m.Request) -> m.Done:
        reply = self.world.send(message)
        if isinstance(reply, m.Failed):
            raise from_wire(reply.error)
        assert isinstance(reply, m.Done)
        return reply

    @property
    def phase(self) -> str:
        """What the run's status says."""
        phases = {State.NEW: "approvals", State.ENROLLING: "provisioning", State.AGREEING: "countersignatures"}
        return phases.get(self.world.run.state, "linked")

    def _artifact(self, name: str) -> bytes:
        world = self.world
        what, _, party = name.partition("/")
        match what:
            case "center":
                return bytes(world.host.storage["center"])
            case "chain.jsonl":
                return b"".join(msgspec.json.encode(event) + b"\n" for event in world.events)
            case "release":
                return world.released[party]
            case "suspicion":
                return world.suspicion[party]
            case "countersignatures":
                member = world.parties[party.removesuffix(".json")]
                return msgspec.json.encode(member.countersign(world.manifest))
        statement = {"release.json": "model", "suspicion.json": "linked-model"}[name]
        return msgspec.json.encode(world.statements[statement])
