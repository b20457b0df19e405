"""The enclave of a `World` where the host expects the enclave program: the same requests, no process."""

from __future__ import annotations

import threading
from functools import partial
from typing import cast

from caltrain.boundary import messages as m
from caltrain.errors import CaltrainError, EnvironmentFault, from_wire
from caltrain.host.center import Center
from caltrain.host.conductor import Conductor
from caltrain.host.kept import keep_center
from caltrain.host.launcher import Enclave, OnEvents
from caltrain.host.store import Store
from support.memory_host import MemoryHost
from support.world import MEASUREMENT, World


class WorldEnclave:
    """Answers requests with the world's enclave, which stores with `store`, or else in the world's memory."""

    def __init__(self, world: World, on_events: OnEvents, *, store: Store | None) -> None:
        self.world, self.on_events = world, on_events
        self.ready = m.Ready(MEASUREMENT, simulated=True, sandbox={"test": "on"})
        self.requests: list[m.Request] = []
        self.alive = True
        self.stopped = False
        self._lock = threading.Lock()
        if store is not None:
            world.host.on_read = partial(_read, store)
            world.host.on_write = partial(_write, store)
            world.host.on_commit = partial(_commit, world.host, store)
            world.host.on_show = partial(_show, world.host, store)

    @property
    def center(self) -> Center | None:
        """The CenterNet that answers the enclave's tensors."""
        return self.world.host.center

    @center.setter
    def center(self, center: Center) -> None:
        self.world.host.center = center

    def request(self, message: m.Request, *, wait: float = 5) -> m.Done:
        """As `Enclave.request`."""
        assert wait > 0
        with self._lock:
            self.check_alive()
            self.requests.append(message)
            reply = self.world.send(message)
            if isinstance(reply, m.Failed):
                raise from_wire(reply.error)
            assert isinstance(reply, m.Done)
            self.on_events(reply.events)
            return reply

    def check_alive(self) -> None:
        """As `Enclave.check_alive`."""
        if not self.alive:
            raise EnvironmentFault("enclave.died", "the enclave has ended", step="test", fix="None.")

    def stop(self) -> None:
        """As `Enclave.stop`."""
        self.stopped = True
        self.alive = False


def _read(store: Store, call: m.Read) -> m.Answer:
    try:
        return m.Data(store.read(call.name, offset=call.offset, length=call.length))
    except CaltrainError as error:
        return m.CallFailed(error.diagnostics())


def _write(store: Store, call: m.Write) -> m.Answer:
    store.write(call.name, call.data, offset=call.offset)
    return m.Data()


def _commit(host: MemoryHost, store: Store, call: m.CommitCenter) -> m.Answer:
    commitment = host.the_center.commit(call.epoch, call.step)
    if call.durable:
        keep_center(store, call.epoch, call.step, host.the_center.committed(call.epoch, call.step))
    return m.Data(commitment)


def _show(host: MemoryHost, store: Store, call: m.ShowCenter) -> m.Answer:
    state = host.the_center.committed(call.epoch, call.step)
    store.put("center-state", state)
    return m.Data(len(state).to_bytes(8, "big"))


def attach(conductor: Conductor, world: World) -> WorldEnclave:
    """Give a conductor the world's enclave, as if it had launched it."""
    enclave = WorldEnclave(world, conductor._keep_events, store=None)
    conductor._enclave = cast(Enclave, enclave)
    return enclave
