"""A served package with stages of a wheel, and the program itself: behind its lock it serves as the loop does."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from caltrain.attestation.measurement import measure_enclave, with_wheel
from caltrain.boundary import serving as m
from caltrain.boundary.messages import Attest, Boot, Configure, Ready
from caltrain.crypto.digests import to_text
from caltrain.errors import EnvironmentFault
from caltrain.exposure.subject import Subject
from caltrain.host.confine import find_bubblewrap
from caltrain.host.launcher import end_program, start_program
from caltrain.models.layers import Conv, Flatten, Linear, Stage
from caltrain.models.spec import ModelSpec, Wheel
from caltrain.models.wheel import load_wheel
from support.served import ServedWorld, served, tiny_package, tiny_subject, tiny_terms
from support.tiny import CLASSES, MEASUREMENT

CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        return torch.relu(x + self.a(x))

def build(name):
    return Block()
"""


def packed(code: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        target.writestr("servedstages.py", code)
    return stream.getvalue()


RAW = packed(CODE)
WHEEL = Wheel(sha256=to_text(hashlib.sha256(RAW).digest()), factory="servedstages:build")
STAGE = Stage(name="block", shape=(4, 4, 4), weights=4 * 4 * 9 + 4)
MODEL = ModelSpec(layers=(Conv(filters=4), STAGE, STAGE, Flatten(), Linear(units=len(CLASSES))), wheel=WHEEL)


def staged() -> Subject:
    return tiny_subject(spec=MODEL, factory=load_wheel(RAW, WHEEL))


def test_stages_of_the_packages_wheel_are_served_and_audited(tmp_path: Path) -> None:
    named = with_wheel(MEASUREMENT, WHEEL.sha256)
    with served(
        tmp_path, subject=staged(), wheel=RAW, measurement=named, audit=1.0, head=1, rows=16, fixed=True
    ) as world:
        una = world.start().session("una")
        records = world.pictures(2)
        answer = world.predict(0, una.seal(records))[0]
        assert una.open(answer).audited
        assert torch.equal(una.table(answer), world.expected(records, rows=16))


def test_an_enclave_without_the_wheel_with_another_or_with_one_too_many_is_refused(tmp_path: Path) -> None:
    other = packed(CODE + "\n")
    with_other = with_wheel(MEASUREMENT, to_text(hashlib.sha256(other).digest()))
    for number, (wheel, started_with, measurement, code) in enumerate(
        (
            (RAW, b"", with_wheel(MEASUREMENT, WHEEL.sha256), "evidence.not-the-packages"),
            (RAW, b"", MEASUREMENT, "package.wheel-missing"),
            (RAW, other, with_other, "wheel.other-digest"),
            (b"", RAW, with_wheel(MEASUREMENT, WHEEL.sha256), "package.wheel-missing"),
        )
    ):
        subject = staged() if wheel else tiny_subject()
        with served(
            tmp_path / str(number), subject=subject, wheel=wheel, started_with=started_with, measurement=measurement
        ) as world:
            world.refused(m.LoadPackage(world.opened.envelope), code)
            world.refused(Attest("serving", "0" * 64), "session.not-now")


class Program(ServedWorld):
    """The world whose enclave is the real program."""

    process: subprocess.Popen[bytes]

    def launch(self, wheel: bytes) -> None:
        """Start it as the host does."""
        boot = Boot("simulated", self.root.private_bytes(), wheel, "serving")
        slot = self.package.slot_bytes
        self.process, self.channel, self.ready = start_program(
            boot, slot_bytes=slot, threads=1, log=sys.stderr.fileno(), serve=self.serve_storage
        )

    ready: Ready


@pytest.mark.skipif(find_bubblewrap().bwrap is None, reason="needs bubblewrap, as the host does")
def test_the_program_serves_behind_its_lock(tmp_path: Path) -> None:
    subject = staged()
    measurement = with_wheel(measure_enclave(), WHEEL.sha256)
    terms = tiny_terms(measurement=measurement, audit=1.0, fixed=True, mapped=True, front=1, across="int8", rows=16)
    world = Program(subject, tiny_package(tmp_path, subject, terms, wheel=RAW), wheel=RAW)
    try:
        assert world.ready.measurement == measurement
        world.start()
        una, pat = world.session("una"), world.session("pat")
        for batch in range(3):
            records = world.pictures(3, seed=batch)
            answers = world.predict(batch, una.seal(records), pat.seal(records[:1]))
            assert una.open(answers[0]).audited
            assert float((una.table(answers[0]) - world.expected(records)).abs().max()) < 0.2
            assert pat.table(answers[1]).shape == (1, 3)
        world.channel.send(Configure(b"", {}))  # the other role's
        reply = world.channel.receive(m.SERVING_REPLIES)
        assert getattr(reply, "error", {})["code"] == "door.unexpected"
    finally:
        world.stop()
    assert end_program(world.process) == 0
    with pytest.raises(EnvironmentFault):
        world.session("una")
