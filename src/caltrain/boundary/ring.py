"""The shared-memory ring: two slots in each direction, in a sealed memfd.

It only carries bytes that a tensor frame announces on the stream: slot number and length travel there, so nothing is
polled and no index lives in shared memory. The memory stays writable for the other side at all times, so a reader
copies first and looks afterwards. The memfd can be neither shrunk nor grown, so access cannot fault.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from enum import IntEnum

from caltrain.errors import EnvironmentFault, ProtocolError

SLOTS = 2
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Side(IntEnum):
    """Which half of the ring an end writes."""

    HOST = 0
    ENCLAVE = 1


def create_ring_memory(slot_bytes: int) -> int:
    """A memfd for a ring of `slot_bytes` a slot; the caller closes the descriptor."""
    fd = os.memfd_create("caltrain-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 2 * SLOTS * slot_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise EnvironmentFault(
            "ring.no-memory", f"no shared memory for the ring: {error}", step="create ring", fix="Free some memory."
        ) from error
    return fd


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file, a pipe: nothing that can be sealed
        return 0


class Ring:
    """One end of the ring."""

    def __init__(self, fd: int, *, slot_bytes: int, side: Side) -> None:
        size = 2 * SLOTS * slot_bytes
        if slot_bytes < 1 or os.fstat(fd).st_size != size or _seals(fd) & _SEALS != _SEALS:
            raise ProtocolError(
                "ring.not-sealed",
                "the ring's memory has another size than announced, or its size is not sealed",
                step="map ring",
                fix="The launcher must create it with create_ring_memory.",
            )
        self._memory = memoryview(mmap.mmap(fd, size))
        self.slot_bytes = slot_bytes
        self._mine, self._theirs = side * SLOTS, (1 - side) * SLOTS
        self._next = 0

    def put(self, parts: Sequence[memoryview]) -> int:
        """Write `parts` (at most `slot_bytes` in all) one after the other to our next slot and return its number."""
        slot = self._next
        self._next = (slot + 1) % SLOTS
        start = (self._mine + slot) * self.slot_bytes
        for part in parts:
            self._memory[start : start + len(part)] = part
            start += len(part)
        return slot

    def view(self, slot: int, length: int) -> memoryview:
        """The other side's slot. It may change at any moment: copy it before looking at it."""
        if not 0 <= slot < SLOTS or not 0 <= length <= self.slot_bytes:
            raise ProtocolError(
                "ring.out-of-range",
                f"slot {slot} with {length} bytes, the ring has {SLOTS} of {self.slot_bytes}",
                step="read from ring",
                fix="The other end misbehaves: stop the run.",
            )
        start = (self._theirs + slot) * self.slot_bytes
        return self._memory[start : start + length]
