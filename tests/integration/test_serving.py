"""A served model over real processes and HTTP: owner, user, a killed enclave, another package, the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy, verify_evidence
from caltrain.boundary.sealed import open_for, seal_message, transcript_digest
from caltrain.crypto.dsse import Envelope
from caltrain.exposure.subject import Subject, subject_of
from caltrain.models.layers import Conv, Flatten, Linear, MaxPool
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import state_of
from caltrain.owner.package import package_key
from caltrain.records.schema import DataSchema
from caltrain.serving.oip import pack_sealed
from caltrain.serving.package import Package, PackageKey, open_package
from caltrain.serving.session import SessionOpened, SessionRequest, SessionSecret
from caltrain.training.batches import normalise
from support.processes import descendants, living, wait_until
from support.samples import signer
from support.served import DATA_KEY, Records, User, tiny_package, tiny_terms
from support.serving_host import error_of, sealed_of

pytestmark = pytest.mark.processes
SHAPE = (1, 28, 28)
SPEC = ModelSpec(
    layers=(Conv(filters=8, batch_norm=True), MaxPool(), Conv(filters=8, batch_norm=True), Flatten(), Linear(units=10))
)
PROGRAM = """
import socket, sys
from pathlib import Path
from caltrain.crypto.dsse import SigningKey
from caltrain.host.serving.server import serve
sock = socket.socket(fileno=int(sys.argv[1]))
serve([Path(sys.argv[3])], root=SigningKey(bytes.fromhex(sys.argv[2])), sock=sock, threads=1)
"""


def subject() -> Subject:
    """A small model of MNIST's form with random weights."""
    torch.manual_seed(5)
    data = DataSchema(shape=SHAPE, classes=tuple("abcdefghij"))
    return subject_of(SPEC, data, state_of(build(SPEC, input_shape=SHAPE)))


def pictures(count: int, *, seed: int = 0) -> Records:
    """Distinct random records."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.uint8)


class Program:
    """The host program, its owner and its user una."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.subject, self.folder = subject(), folder
        self.package(revision=1, head=1)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        self.log = log
        argv = [sys.executable, "-c", PROGRAM, str(sock.fileno()), signer("root").private_bytes().hex(), str(folder)]
        with sock, log.open("wb") as errors:
            self.process = subprocess.Popen(argv, pass_fds=(sock.fileno(),), stdout=errors, stderr=errors)
            self.http = httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=60)

    def package(self, *, revision: int, head: int) -> None:
        """Put a package of the model into the folder."""
        terms = tiny_terms(
            budget=1000, rows=16, fixed=True, head=head, revision=revision, measurement=measure_enclave()
        )
        tiny_package(self.folder, self.subject, terms)

    def ready(self, version: int = 1) -> tuple[int, str]:
        """What the model says of itself."""
        try:
            got = self.http.get(f"/v2/models/tiny/versions/{version}/ready")
        except httpx.HTTPError:
            return 0, ""
        return (200, "") if got.status_code == 200 else error_of(got)

    def attest(self, version: int) -> tuple[EvidenceBundle, Package]:
        """Verified evidence, and the owner's package."""
        nonce = os.urandom(32).hex()
        got = self.http.get("/attestation", params={"nonce": nonce, "model": "tiny", "version": str(version)})
        assert got.status_code == 200, got.text
        bundle = msgspec.convert(got.json()["bundle"], EvidenceBundle)
        package = open_package(msgspec.convert(got.json()["package"], Envelope), signer("owner").public)
        trusted = package.terms.measurement
        policy = Policy(measurements=(trusted,), allow_simulated=True, simulated_roots=(signer("root").public,))
        verify_evidence(bundle, policy, purpose="serving", plan=package.digest(), nonce=nonce, now=datetime.now(UTC))
        return bundle, package

    def grant(self, version: int = 1) -> None:
        """The owner hands over the key as soon as the enclave waits for it."""
        wait_until(lambda: self.ready(version) == (503, "serving.no-key"), seconds=60)
        bundle, package = self.attest(version)
        secret = PackageKey(key=package_key(DATA_KEY, package.id))
        sealed = seal_message("grant", secret, binding=bundle.binding, sender="owner", signer=signer("owner"))
        place = f"/v2/models/tiny/versions/{version}/grant"
        assert self.http.post(place, content=msgspec.json.encode(sealed)).status_code == 200
        assert self.ready(version) == (200, "")

    def session(self, version: int = 1) -> User:
        """A session of una's."""
        key, (bundle, package) = os.urandom(32), self.attest(version)
        sealed = seal_message(
            "session", SessionSecret(key=key), binding=bundle.binding, sender="una", signer=signer("una")
        )
        got = self.http.post("/v2/models/tiny/sessions", content=msgspec.json.encode(SessionRequest(envelope=sealed)))
        assert got.status_code == 200, got.text
        context = transcript_digest(bundle.binding, "una")
        opened = open_for(key, "session-opened/v1", got.content, SessionOpened, context=context, step="open")
        return User(opened, key, package)

    def infer(self, frame: bytes) -> httpx.Response:
        """Send a sealed request."""
        body, headers = pack_sealed(frame)
        return self.http.post("/v2/models/tiny/infer", content=body, headers=headers)

    def expected(self, records: Records) -> torch.Tensor:
        """The unsplit model's own bits in a batch of sixteen."""
        padded = np.zeros((16, *SHAPE), np.uint8)
        padded[: len(records)] = records
        with torch.inference_mode():
            logits: torch.Tensor = self.subject.module(
                normalise(torch.from_numpy(padded), self.subject.data, channels_last=True)
            )
            return logits.softmax(1)[: len(records)]


@pytest.fixture(name="program")
def _program(tmp_path: Path) -> Iterator[Program]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    program = Program(tmp_path / "package", tmp_path / "log")
    yield program
    torch.set_num_threads(threads)
    program.http.close()
    if program.process.poll() is None:
        program.process.kill()
        program.process.wait()


def test_attest_grant_ask_survive_a_kill_take_up_a_new_package_and_end(program: Program) -> None:
    program.grant()
    una, records = program.session(), pictures(3)
    assert torch.equal(una.table(sealed_of(program.infer(una.seal(records)))), program.expected(records))

    enclaves = descendants(program.process.pid)
    for enclave in enclaves:
        os.kill(enclave.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(living, enclaves)))
    status, code = error_of(program.infer(una.seal(records)))
    assert status == 503
    assert code in {"serving.restarted", "serving.starting", "serving.no-key"}
    program.grant()
    assert error_of(program.infer(una.seal(records))) == (409, "session.unknown")
    una = program.session()
    assert torch.equal(una.table(sealed_of(program.infer(una.seal(records)))), program.expected(records))

    program.package(revision=2, head=0)
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: program.ready(2)[0] == 503, seconds=60)
    una.table(sealed_of(program.infer(una.seal(records))))
    program.grant(2)
    assert program.ready(1) == (503, "serving.draining")
    una.table(sealed_of(program.infer(una.seal(records))))
    two = program.session(2)
    assert torch.equal(two.table(sealed_of(program.infer(two.seal(records)))), program.expected(records))

    enclaves = descendants(program.process.pid)
    assert enclaves
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(60) == -signal.SIGTERM
    wait_until(lambda: not any(map(living, enclaves)))
    for secret in (records[0].tobytes(), b"abcdefghij", DATA_KEY):
        assert secret not in program.log.read_bytes()
