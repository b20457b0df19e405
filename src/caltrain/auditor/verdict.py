"""A bundle with a verdict in place of a trace: the same steps, from the plan's digest to the records disclosed.

What it proves: this enclave, of this run, gave this verdict on inputs of this commitment; which contributors and
records it names; and that a record that was disclosed is the one that it names. Whether the method is right, no
signature tells: that is measured (docs/accountability.md).
"""

from __future__ import annotations

from typing import Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.auditor.bundle import Anchors, Proved, TraceBundle, prove
from caltrain.boundary.sealed import commit_input
from caltrain.crypto.digests import same
from caltrain.errors import LineageError
from caltrain.provenance.verdict import VerdictStatement, inputs_root
from caltrain.records.commitment import RecordRef


class VerifiedVerdict(Proved, frozen=True, kw_only=True):
    """What a bundle with a verdict proves."""

    verdict: VerdictStatement

    @property
    def named(self) -> dict[RecordRef, str]:
        """Records that it names, with their commitments."""
        return self.verdict.records()


def verify_verdict(bundle: TraceBundle, **anchors: Unpack[Anchors]) -> VerifiedVerdict:
    """Check it against these anchors, without network or host.

    Raises IntegrityError, LineageError, ConfigError, DataError, AccessError or (with a policy) AttestationError at the
    first step that fails.
    """
    verified = judge_verdict(bundle, **anchors)
    verified.sound()
    return verified


def judge_verdict(bundle: TraceBundle, **anchors: Unpack[Anchors]) -> VerifiedVerdict:
    """As `verify_verdict`, but what a contributor signed in vain is a decision about its record, not an error."""
    verdict, proved = prove(bundle, "verdict", VerdictStatement, **anchors)
    return VerifiedVerdict(verdict=verdict, **msgspec.structs.asdict(proved))


def check_inputs(verified: VerifiedVerdict, inputs: NDArray[np.generic]) -> None:
    """That the verdict is of these inputs (N, C, H, W), in order. Raises LineageError `verdict.other-inputs`."""
    said = verified.verdict
    root = inputs_root(commit_input(said.nonce, np.ascontiguousarray(each).tobytes()) for each in inputs)
    if not same(root, said.input_commitment):
        raise LineageError(
            "verdict.other-inputs",
            f"the verdict is not of these {len(inputs)} inputs, in this order",
            step="verify bundle",
            fix="Give all inputs that were asked about, as they were given then.",
        )
