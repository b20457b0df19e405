"""Simulated evidence: a software key signs what a TEE would. It proves nothing about the machine.

It exists so that the same protocol runs where there is no TEE. Its kind says what it is, and a policy accepts it only
when it says `allow_simulated` and names the development root.
"""

from __future__ import annotations

import base64

import msgspec

from caltrain.attestation.evidence import Evidence
from caltrain.crypto import dsse
from caltrain.plan import Measurement

KIND = "simulated"


class SimulatedQuote(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Payload of a simulated quote."""

    measurement: Measurement
    report_data: str


class SimulatedAttester:
    """Signs quotes with a development root that lives beside the enclave."""

    kind = KIND
    simulated = True

    def __init__(self, root: dsse.SigningKey, *, measurement: str) -> None:
        self._root = root
        self.measurement = measurement

    def evidence(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes of report data."""
        quote = SimulatedQuote(measurement=self.measurement, report_data=report_data.hex())
        envelope = self._root.sign("simulated-quote", quote)
        return Evidence(kind=KIND, blob=base64.b64encode(msgspec.json.encode(envelope)).decode())
