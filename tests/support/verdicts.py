"""Verdicts as the mathematics would give them, to see what becomes of them."""

from __future__ import annotations

import msgspec
import torch

from caltrain.accountability.cases import Blame, Suspects, Verdict
from caltrain.auditor.bundle import TraceBundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import Answers
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.run import State
from caltrain.provenance.verdict import VerdictStatement
from support.members import Asked, Pixels
from support.world import World, pictures

NOBODY = Verdict(
    outcome="cannot-tell",
    contributors=(),
    blames=(Blame(0, 0.5, 1 / 3, 0.25, 0.75), Blame(1, 0.25, 1 / 3, 0.5, 1.0), Blame(2, 0.25, 1 / 3, 0.5, 1.0)),
    kinds=("hard", "ambiguous", "out-of-distribution"),
    suspects=Suspects(torch.empty(0, dtype=torch.int64), 0.0, 0.0, 1.0),
    reason="nothing",
)
"""Of three inputs."""


def somebody(rows: list[int]) -> Verdict:
    """The second contributor is responsible, with these records."""
    return Verdict(
        outcome="responsible",
        contributors=(1,),
        blames=(
            Blame(0, 0.0, 1 / 3, 1.0, 1.0),
            Blame(1, 0.99951, 1 / 3, 1.00001e-7, 0.00012341),
            Blame(2, 0.0, 1 / 3, 1.0, 1.0),
        ),
        kinds=("trigger", "trigger", "mislabelled"),
        suspects=Suspects(torch.tensor(rows), 0.98765, 0.91234, 0.99999),
        reason="records",
    )


def asked_for_verdict(world: World, inputs: Pixels | None = None) -> tuple[Asked, Answers, VerdictStatement]:
    """Una's question for a verdict, the answer, and what is signed in it."""
    asked = world.question("verdict", pictures(3, seed=99) if inputs is None else inputs)
    answers = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    assert answers.verdict is not None
    key = world.run.vault.signing.public
    return asked, answers, open_envelope(answers.verdict, "verdict", key, VerdictStatement, step="test")


def verdict_bundle(world: World) -> TraceBundle:
    """A bundle that holds a verdict, from a linked world."""
    assert world.run.state is State.LINKED
    asked, answers, _ = asked_for_verdict(world)
    assert answers.verdict is not None
    return TraceBundle(
        plan=world.plan,
        manifest=world.run.vault.signing.sign("run-manifest", world.manifest),
        countersignatures={name: party.countersign(world.manifest) for name, party in world.parties.items()},
        linked=world.statements["linked-model"],
        trace=answers.verdict,
        evidence=asked.bundle,
        chain=tuple(world.events),
    )


def restated(world: World, bundle: TraceBundle, **changes: object) -> TraceBundle:
    """The bundle with another verdict that this enclave could have signed."""
    key = world.run.vault.signing
    said = open_envelope(bundle.trace, "verdict", key.public, VerdictStatement, step="test")
    return msgspec.structs.replace(bundle, trace=key.sign("verdict", msgspec.structs.replace(said, **changes)))
