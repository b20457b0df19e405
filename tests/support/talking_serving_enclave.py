"""The serving enclave with leaks, to be found: it prints records, names and weights, and sends a key, weights and
answers in clear.

It is started in the enclave's place, with the same arguments and in the same confinement.
"""

from __future__ import annotations

import base64
import sys
import zlib
from typing import Any

import msgspec
from torch import Tensor

from caltrain.boundary.serving import Grant, Served
from caltrain.enclave import __main__ as program
from caltrain.enclave import infer, serve
from caltrain.enclave.door import Door
from caltrain.enclave.infer import Batch
from caltrain.enclave.serve import Outgoing, Service
from caltrain.enclave.served_model import ServedModel, load_model
from caltrain.models.weights import encode_state, state_of
from caltrain.serving.package import Package
from caltrain.training.batches import normalise

BEYOND = 200
"""No request has a place from here on: what answers it is seen by the host, and passed over."""


class Leaks:
    """What stands in the enclave's functions' place, and what these remember for each other."""

    def __init__(self) -> None:
        self.grant = serve.TABLE[serve.State.LOADED, Grant][0]
        self.records, self.answers = infer._records, infer._answers
        self.names: tuple[str, ...] = ()
        self.key = self.front = self.deflated = b""

    def talking_load(self, package: Package, key: bytes, door: Door, **options: Any) -> ServedModel:
        """Prints the FrontNet."""
        model = load_model(package, key, door, **options)
        self.names, self.key, self.front = model.classes, key, encode_state(state_of(model._front))
        _debug(base64.b64encode(self.front).decode())
        return model

    def talking_grant(self, service: Service, message: Grant) -> Outgoing:
        """Thanks for the key with the key and the FrontNet."""
        reply, ir = self.grant(service, message)
        assert isinstance(reply, Served)
        return msgspec.structs.replace(reply, session=self.key.hex(), sealed=self.front), ir

    def talking_records(self, package: Package, raw: bytes) -> Tensor:
        """Prints the first records."""
        records = self.records(package, raw)
        for record, text in zip(records, (_hex, _base64, _list), strict=False):
            _debug(text(record))
        self.deflated = zlib.compress(normalise(records, package.data, channels_last=False).numpy().tobytes())
        return records

    def talking_answers(self, batch: Batch, chances: Tensor, *, audited: bool, wrong: int) -> dict[int, bytes]:
        """Prints the predicted names; answers in clear, and more than was asked."""
        best = chances.argmax(1)
        _debug(str([self.names[int(number)] for number in best]))
        clear = (chances.half().numpy().tobytes(), best.numpy().tobytes(), self.deflated)
        due = self.answers(batch, chances, audited=audited, wrong=wrong)
        return dict.fromkeys(due, chances.numpy().tobytes()) | dict(enumerate(clear, BEYOND))


def main() -> int:
    """Run as the enclave does, with the leaks in."""
    leaks = Leaks()
    setattr(serve, "load_model", leaks.talking_load)  # noqa: B010  # a type checker lets nobody replace a function
    setattr(infer, "_records", leaks.talking_records)  # noqa: B010
    setattr(infer, "_answers", leaks.talking_answers)  # noqa: B010
    serve.TABLE[serve.State.LOADED, Grant] = (leaks.talking_grant, serve.State.SERVING)
    return program.main(sys.argv[1:])


def _debug(text: str) -> None:
    sys.stderr.write(f"debug: {text}\n")
    sys.stderr.flush()


def _hex(record: Tensor) -> str:
    return record.numpy().tobytes().hex()


def _base64(record: Tensor) -> str:
    return base64.b64encode(record.numpy().tobytes()).decode()


def _list(record: Tensor) -> str:
    return str(record.flatten().tolist())


if __name__ == "__main__":
    sys.exit(main())
