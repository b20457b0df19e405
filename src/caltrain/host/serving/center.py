"""The CenterNet of a served model: outside the enclave, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

from caltrain.boundary.channel import Tensors
from caltrain.host.device import Device
from caltrain.models.network import build, lay_out
from caltrain.models.places import check_places
from caltrain.models.spec import cut_shapes, zone_ranges
from caltrain.models.weights import decode_state, load_zone
from caltrain.models.wheel import load_wheel, no_wheel
from caltrain.serving.package import Package
from caltrain.serving.precision import narrow, widen

OnComputed = Callable[[Tensors | None], None]
_STEP = "load center"
_STOP_SECONDS = 10
_log = logging.getLogger(__name__)


class ServedCenter:
    """Computes one batch after the other. Its weights are public to this host; it keeps nothing of a batch."""

    def __init__(
        self, package: Package, weights: bytes, *, threads: int, device: Device | None = None, wheel: bytes = b""
    ) -> None:
        """Raises IntegrityError `weights.malformed`, `wheel.*`, ConfigError `model.*`, `wheel.*`."""
        self._across, self._threads, self._device = package.terms.across, threads, device or Device.cpu()
        spec, part = package.spec, zone_ranges(package.spec, package.terms.partition)[1]
        self._rows, self._shapes = package.terms.batch.rows, cut_shapes(spec, part.start, package.data.shape)
        factory = load_wheel(wheel, spec.wheel) if spec.wheel else no_wheel
        self._module = build(spec, input_shape=package.data.shape, layers=part, factory=factory)
        load_zone(self._module, decode_state(weights, step=_STEP), step=_STEP)
        lay_out(self._module, channels_last=True)
        if package.terms.batch.fixed:
            check_places(self._module.eval(), self._shapes, package.terms.batch.rows)
        self._module.eval().to(self._device.name)
        self._work: SimpleQueue[tuple[Tensors, OnComputed] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="center", daemon=True)
        self._thread.start()

    def submit(self, tensors: Tensors, then: OnComputed) -> None:
        """Compute, then call `then` in the center's thread with what is due, or with None if that failed."""
        self._work.put((tensors, then))

    def stop(self) -> None:
        """End the thread, once it has done what it was given; one that hangs is left alone."""
        self._work.put(None)
        self._thread.join(_STOP_SECONDS)

    def compute(self, tensors: Tensors) -> Tensors:
        """What crosses at the center's end for what crossed at its start. Raises ProtocolError `tensor.malformed`."""
        live = self._device.bring(widen(tensors, self._across))
        with torch.inference_mode():
            out, _ = self._module.through(live)
            return tuple(narrow(self._device.take_back(out), self._across))

    def _compute(self) -> None:
        torch.set_num_threads(self._threads)
        self._warm_up()
        while (work := self._work.get()) is not None:
            tensors, then = work
            then(self._tried(tensors))

    def _tried(self, tensors: Tensors) -> Tensors | None:
        try:
            return self.compute(tensors)
        except Exception as error:  # noqa: BLE001  # whatever a stage or a device raises: this batch is given up
            # Its text may hold numbers of the batch.
            _log.warning("the center could not compute a batch: %s", type(error).__name__)
            return None

    def _warm_up(self) -> None:
        """The first batch takes longer than others: kernels are chosen, memory is taken."""
        zeros: list[Tensor] = [torch.zeros(self._rows, *shape) for shape in self._shapes]
        layout = torch.channels_last
        self._tried(
            tuple(narrow([x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in zeros], self._across))
        )
