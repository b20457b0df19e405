"""What the demo found: one object for programs, and the source of table and report."""

from __future__ import annotations

import msgspec


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
    distance: float
    label: str
    planted: bool
    png: bytes


class TracedInput(msgspec.Struct, frozen=True, kw_only=True):
    """A triggered input (PNG) and its traced records."""

    truth: str
    predicted: str
    png: bytes
    neighbours: tuple[TracedPicture, ...]


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """All that the HTML report shows."""

    result: DemoResult
    parties: tuple[Party, ...]
    losses: tuple[float, ...]
    traced: tuple[TracedInput, ...]
    events: tuple[tuple[int, str, str], ...]
    sandbox: dict[str, str]
