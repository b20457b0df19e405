"""The assessment that a cut rests on, as the package names it."""

from __future__ import annotations

from pathlib import Path

from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, envelope_from_json
from caltrain.errors import ConfigError
from caltrain.exposure.statement import MAX_REPORT_BYTES, verify_report
from caltrain.files import read_bounded
from caltrain.serving.package import ExposureBasis


def read_basis(folder: Path, *, model: str, key: str, front: int) -> ExposureBasis:
    """Verify report.json and statement.json in `folder`: `key` assessed the model of digest `model` at this cut.

    `policy_met`: the cut that the report's policy chose is this one, or a shallower.
    Raises IntegrityError as `verify_report` does, ConfigError `package.not-assessed-there` or `file.unreadable`.
    """
    statement = read_bounded(folder / "statement.json", limit=MAX_ENVELOPE_BYTES)
    envelope = envelope_from_json(statement, step="read statement")
    report = read_bounded(folder / "report.json", limit=MAX_REPORT_BYTES)
    verified = verify_report(envelope, report, model=model, key=key)
    if front not in verified.report.cuts:
        raise ConfigError(
            "package.not-assessed-there",
            f"the report has the cuts {', '.join(map(str, verified.report.cuts))}, not {front}",
            step="read exposure report",
            fix="Assess this cut, too (`caltrain exposure assess --cuts`), or cut where the report looked.",
        )
    met = verified.front is not None and verified.front <= front
    return ExposureBasis(report=verified.report.digest(), signer=key, policy_met=met)
