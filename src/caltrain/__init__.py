"""CalTrain: joint training with an attested FrontNet, and the trace of every misprediction to its contributor.

The names below are loaded at first use, so that `import caltrain` is quick and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caltrain.attestation.verify import Policy, verify_evidence
    from caltrain.auditor.bundle import verify_bundle
    from caltrain.client.ask import ask
    from caltrain.errors import CaltrainError
    from caltrain.host_client import HostClient
    from caltrain.participant.identity import load_identity
    from caltrain.participant.join import join
    from caltrain.participant.seal import seal_records
    from caltrain.plan import parse_plan

__version__ = "0.1.0"
__all__ = [
    "CaltrainError",
    "HostClient",
    "Policy",
    "ask",
    "join",
    "load_identity",
    "parse_plan",
    "seal_records",
    "verify_bundle",
    "verify_evidence",
]

_HOME = {
    "CaltrainError": "caltrain.errors",
    "HostClient": "caltrain.host_client",
    "Policy": "caltrain.attestation.verify",
    "ask": "caltrain.client.ask",
    "join": "caltrain.participant.join",
    "load_identity": "caltrain.participant.identity",
    "parse_plan": "caltrain.plan",
    "seal_records": "caltrain.participant.seal",
    "verify_bundle": "caltrain.auditor.bundle",
    "verify_evidence": "caltrain.attestation.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
