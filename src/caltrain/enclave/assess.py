"""Before an epoch: what the model of this moment gives away, measured inside, and the parties' votes on the cut.

What needs no attack is measured here, on sealed records. For the rest the parties get the semi-trained model, as
CALTRAIN has it (arXiv:1812.03230, IV-B), attack it with their own records, and vote: the deepest cut that anybody asks
for is due. `train` refuses an epoch whose cut was not judged, or is shallower than that, so nothing leaves before.
"""

from __future__ import annotations

import os

import msgspec
import numpy as np
import torch

from caltrain.boundary.messages import Assess, Done, Vote
from caltrain.boundary.sealed import ReleasedPart, seal_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.ingest import unpack
from caltrain.enclave.run import Assessment, Run, State, present
from caltrain.enclave.zones import inner_state, joined, same_center, shown_center
from caltrain.errors import IntegrityError, ProtocolError
from caltrain.exposure.choice import choose
from caltrain.exposure.inside import measure_inside
from caltrain.exposure.policy import attack_bounds, inside_bounds
from caltrain.exposure.subject import subject_from
from caltrain.models.weights import encode_state, model_digest, state_of
from caltrain.plan import ExposureSpec, Plan, possible_cuts
from caltrain.provenance.statements import AssessedModel, ExposureVote

_BATCH = 256


def assess(run: Run, _message: Assess) -> tuple[Done, State]:
    """Measure, decide as far as the figures do, and seal the semi-trained model to the parties if they are to vote."""
    plan, course = present(run.plan), present(run.course)
    spec = _due_now(plan, run)
    same_center(run)
    module = joined(run, shown_center(run, (course.epoch, course.step), course.center))
    model, cuts = model_digest(plan.model, state_of(module)), possible_cuts(plan, course.front)
    subject = subject_from(plan.model, plan.data, module, digest=model)
    bounds = inside_bounds(spec.policy)
    pictures = subject.pictures(_sample(run, spec.sample))
    measures, seed = {bound.measure for bound in bounds}, int.from_bytes(os.urandom(4))
    figures = measure_inside(subject, cuts, pictures, measures=measures, seed=seed)
    least = course.front
    if bounds:
        policy = msgspec.structs.replace(spec.policy, bounds=bounds)
        least = choose(policy, figures, costs={cut: float(cut) for cut in cuts}).front or 0
    run.assessment = Assessment(course.epoch, model, cuts, least)
    statement = AssessedModel(
        run=run.vault.run,
        plan=plan.digest(),
        epoch=course.epoch,
        front=course.front,
        model=model,
        sample=len(pictures),
        figures=figures,
        simulated=run.vault.attester.simulated,
    )
    named = digest("assessed-model/v1", canonical_json(statement))
    run.record(
        "assess", {"epoch": course.epoch, "front": course.front, "model": model, "least": least, "statement": named}
    )
    signed = run.vault.signing.sign("assessed-model", statement)
    if not least or not attack_bounds(spec.policy):  # no vote would change it
        return Done(signed=signed, due=least), State.READY
    return Done(signed=signed, sealed=_sealed(run, model)), State.ASSESSING


def _due_now(plan: Plan, run: Run) -> ExposureSpec:
    course, spec = present(run.course), plan.exposure
    again = run.assessment is not None and run.assessment.epoch == course.epoch
    if spec is None or course.step or course.epoch % spec.every or again:
        raise ProtocolError(
            "assess.not-now",
            f"there is nothing to assess in epoch {course.epoch}.{course.step}",
            step="assess",
            fix="Assess once before an epoch, and only where the plan has a policy for the cut.",
        )
    return spec


def _sample(run: Run, count: int) -> torch.Tensor:
    """Elements of `count` held-out records, or of the pool's where these are too few.

    Nobody chooses which: not the host, nor the party whose records were taken in first. All are read in their order, so
    what the host sees does not tell either.
    """
    pool = run.held_out
    if pool is None or pool.shape.records < count:
        pool = present(run.pool)
    records = pool.shape.records
    drawn = np.zeros(records, bool)
    drawn[np.random.default_rng(int.from_bytes(os.urandom(16))).permutation(records)[:count]] = True
    parts = zip(range(0, records, _BATCH), pool.batches(_BATCH, whole=False), strict=True)
    rows = np.concatenate([rows[drawn[start : start + len(rows)]] for start, rows in parts])
    return unpack(rows, present(run.plan).data)[0]


def _sealed(run: Run, model: str) -> dict[str, bytes]:
    part = ReleasedPart(model=model, weights=encode_state(inner_state(run)))
    return {
        name: seal_for(secret.data_key, "semi-trained/v1", part, context=run.vault.run)
        for name, secret in run.vault.parties.items()
    }


def vote(run: Run, message: Vote) -> tuple[Done, State]:
    """Take a party's vote; with the last one it is clear which cut is due."""
    party, assessment = present(run.plan).party(message.party), present(run.assessment)
    word = open_envelope(message.envelope, "exposure-vote", party.public_key, ExposureVote, step="vote")
    where = (word.run, word.epoch, word.model, word.party)
    if where != (run.vault.run, assessment.epoch, assessment.model, party.name) or party.name in assessment.votes:
        raise IntegrityError(
            "vote.not-this",
            f"{party.name} voted on another model than the one before epoch {assessment.epoch}, or has voted already",
            step="vote",
            fix="Assess the model that the run shows now, and vote once.",
        )
    if word.front and word.front not in assessment.cuts:
        raise ProtocolError(
            "vote.no-such-cut",
            f"{party.name} asks for {word.front} layers; the FrontNet can have {assessment.cuts}",
            step="vote",
            fix="Vote for one of these, or for 0: no cut is acceptable.",
        )
    assessment.votes[party.name] = word.front
    run.record("vote", {"party": party.name, "epoch": word.epoch, "front": word.front, "report": word.report})
    if len(assessment.votes) < len(present(run.plan).parties):
        return Done(), State.ASSESSING
    return Done(state=State.READY, due=assessment.due), State.READY


def check_assessed(run: Run) -> int:
    """Layers that the coming epoch needs by the assessment; 0 where none is due.

    Raises ProtocolError `exposure.not-assessed`, IntegrityError `exposure.no-cut`.
    """
    spec, course, assessment = present(run.plan).exposure, present(run.course), run.assessment
    if spec is None or course.step or course.epoch % spec.every:
        return 0
    if assessment is None or assessment.epoch != course.epoch:
        raise ProtocolError(
            "exposure.not-assessed",
            f"the cut was not judged before epoch {course.epoch}",
            step="train",
            fix="Assess the model, and have every party vote where the plan's policy asks for attacks.",
        )
    if assessment.due == 0:
        none = sorted(name for name, front in assessment.votes.items() if front == 0)
        raise IntegrityError(
            "exposure.no-cut",
            f"no cut meets the plan's policy before epoch {course.epoch}, by "
            + (f"the votes of {', '.join(none)}" if assessment.least else "the enclave's own figures"),
            step="train",
            fix="Agree on another policy, a model that gives less away, or noise at the cut; the run ends here.",
        )
    return assessment.due
