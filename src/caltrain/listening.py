"""A socket to listen on, for the servers of host and proxy."""

from __future__ import annotations

import errno
import socket

from caltrain.errors import EnvironmentFault


def bind(address: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. Raises EnvironmentFault `listen.port-in-use`, `listen.refused`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only then: answers would wait 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
        sock.listen(1024)
    except (OSError, OverflowError) as error:
        sock.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise EnvironmentFault(
            "listen.port-in-use" if in_use else "listen.refused",
            f"cannot listen on {address}:{port}: {error}",
            step="listen",
            fix="Choose another --port, or stop the program that uses this one."
            if in_use
            else "Choose an --address of this machine and a --port that this user may use.",
        ) from error
    return sock
