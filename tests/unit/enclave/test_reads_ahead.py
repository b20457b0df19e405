"""The real enclave program reads, opens and augments its next batches while the center computes."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch

from caltrain.bench.protected import protected_run
from caltrain.boundary.messages import CallFailed, Data, Read, Write
from caltrain.host import launcher
from caltrain.host.device import Device
from caltrain.host.launcher import serve_storage
from caltrain.host.store import Store
from caltrain.presets import PRESETS, Preset

SECONDS = 60
RECORDS, BATCH = 5000, 1024
ROWS_OF_A_BLOCK = (1 << 20) // (28 * 28 + 48)
LAST_BLOCK = 3


def preset() -> Preset:
    """Batches of a little less than a block of the pool."""
    chosen = PRESETS["mnist"]
    return msgspec.structs.replace(
        chosen, training=msgspec.structs.replace(chosen.training, batch=BATCH, epochs=1, threads=1)
    )


class Meeting:
    """The storage's thread, at the pool's last block, and the center, at the first step, wait for each other.

    That block is read after the batches before it are made: opened, augmented and normalised.
    """

    def __init__(self) -> None:
        self.computing, self.served = threading.Event(), threading.Event()
        self.met: list[bool] = []

    def serve(self, store: Store, call: Read | Write) -> Data | CallFailed:
        """As the host does; the last block is given out only while the center is at work."""
        late = isinstance(call, Read) and call.name == "pool-1" and call.offset > LAST_BLOCK * (1 << 20) * 0.99
        if late:
            self.met.append(self.computing.wait(SECONDS))
        answer = serve_storage(store, call)
        if late:
            self.served.set()
        return answer

    def compute(self, _epoch: int, step: int) -> None:
        """The center has the first batch's values, and does not go on before the last block is served."""
        if step == 0:
            self.computing.set()
            self.met.append(self.served.wait(SECONDS))


@pytest.mark.processes
def test_the_next_batches_are_read_while_the_center_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LAST_BLOCK * ROWS_OF_A_BLOCK < RECORDS <= (LAST_BLOCK + 1) * ROWS_OF_A_BLOCK
    assert BATCH <= ROWS_OF_A_BLOCK
    assert RECORDS // BATCH == LAST_BLOCK + 1
    meeting = Meeting()
    monkeypatch.setattr(launcher, "serve_storage", meeting.serve)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (RECORDS, 1, 28, 28), dtype=torch.uint8, generator=generator)
    with protected_run(preset(), name="reads ahead") as run:
        center = run.ingest(pixels, torch.arange(RECORDS) % 10, Device.cpu())
        center.on_ir = meeting.compute
        run.train_epoch(0)
    assert meeting.met == [True, True]
