"""A small run over real processes, with noisy pictures for data, of which everything that the host can see is kept.

The host server is a process of its own, with the enclave program below it; the parties and the model user work in
this process and reach the host over HTTP.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.attestation.evidence import Binding
from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import PartySecret, SealedKind, SuspicionReport, seal_message
from caltrain.client.ask import ask
from caltrain.crypto.aead import TAG_BYTES
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.host_client import HostClient
from caltrain.models.layers import Conv, Flatten, Linear, MaxPool
from caltrain.models.spec import ModelSpec, Partition
from caltrain.participant import join as joining
from caltrain.participant.hunt import kept_report
from caltrain.participant.identity import Identity, create_identity
from caltrain.participant.model import JoinedModel, load_model
from caltrain.participant.receive import run_folder
from caltrain.participant.seal import SealedData, seal_records
from caltrain.plan import EnclaveSpec, Party, Plan, ReleaseSpec, RunManifest, User, check_plan
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES
from caltrain.records.schema import DataSchema, encode_record
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import Augment, CenterSpec, TrainingSpec
from support.canary_host import Haystack, TappedHost
from support.tapped_host import Config

NAMES = ("alpha", "beta", "gamma", "delta")
RECORDS = 24  # of each party: one batch
HELD_OUT = 8  # of each party
SHAPE = (3, 16, 16)
CLASSES = tuple(f"class {n}" for n in range(10))
MODEL = ModelSpec(
    layers=(
        *(Conv(filters=8), Conv(filters=8, batch_norm=True), MaxPool()),
        *(Conv(filters=16, stride=2), Conv(filters=16, batch_norm=True)),
        *(Flatten(), Linear(units=48, activation="relu"), Linear(units=len(CLASSES))),
    )
)


def noisy_pictures(records: int, *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures (N, *SHAPE) of a wave for each class under heavy noise, so that no two windows are alike; labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), records)
    y, x = np.mgrid[0 : SHAPE[1], 0 : SHAPE[2]] / SHAPE[1]
    waves = np.stack([np.sin(2 * np.pi * (np.cos(k) * x + np.sin(k) * y)) for k in range(len(CLASSES))])
    noise = random.integers(0, 160, (records, *SHAPE))
    return (noise + 40 * (1 + waves[labels])[:, None]).astype(np.uint8), labels.astype(np.int64)


def make_plan(parties: Sequence[Identity], user: Identity, *, partition: Partition) -> Plan:
    """The plan of these people."""
    return check_plan(
        Plan(
            version=1,
            name="canary",
            model=MODEL,
            partition=partition,
            data=DataSchema(shape=SHAPE, classes=CLASSES),
            training=TrainingSpec(
                epochs=2,
                batch=RECORDS,
                learning_rate=0.02,
                augment=Augment(shift=2, flip=True),
                threads=1,
                checkpoint_steps=2,
            ),
            center=CenterSpec(audit_rate=1.0, audit_steps=2),
            parties=tuple(Party(name=p.name, public_key=p.signer.public) for p in parties),
            users=(User(name=user.name, public_key=user.signer.public, may=("trace",), budget=10),),
            enclave=EnclaveSpec(measurement=measure_enclave()),
            release=ReleaseSpec(reveal_seed=True),
        )
    )


@dataclass(frozen=True)
class People:
    """Four parties with their sealed records, a model user with a question, and the plan that they agreed on.

    `held_out` are more pictures and labels, of all parties in turn, on which the enclave only measures.
    """

    folder: Path
    parties: list[Identity]
    user: Identity
    plan: Plan
    images: list[NDArray[np.uint8]]
    labels: list[NDArray[np.int64]]
    sealed: list[SealedData]
    held_out: tuple[NDArray[np.uint8], NDArray[np.int64]]
    question: NDArray[np.uint8]
    root: SigningKey = field(default_factory=SigningKey)

    @classmethod
    def gather(cls, folder: Path, *, partition: Partition) -> People:
        """Create everybody, and have the parties seal their records."""
        parties, user = (
            [create_identity(folder / name, name) for name in NAMES],
            create_identity(folder / "user", "user"),
        )
        plan = make_plan(parties, user, partition=partition)
        data = [noisy_pictures(RECORDS, seed=seed) for seed in range(len(NAMES))]
        sealed = [seal_records(p, plan.data, x, y, shard_records=16) for p, (x, y) in zip(parties, data, strict=True)]
        question = noisy_pictures(1, seed=len(NAMES))[0]
        held_out = noisy_pictures(HELD_OUT * len(NAMES), seed=len(NAMES) + 1)
        for number, party in enumerate(parties):
            own = slice(number * HELD_OUT, (number + 1) * HELD_OUT)
            seal_records(party, plan.data, held_out[0][own], held_out[1][own], held_out=True)
        images, labels = [x for x, _ in data], [y for _, y in data]
        return cls(folder, parties, user, plan, images, labels, sealed, held_out, question)

    @property
    def policy(self) -> Policy:
        """What they accept of an enclave."""
        trusted = (self.plan.enclave.measurement,)
        return Policy(measurements=trusted, allow_simulated=True, simulated_roots=(self.root.public,))

    def in_order(self, manifest: RunManifest) -> tuple[Tensor, Tensor]:
        """All records that are trained on, as the manifest counts them: pixels (N, C, H, W) and labels (N,)."""
        pixels, labels = [], []
        for number, entry in enumerate(manifest.parties):
            sealed = self.sealed[number]
            rows = {header.shard: rows for header, rows in zip(sealed.headers, sealed.rows, strict=True)}
            chosen = [row for shard in entry.shards if not shard.held_out for row in rows[shard.shard]]
            pixels.append(self.images[number][chosen])
            labels.append(self.labels[number][chosen])
        return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))


@dataclass(frozen=True)
class Outcome:
    """A finished run: what the host could see, and what only the parties know."""

    people: People
    model: JoinedModel
    suspicion: dict[str, SuspicionReport]
    entropies: dict[str, bytes]
    seen: list[Haystack]
    unreadable: set[str]

    @property
    def seeds(self) -> RunSeeds:
        """The run's sub-seeds, from the seed that was revealed to the parties."""
        return RunSeeds.from_run_seed(bytes.fromhex(self.model.record.run_seed))


def run(people: People, *, moments: Sequence[str], enclave: Path | None = None, extra: bytes = b"") -> Outcome:
    """The whole run, seen at `moments` and at the end (without moments: all but the memory).

    `enclave` runs in the enclave's place; `extra` is one more shard, that the first party sends but does not list.
    """
    config = Config(
        plan=msgspec.json.encode(people.plan).decode(),
        folder=str(people.folder / "host"),
        tap=str(people.folder / "tap"),
        root=people.root.private_bytes(),
        moments=tuple(moments),
        enclave=str(enclave or ""),
    )
    host = TappedHost(config, log=people.folder / "host.log")
    try:
        if extra:
            _upload(host.url, people.parties[0], extra)
        with noted_secrets(joining) as secrets:
            manifests = _join_all(host, people, moments)
        _ask(host.url, people)
        host.at_last(memory=bool(moments))
    finally:
        host.end()
    folders = [run_folder(party, m.run) for party, m in zip(people.parties, manifests, strict=True)]
    reports = {
        party.name: kept_report(party, manifest.run) for party, manifest in zip(people.parties, manifests, strict=True)
    }
    entropies = {sender: secret.entropy for sender, secret in secrets if isinstance(secret, PartySecret)}
    return Outcome(people, load_model(folders[0]), reports, entropies, host.seen, host.memory.unreadable)


def unsealed_shard(people: People, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    """A shard of the first party's by a writer that does not encrypt: where ciphertext belongs lie the records."""
    party, schema, out = people.parties[0], people.plan.data, io.BytesIO()
    records = [encode_record(schema, image, int(label)) for image, label in zip(images, labels, strict=True)]
    salts = [os.urandom(SALT_BYTES) for _ in records]
    header = shards.write_shard(
        out,
        signer=party.signer,
        data_key=party.data_key,
        contributor=party.name,
        shard_id=os.urandom(16).hex(),
        schema=schema,
        records=records,
        salts=salts,
    )
    head = out.getvalue()[: -len(records) * header.frame_bytes]
    return head + b"".join(salt + record + bytes(TAG_BYTES) for salt, record in zip(salts, records, strict=True))


def _upload(url: str, party: Identity, shard: bytes) -> None:
    envelope, _ = shards.read_header(io.BytesIO(shard), step="read shard")
    header = shards.open_header(envelope, contributor=party.name, public_key=party.signer.public, step="read shard")
    file = party.folder / "extra.shard"
    file.write_bytes(shard)
    with HostClient(url) as client:
        client.upload(f"/v1/parties/{party.name}/shards/{header.shard}", file)


def _join_all(host: TappedHost, people: People, moments: Sequence[str]) -> list[RunManifest]:
    """All parties join side by side, while we look at the host at each moment."""
    with ThreadPoolExecutor(len(people.parties)) as pool:
        joined = [pool.submit(_join, host.url, people, party) for party in people.parties]
        return host.at_each(moments, of=joined)


def _join(url: str, people: People, party: Identity) -> RunManifest:
    with HostClient(url) as client:
        return joining.join(client, people.plan, party, people.policy, clock=_now, seconds=200)


def _ask(url: str, people: People) -> None:
    with HostClient(url) as client:
        user, inputs = people.user, people.question
        ask(
            client, people.plan, people.policy, kind="trace", user="user", signer=user.signer, inputs=inputs, clock=_now
        )


def _now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def noted_secrets(sealer: ModuleType) -> Iterator[list[tuple[str, msgspec.Struct]]]:
    """Note what a module seals to enclaves and in whose name; nobody else ever learns it."""
    noted: list[tuple[str, msgspec.Struct]] = []

    def noting(
        kind: SealedKind, secret: msgspec.Struct, *, binding: Binding, sender: str, signer: SigningKey
    ) -> Envelope:
        noted.append((sender, secret))
        return seal_message(kind, secret, binding=binding, sender=sender, signer=signer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealer, "seal_message", noting)
        yield noted
