"""The enclave program: `python -I -m caltrain.enclave SOCKET_FD STORAGE_FD RING_FD SLOT_BYTES THREADS`.

It imports what it needs, locks itself down, and only then reads its first message.
"""

from __future__ import annotations

import hashlib
import socket
import sys

import torch
import torch._dynamo  # the first optimiser would import it, which behind the lock it cannot

from caltrain.attestation.measurement import measure_enclave, with_wheel
from caltrain.attestation.simulated import KIND, SimulatedAttester
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import REQUESTS, Boot, Ready
from caltrain.boundary.ring import Ring, Side
from caltrain.crypto.digests import to_text
from caltrain.crypto.dsse import SigningKey
from caltrain.enclave.sandbox import lock_down
from caltrain.enclave.serve import serving_main
from caltrain.enclave.session import enclave_main
from caltrain.errors import CaltrainError, ConfigError, ProtocolError
from caltrain.training.allocator import keep_freed_memory


def main(arguments: list[str]) -> int:
    """Run until stopped. Returns an exit code; errors go to standard error, which holds no secret."""
    try:
        sock_fd, storage_fd, ring_fd, slot_bytes, threads = (int(a) for a in arguments)
    except ValueError:
        error = ConfigError(
            "enclave.arguments", "five numbers are needed", step="start enclave", fix="Let the host launch the enclave."
        )
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        keep_freed_memory()
        measurement = measure_enclave()
        sandbox = lock_down(keep_fds=[sock_fd, storage_fd, ring_fd])
        torch.set_num_threads(threads)  # starts threads, so it comes after the lock
        channel = Channel(socket.socket(fileno=sock_fd), Ring(ring_fd, slot_bytes=slot_bytes, side=Side.ENCLAVE))
        storage = Channel(socket.socket(fileno=storage_fd))
        boot = channel.receive(REQUESTS)
        if not isinstance(boot, Boot) or boot.kind != KIND:
            raise ProtocolError(
                "enclave.boot",
                "the first message must be Boot of a known kind of evidence",
                step="start enclave",
                fix="Let the host launch the enclave.",
            )
        if boot.wheel:
            measurement = with_wheel(measurement, to_text(hashlib.sha256(boot.wheel).digest()))
        states: dict[str, str] = {measure.name: measure.state for measure in sandbox.measures}
        channel.send(Ready(measurement, simulated=True, sandbox=states))
        attester = SimulatedAttester(SigningKey(boot.root_secret), measurement=measurement)
        run = serving_main if boot.role == "serving" else enclave_main
        run(channel, attester, storage, wheel=boot.wheel)
    except CaltrainError as error:
        if error.code == "door.closed":  # the host is gone: there is nobody left to tell
            return 0
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
