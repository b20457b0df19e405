"""Start serving enclaves of one package, each with the package's sealed part and CenterNet within its reach."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import BinaryIO

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import STORAGE_CALLS, Boot, CallFailed, Data, Read, Write
from caltrain.boundary.serving import LoadPackage
from caltrain.errors import CaltrainError, EnvironmentFault
from caltrain.host.device import Choice, Device
from caltrain.host.launcher import start_program
from caltrain.host.serving.center import ServedCenter
from caltrain.host.serving.enclave import ServingEnclave
from caltrain.serving.folder import PackageFolder
from caltrain.serving.package import CENTER, INSIDE

_LOAD_SECONDS = 600


class Launcher:
    """Holds the package's parts open: a folder that gets another package later does not change what is served."""

    def __init__(
        self, folder: PackageFolder, *, root_secret: bytes, threads: int, device: Choice = "auto", log: int = 2
    ) -> None:
        """`log` is a descriptor for the enclave's standard error. Raises what opening parts and a center does."""
        self._package, self._envelope = folder.package, folder.envelope
        self._secret, self._threads, self._log = root_secret, threads, log
        self._wheel = folder.wheel()
        self._center = ServedCenter(
            folder.package,
            folder.center(),
            threads=threads,
            device=Device.pick(device, allowed=folder.package.terms.center == "any"),
            wheel=self._wheel,
        )
        self._parts = {name: (folder.folder / name).open("rb") for name in (INSIDE, CENTER)}

    def __call__(self, on_lost: Callable[[], None]) -> ServingEnclave:
        """An enclave that has its package. Raises EnvironmentFault `enclave.did-not-start`, or its own error."""
        process, channel, _ = start_program(
            Boot("simulated", self._secret, self._wheel, role="serving"),
            slot_bytes=self._package.slot_bytes,
            threads=self._threads,
            log=self._log,
            serve=self._serve,
        )
        enclave = ServingEnclave(process, channel, run=self._package.id, center=self._center, on_lost=on_lost)
        try:
            enclave.ask(LoadPackage(self._envelope)).result(_LOAD_SECONDS)
        except (CaltrainError, TimeoutError) as error:
            enclave.stop()
            raise error if isinstance(error, CaltrainError) else _slow() from None
        return enclave

    def close(self) -> None:
        """End the center's thread, close the parts."""
        self._center.stop()
        for part in self._parts.values():
            part.close()

    def _serve(self, stream: Channel) -> None:
        """The storage stream of an enclave, until it ends."""
        try:
            while True:
                stream.send(answer(self._parts, stream.receive(STORAGE_CALLS)))
        except CaltrainError:  # the enclave is gone, or sends what it may not: the other stream tells
            stream.close()


def answer(parts: Mapping[str, BinaryIO], call: Read | Write) -> Data | CallFailed:
    """The bytes of a part, of which there are exactly these; nothing is ever written."""
    part = parts.get(call.name) if isinstance(call, Read) else None
    if part is None or not isinstance(call, Read):
        refused = EnvironmentFault(
            "storage.not-a-part",
            "a serving enclave reads the two parts of its package, and writes nothing",
            step="serve storage",
            fix="Host and enclave must be of one version.",
        )
        return CallFailed(refused.diagnostics())
    return Data(os.pread(part.fileno(), call.length, call.offset))


def _slow() -> EnvironmentFault:
    return EnvironmentFault(
        "enclave.load-timeout",
        f"the enclave did not take the package within {_LOAD_SECONDS} seconds",
        step="launch enclave",
        fix="Look at the server's log and at what else the machine computes.",
    )
