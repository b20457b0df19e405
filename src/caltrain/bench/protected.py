"""A protected run of one party without HTTP: the real enclave program, launcher and CenterNet, driven step by step."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from caltrain.attestation.measurement import measure_enclave
from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.sealed import PartySecret, ReleasedPart, open_for, seal_message
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.errors import ProtocolError
from caltrain.host.center import Center
from caltrain.host.device import Device
from caltrain.host.launcher import Enclave, launch
from caltrain.host.sizes import slot_bytes
from caltrain.host.store import Store
from caltrain.models.weights import State, decode_state
from caltrain.plan import (
    EnclaveSpec,
    ManifestApproval,
    ManifestShard,
    Party,
    Plan,
    PlanApproval,
    ReleaseSpec,
    RunManifest,
    check_plan,
)
from caltrain.presets import Preset
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES
from caltrain.records.schema import encode_record

PARTY = "bench"
_SHARD = 4096


@dataclass
class Counted:
    """A CenterNet that counts what crosses, and can be held at the first tensor of a step."""

    center: Center
    on_ir: Callable[[int, int], None] = lambda _epoch, _step: None
    bytes_out: int = 0
    bytes_in: int = 0
    steps: int = 0

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """As the center does, with the bytes counted."""
        if head.role == "ir":
            self.on_ir(head.epoch, head.step)
            self.steps += 1
        self.bytes_out += head.nbytes
        # What goes back has the size of what came: the IR's gradient, and the center's output for its gradient.
        self.bytes_in += 0 if head.role == "labels" else head.nbytes
        self.center.take(head, tensors, channel)

    def commit(self, epoch: int, step: int) -> bytes:
        """As the center does."""
        return self.center.commit(epoch, step)

    def committed(self, epoch: int, step: int) -> bytes:
        """As the center does."""
        return self.center.committed(epoch, step)


class ProtectedRun:
    """From the plan to the last step, with one party that is this process."""

    def __init__(self, plan: Plan, enclave: Enclave, store: Store, signer: SigningKey) -> None:
        self.plan, self.enclave, self.store = plan, enclave, store
        self._signer, self._data_key = signer, os.urandom(32)
        self._run = ""

    def ingest(
        self, pixels: Tensor, labels: Tensor, device: Device, *, held_out: tuple[Tensor, Tensor] | None = None
    ) -> Counted:
        """Seal `pixels` (N, C, H, W) and `labels` (N,), agree on the run, take the records in, start the CenterNet."""
        entries = self._seal(pixels, labels, held_out=False)
        entries += self._seal(*held_out, held_out=True) if held_out else ()
        plan, ask = self.plan, self.enclave.request
        ask(
            m.Configure(
                canonical_json(plan),
                {PARTY: self._sign("plan-approval", PlanApproval(plan=plan.digest(), party=PARTY))},
            )
        )
        bundle = ask(m.Attest("training", os.urandom(32).hex())).bundle
        if bundle is None:
            raise _odd("no evidence")
        secret = PartySecret(data_key=self._data_key, entropy=os.urandom(32), shards=entries)
        sealed = seal_message("provision", secret, binding=bundle.binding, sender=PARTY, signer=self._signer)
        ask(m.Provision(PARTY, sealed))
        signed = ask(m.MakeManifest()).signed
        if signed is None:
            raise _odd("no manifest")
        manifest = msgspec.json.decode(base64.b64decode(signed.payload), type=RunManifest)
        self._run = manifest.run
        approval = ManifestApproval(manifest=manifest.digest(), party=PARTY)
        ask(m.Countersign(PARTY, self._sign("manifest-approval", approval)))
        done = ask(m.Ingest(self.store.shards()))
        center = Counted(Center(plan, seed=done.center_seed, records=manifest.trained(plan), device=device))
        self.enclave.center = center
        return center

    def train_epoch(self, epoch: int) -> m.Done:
        """One epoch, over all its checkpoints."""
        done = m.Done(at=(epoch, 0))
        while done.at is not None and done.at[0] == epoch:
            done = self.enclave.request(m.Train(*done.at), wait=1e6)
        return done

    def release(self, center: Center) -> tuple[State, bytes]:
        """The whole model's state, and the run seed."""
        self.enclave.request(m.Hunt(), wait=1e6)
        done = self.enclave.request(m.Release(), wait=1e6)
        part = open_for(self._data_key, "release/v1", done.sealed[PARTY], ReleasedPart, context=self._run, step="bench")
        state = decode_state(part.weights, step="bench") | decode_state(center.weights(), step="bench")
        return state, part.run_seed

    def _sign(self, kind: str, value: msgspec.Struct) -> Envelope:
        return self._signer.sign(kind, value)

    def _seal(self, pixels: Tensor, labels: Tensor, *, held_out: bool) -> tuple[ManifestShard, ...]:
        return tuple(
            self._shard(pixels[i : i + _SHARD], labels[i : i + _SHARD], held_out=held_out)
            for i in range(0, len(labels), _SHARD)
        )

    def _shard(self, pixels: Tensor, labels: Tensor, *, held_out: bool) -> ManifestShard:
        schema = self.plan.data
        records = [encode_record(schema, x.numpy(), int(y)) for x, y in zip(pixels, labels, strict=True)]
        name = os.urandom(16).hex()
        path = self.store.path(f"shards/{PARTY}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            header = shards.write_shard(
                file,
                signer=self._signer,
                data_key=self._data_key,
                contributor=PARTY,
                shard_id=name,
                schema=schema,
                records=records,
                salts=[os.urandom(SALT_BYTES) for _ in records],
            )
        return ManifestShard(shard=name, root=header.root, records=header.records, held_out=held_out)


def plan_of(preset: Preset, signer: SigningKey, *, name: str) -> Plan:
    """A plan of one party whose run can be repeated."""
    return check_plan(
        Plan(
            version=1,
            name=name,
            model=preset.model,
            partition=preset.partition,
            data=preset.data,
            training=preset.training,
            center=preset.center,
            parties=(Party(name=PARTY, public_key=signer.public),),
            enclave=EnclaveSpec(measurement=measure_enclave()),
            release=ReleaseSpec(reveal_seed=True),
        )
    )


@contextmanager
def protected_run(preset: Preset, *, name: str) -> Iterator[ProtectedRun]:
    """A launched enclave in a folder of its own, both gone afterwards."""
    signer = SigningKey()
    plan = plan_of(preset, signer, name=name)
    with tempfile.TemporaryDirectory(prefix="caltrain-bench-") as folder:
        store = Store(Path(folder))
        with (Path(folder) / "enclave.log").open("wb") as log:
            enclave = launch(
                store,
                slot_bytes=slot_bytes(plan),
                threads=plan.training.threads,
                root_secret=SigningKey().private_bytes(),
                on_progress=lambda _: None,
                on_events=lambda _: None,
                log=log.fileno(),
            )
        try:
            yield ProtectedRun(plan, enclave, store, signer)
        finally:
            enclave.stop()


def _odd(what: str) -> ProtocolError:
    return ProtocolError("bench.enclave", f"the enclave gave {what}", step="bench", fix="Report this with its log.")
