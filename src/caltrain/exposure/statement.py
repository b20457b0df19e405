"""What whoever assessed a model signs, and how anybody checks it."""

from __future__ import annotations

import msgspec

from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.errors import UNDECODABLE, IntegrityError
from caltrain.exposure.choice import Choice, choose
from caltrain.exposure.policy import check_policy, weaker_adversary
from caltrain.exposure.report import ExposureReport, ExposureStatement

KIND = "exposure"
MAX_REPORT_BYTES = 64 << 20
_STEP = "verify exposure"


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked: who signed, and that report, model, policy and cut belong together."""

    signer: str
    report: ExposureReport
    front: int | None


def sign_report(report: ExposureReport, signer: SigningKey) -> Envelope:
    """The statement of a report (DSSE kind `exposure`)."""
    statement = ExposureStatement(
        model=report.model,
        report=report.digest(),
        policy=report.policy,
        front=report.choice.front if report.choice else None,
    )
    return signer.sign(KIND, statement)


def verify_report(envelope: Envelope, report: bytes, *, model: str, key: str) -> Verified:
    """Check that `key` signed for this JSON report of the model with the digest `model`.

    The cut is chosen anew from the report's figures, and what the policy assumes is worked out anew. That the figures
    were measured as it says, the signer vouches for. Raises IntegrityError `signature.invalid`, `payload.malformed`,
    `exposure.other-report`, `exposure.other-model`, `exposure.other-choice`, and as `check_policy` and `choose` do.
    """
    statement = open_envelope(envelope, KIND, key, ExposureStatement, step=_STEP)
    found = _decoded(report)
    if not same(found.digest(), statement.report):
        raise _other_report(f"its digest is {found.digest()}, the statement names {statement.report}")
    if not (same(found.model, model) and same(statement.model, model)):
        raise IntegrityError(
            "exposure.other-model",
            f"the statement is of the model {statement.model}, the one at hand is {model}",
            step=_STEP,
            fix="Verify with the model that was assessed, or have this one assessed.",
        )
    choice, assumptions = _concluded(found)
    front = choice.front if choice else None
    said = statement.policy, statement.front, found.choice, found.assumptions
    if said != (found.policy, front, choice, assumptions):
        raise IntegrityError(
            "exposure.other-choice",
            f"figures and policy of the report give cut {front}; the statement (cut {statement.front}), or the choice "
            "or the assumptions that the report states, are others",
            step=_STEP,
            fix="Ask the signer for another assessment: this one does not follow from its figures.",
        )
    return Verified(signer=key, report=found, front=front)


def _concluded(report: ExposureReport) -> tuple[Choice | None, tuple[str, ...]]:
    """What follows from figures and policy: the choice, and what it takes for granted."""
    if report.policy is None:
        return None, ()
    policy = check_policy(report.policy)
    figures = {front: cut.figures() for front, cut in report.cuts.items()}
    costs = {front: cut.price for front, cut in report.cuts.items()}
    return choose(policy, figures, costs=costs), weaker_adversary(policy)


def _decoded(raw: bytes) -> ExposureReport:
    try:
        return msgspec.json.decode(raw, type=ExposureReport)
    except UNDECODABLE as error:
        raise _other_report(f"it cannot be read: {str(error)[:200]}") from None


def _other_report(why: str) -> IntegrityError:
    return IntegrityError(
        "exposure.other-report",
        f"the report is not the one that was signed: {why}",
        step=_STEP,
        fix="Get report.json again from whoever assessed the model.",
    )
