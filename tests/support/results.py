"""A demo's result and story by hand."""

from __future__ import annotations

from typing import Literal

from caltrain.demo.result import DemoResult, Party, Point, Quality, Space, Story, TracedInput, TracedPicture
from caltrain.exposure.figures import Estimate
from caltrain.provenance.verdict import Blamed, VerdictStatement

RESULT = DemoResult(
    data="digits",
    records=1347,
    form="ternary",
    simulated=True,
    accuracy=0.98,
    plain_accuracy=0.98,
    weights_identical=True,
    attack_success=0.9975,
    plain_attack_success=0.9975,
    poison_share=0.0193,
    triggered_inputs=399,
    trace_precision_at_9=0.9987,
    trace_contributor_accuracy=1.0,
    culprit="dogwood",
    mislabel_auroc=0.9996,
    verdict_contributors=("dogwood",),
    verdict_records=26,
    verdict_precision=0.9615,
    verdict_recall=1.0,
    disclosures=27,
    disclosures_verified=27,
    substitutions=27,
    substitutions_refused=27,
    center_audited=False,
    events=115,
    chain_head="sha256:" + "1" * 64,
    model="sha256:" + "2" * 64,
    seconds=42.0,
    report="/somewhere/digits-1/report.html",
)


def said(*, party: str = "dogwood", outcome: Literal["responsible", "cannot-tell"] = "responsible") -> VerdictStatement:
    """A verdict on three inputs, with alder beside the party."""
    named = outcome == "responsible"
    return VerdictStatement(
        run="0" * 32,
        model=RESULT.model,
        method="a-method/v1",
        user="analyst",
        nonce="0" * 64,
        inputs=3,
        input_commitment="sha256:" + "3" * 64,
        head="sha256:" + "4" * 64,
        predicted=(7, 7, 1),
        outcome=outcome,
        blamed=(
            Blamed(
                party="alder", responsible=False, share_of_blame=0.03, share_of_data=0.25, p_value=1.0, adjusted=1.0
            ),
            Blamed(
                party=party,
                responsible=named,
                share_of_blame=0.999,
                share_of_data=0.25,
                p_value=0.0001,
                adjusted=0.0002,
            ),
        ),
        kinds=("trigger", "hard", "trigger"),
        found=26 if named else 0,
        suspects=(),
        precision=Estimate(0.975, 0.92, 1.0, 26) if named else Estimate(0.0, 0.0, 1.0, 0),
        reason="the reason",
        audit_rate=0.0,
        resumes=0,
        simulated=True,
    )


NOBODY = said(outcome="cannot-tell")


def _point(x: float, y: float, party: str, suspicion: float, *, bad: bool = False) -> Point:
    return Point(x=x, y=y, party=party, suspicion=suspicion, suspect=bad, planted=bad)


def space(*, party: str = "dogwood", label: str = "7") -> Space:
    """Three records of five, one of them named, and two inputs."""
    records = (_point(0, 0, "alder", 0.0), _point(0, 1, party, 0.6), _point(2, 0.5, party, 0.3, bad=True))
    return Space(label=label, of=5, parted=True, records=records, inputs=((2.0, 1.0), (1.5, 0.0)))


def story(*, party: str = "dogwood", label: str = "7", result: DemoResult = RESULT) -> Story:
    """A story with one traced input and two neighbours."""
    picture = TracedPicture(rank=1, party=party, distance=0.25, label=label, planted=True, png=b"\x89PNG one")
    return Story(
        result=result,
        parties=(
            Party(name="alder", role="honest", records=336, poisoned=0, mislabelled=0, blame=0.0, suspicion=0.01),
            Party(
                name=party, role="hides a backdoor", records=337, poisoned=26, mislabelled=0, blame=1.0, suspicion=0.1
            ),
        ),
        losses=(2.0, 1.0, 0.5),
        verdict=said(party=party),
        space=space(party=party, label=label),
        quality=(
            Quality(party="alder", wrong_labels=Estimate(0.107, 0.054, 0.17, 336), mislabelled=0.101, planted=0.0),
            Quality(party=party, wrong_labels=Estimate(0.002, 0.0, 0.051, 337), mislabelled=0.0, planted=0.077),
        ),
        traced=(TracedInput(truth="3", predicted=label, png=b"\x89PNG in", neighbours=(picture, picture)),),
        events=((0, "plan", "plan=sha256:1"), (1, "approval", f"party={party}")),
        sandbox={"seccomp": "on"},
    )
