"""A trace bundle with its disclosures, from a whole run in this process."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from caltrain.auditor.bundle import TraceBundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import Envelope
from caltrain.crypto.merkle import inclusion_proof
from caltrain.enclave.run import State
from caltrain.plan import Method, Plan
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure
from support.world import Change, World, pictures

INPUT = pictures(1, seed=99)


def with_opinions(plan: Plan) -> Plan:
    """The plan, with second opinions."""
    methods: tuple[Method, ...] = ("fingerprint", "gradient", "trak")
    return msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, methods=methods))


def traced_world(*, change: Change = lambda plan: plan, **question: Any) -> tuple[World, TraceBundle]:
    """A linked run, and a bundle for one trace by the user `una`, without disclosures."""
    world = World(epochs=1, change=change).run_to(State.LINKED)
    return world, bundle_of(world, **question)


def bundle_of(world: World, **question: Any) -> TraceBundle:
    """A bundle for one trace of a linked run, by the user `una`, without disclosures."""
    asked = world.question("trace", INPUT, **question)
    trace = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"]).traces[0]
    return TraceBundle(
        plan=world.plan,
        manifest=world.run.vault.signing.sign("run-manifest", world.manifest),
        countersignatures={name: party.countersign(world.manifest) for name, party in world.parties.items()},
        linked=world.statements["linked-model"],
        trace=trace,
        evidence=asked.bundle,
        chain=tuple(world.events),
    )


def statement_of(bundle: TraceBundle) -> TraceStatement:
    """What the enclave said in the bundle's trace."""
    return msgspec.json.decode(base64.b64decode(bundle.trace.payload), type=TraceStatement)


def disclosed(world: World, reference: RecordRef, *, record: bytes | None = None) -> Envelope:
    """The owner's signed disclosure of a record; with `record`, of another one in its place."""
    party = world.parties[reference.party]
    shard = next(s for s in party.shards if s.header.shard == reference.shard)
    commitments = [shard.commitment(leaf) for leaf in range(len(shard.records))]
    return party.signer.sign(
        "disclosure",
        Disclosure(
            record_ref=reference,
            model=world.run.model_digest,
            records=len(shard.records),
            salt=base64.b64encode(shard.salts[reference.leaf]).decode(),
            record=base64.b64encode(shard.records[reference.leaf] if record is None else record).decode(),
            proof=tuple(base64.b64encode(p).decode() for p in inclusion_proof(commitments, reference.leaf)),
        ),
    )
