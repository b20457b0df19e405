"""A signed report: what is verified, and every way in which it is not the one that was signed."""

from __future__ import annotations

import msgspec
import pytest

from caltrain.errors import ConfigError, IntegrityError
from caltrain.exposure.choice import choose
from caltrain.exposure.policy import Bound, Policy, parse_policy, weaker_adversary
from caltrain.exposure.report import ExposureReport, ExposureStatement
from caltrain.exposure.statement import KIND, Verified, sign_report, verify_report
from support.exposure_report import MODEL, exposure_report
from support.samples import refused, signer

AUDITOR = signer("auditor")
POLICY = parse_policy("ssim<=0.6")


def chosen(policy: Policy | None = POLICY) -> ExposureReport:
    report = exposure_report()
    if policy is None:
        return report
    figures = {front: cut.figures() for front, cut in report.cuts.items()}
    choice = choose(POLICY, figures, costs={1: 0.5, 3: 0.5})
    return msgspec.structs.replace(report, policy=policy, choice=choice)


def verify(
    report: ExposureReport, *, sent: ExposureReport | bytes | None = None, model: str = MODEL, key: str = AUDITOR.public
) -> Verified:
    raw = sent if isinstance(sent, bytes) else msgspec.json.encode(sent or report)
    return verify_report(sign_report(report, AUDITOR), raw, model=model, key=key)


def test_a_signed_report_verifies_with_its_cut() -> None:
    found = verify(chosen())
    assert (found.front, found.signer, found.report) == (3, AUDITOR.public, chosen())


def test_a_report_without_a_policy_has_no_cut() -> None:
    assert verify(chosen(None)).front is None


@pytest.mark.parametrize("sent", [b"", b"{}", b"\xff", msgspec.json.encode(exposure_report(data="others"))])
def test_another_report_is_refused(sent: bytes) -> None:
    with refused(IntegrityError, "exposure.other-report"):
        verify(chosen(), sent=sent)


@pytest.mark.parametrize("side", ["report", "hand"])
def test_another_model_is_refused(side: str) -> None:
    other = "sha256:" + "9" * 64
    report = chosen() if side == "hand" else msgspec.structs.replace(chosen(), model=other)
    with refused(IntegrityError, "exposure.other-model"):
        verify(report, model=other if side == "hand" else MODEL)


def test_a_statement_about_this_model_with_the_report_of_another_is_refused() -> None:
    report = msgspec.structs.replace(chosen(), model="sha256:" + "9" * 64)
    signed = AUDITOR.sign(KIND, ExposureStatement(model=MODEL, report=report.digest(), policy=POLICY, front=3))
    with refused(IntegrityError, "exposure.other-model"):
        verify_report(signed, msgspec.json.encode(report), model=MODEL, key=AUDITOR.public)


def test_another_key_is_refused() -> None:
    with refused(IntegrityError, "signature.invalid"):
        verify(chosen(), key=signer("somebody").public)


def test_a_statement_about_another_model_with_the_report_of_this_one_is_refused() -> None:
    report = chosen()
    other = ExposureStatement(model="sha256:" + "9" * 64, report=report.digest(), policy=POLICY, front=3)
    with refused(IntegrityError, "exposure.other-model"):
        verify_report(AUDITOR.sign(KIND, other), msgspec.json.encode(report), model=MODEL, key=AUDITOR.public)


@pytest.mark.parametrize("change", [{"front": 1}, {"front": None}, {"policy": None}])
def test_a_cut_that_does_not_follow_from_the_figures_is_refused(change: dict[str, object]) -> None:
    report = chosen()
    true = ExposureStatement(model=MODEL, report=report.digest(), policy=POLICY, front=3)
    signed = AUDITOR.sign(KIND, msgspec.structs.replace(true, **change))
    with refused(IntegrityError, "exposure.other-choice"):
        verify_report(signed, msgspec.json.encode(report), model=MODEL, key=AUDITOR.public)


def test_a_choice_that_the_report_claims_is_not_believed() -> None:
    choice = chosen().choice
    assert choice is not None
    lied = msgspec.structs.replace(chosen(), choice=msgspec.structs.replace(choice, front=1))
    true = ExposureStatement(model=MODEL, report=lied.digest(), policy=POLICY, front=3)
    with refused(IntegrityError, "exposure.other-choice"):
        verify(lied)
    with refused(IntegrityError, "exposure.other-choice"):  # nor beside a statement of the cut that does follow
        verify_report(AUDITOR.sign(KIND, true), msgspec.json.encode(lied), model=MODEL, key=AUDITOR.public)


@pytest.mark.parametrize("claimed", [("that all is well",), ()])
def test_assumptions_are_those_of_the_policy(claimed: tuple[str, ...]) -> None:
    weak = parse_policy("inverter.ssim<=0.6")
    report = chosen()
    figures = {front: cut.figures() for front, cut in report.cuts.items()}
    report = msgspec.structs.replace(report, policy=weak, choice=choose(weak, figures, costs={1: 0.5, 3: 0.5}))
    assert verify(msgspec.structs.replace(report, assumptions=weaker_adversary(weak))).front == 3
    with refused(IntegrityError, "exposure.other-choice"):
        verify(msgspec.structs.replace(report, assumptions=claimed))


def test_a_signed_policy_that_is_none_is_refused() -> None:
    with refused(ConfigError, "policy.unknown-measure"):
        verify(chosen(Policy(bounds=(Bound(measure="vagueness", at_most=1.0),))))


def test_a_statement_of_another_kind_is_refused() -> None:
    report = chosen()
    envelope = AUDITOR.sign("model", ExposureStatement(model=MODEL, report=report.digest(), policy=POLICY, front=3))
    with refused(IntegrityError, "signature.invalid"):
        verify_report(envelope, msgspec.json.encode(report), model=MODEL, key=AUDITOR.public)
