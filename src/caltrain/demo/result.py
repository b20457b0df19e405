"""What the demo found: one object for programs, and the source of table and report."""

from __future__ import annotations

import msgspec

from caltrain.exposure.figures import Estimate
from caltrain.provenance.verdict import VerdictStatement


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one demo. Shares are 0 to 1. `report` is the path of the HTML file."""

    data: str
    records: int
    form: str
    simulated: bool
    accuracy: float
    plain_accuracy: float
    weights_identical: bool
    attack_success: float
    plain_attack_success: float
    poison_share: float
    triggered_inputs: int
    trace_precision_at_9: float
    trace_contributor_accuracy: float
    culprit: str
    mislabel_auroc: float
    verdict_contributors: tuple[str, ...] = ()
    """Whom the verdict on the triggered inputs holds responsible; nobody where it cannot tell."""
    verdict_records: int = 0
    """How many records it holds responsible."""
    verdict_precision: float | None = None
    """Share of the records that it lists that were planted; None where it lists none."""
    verdict_recall: float = 0.0
    """Share of the planted records that it lists."""
    disclosures: int
    disclosures_verified: int
    substitutions: int
    substitutions_refused: int
    center_audited: bool
    audit_rate: float = 0.0
    events: int
    chain_head: str
    model: str
    seconds: float
    report: str


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """One contributor in the report: its share of records and of blame, and its records' mean suspicion."""

    name: str
    role: str
    records: int
    poisoned: int
    mislabelled: int
    blame: float
    suspicion: float


class TracedPicture(msgspec.Struct, frozen=True, kw_only=True):
    """A neighbour's picture (PNG) as its contributor disclosed it."""

    rank: int
    party: str
    distance: float | None
    label: str
    planted: bool
    png: bytes


class TracedInput(msgspec.Struct, frozen=True, kw_only=True):
    """A triggered input (PNG) and its traced records."""

    truth: str
    predicted: str
    png: bytes
    neighbours: tuple[TracedPicture, ...]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A training record's fingerprint in a plane; `suspect`: the verdict names it."""

    x: float
    y: float
    party: str
    suspicion: float
    suspect: bool
    planted: bool


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of one class in a plane: its records, or a sample `of` more, and the triggered inputs (x, y).

    `parted`: the first axis is the one that shows the records that the verdict names against the rest.
    """

    label: str
    of: int
    parted: bool
    records: tuple[Point, ...]
    inputs: tuple[tuple[float, float], ...]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """One contributor's share of wrong labels as the hunt estimates it, and its true shares, careless and planted."""

    party: str
    wrong_labels: Estimate
    mislabelled: float
    planted: float


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """All that the HTML report shows."""

    result: DemoResult
    parties: tuple[Party, ...]
    losses: tuple[float, ...]
    verdict: VerdictStatement
    space: Space
    quality: tuple[Quality, ...]
    traced: tuple[TracedInput, ...]
    events: tuple[tuple[int, str, str], ...]
    sandbox: dict[str, str]
