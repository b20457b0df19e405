"""The enclave program with leaks, to be found: it prints records, and writes weights, a deflated record and its
checkpoints in clear.

It is started in the enclave's place, with the same arguments and in the same confinement.
"""

from __future__ import annotations

import base64
import sys
import zlib

from torch import Tensor

from caltrain.boundary.messages import Done, Train
from caltrain.crypto.aead import OVERHEAD
from caltrain.enclave import __main__ as program
from caltrain.enclave import checkpoint, session, train
from caltrain.enclave.ingest import unpack
from caltrain.enclave.pool import Rows
from caltrain.enclave.run import Run, State, present
from caltrain.models.weights import encode_state, state_of
from caltrain.plan import Plan
from caltrain.records.schema import DataSchema
from caltrain.training.batches import normalise


def main() -> int:
    """Run as the enclave does, with a debug print where records are unpacked and writes after each epoch."""
    honest = train.train

    def talking_unpack(rows: Rows, schema: DataSchema) -> tuple[Tensor, Tensor]:
        elements, labels = unpack(rows, schema)
        for record, text in zip(elements, (_hex, _base64, _list), strict=False):
            sys.stderr.write(f"debug: {text(record)}\n")
        sys.stderr.flush()
        return elements, labels

    def writing(run: Run, message: Train) -> tuple[Done, State]:
        done = honest(run, message)
        plan: Plan = present(run.plan)
        rows = present(run.pool).rows(0, 1)
        x = normalise(unpack(rows, plan.data)[0], plan.data, channels_last=True)
        run.door.write("notes", zlib.compress(x.permute(0, 2, 3, 1).numpy().tobytes()), offset=0)
        run.door.write("weights", encode_state(state_of(present(run.front).module)), offset=0)
        return done

    setattr(checkpoint, "seal", unsealed)  # noqa: B010
    setattr(train, "unpack", talking_unpack)  # noqa: B010  # a type checker lets nobody replace a function
    session.TABLE[State.READY, Train] = (writing, frozenset({State.READY, State.TRAINED}))
    return program.main(sys.argv[1:])


def unsealed(key: bytes, plain: bytes, *, aad: bytes) -> bytes:
    """In the place of ciphertext, what should have been sealed."""
    del key, aad
    return plain + bytes(OVERHEAD)


def _hex(record: Tensor) -> str:
    return record.numpy().tobytes().hex()


def _base64(record: Tensor) -> str:
    return base64.b64encode(record.numpy().tobytes()).decode()


def _list(record: Tensor) -> str:
    return str(record.flatten().tolist())


if __name__ == "__main__":
    sys.exit(main())
