"""A demo's result and story by hand."""

from __future__ import annotations

from caltrain.demo.result import DemoResult, Party, Story, TracedInput, TracedPicture

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
        traced=(TracedInput(truth="3", predicted=label, png=b"\x89PNG in", neighbours=(picture, picture)),),
        events=((0, "plan", "plan=sha256:1"), (1, "approval", f"party={party}")),
        sandbox={"seccomp": "on"},
    )
