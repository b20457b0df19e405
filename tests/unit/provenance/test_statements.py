"""What the enclave signs about a model: known bytes, nothing unknown."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.crypto.digests import canonical_json
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.records.quarantine import Repair

RUN = "ab" * 16
ONE, TWO, THREE = ("sha256:" + digit * 64 for digit in "123")
RELEASED = ModelStatement(
    run=RUN,
    plan=ONE,
    manifest=TWO,
    model=THREE,
    epochs=4,
    front_public=False,
    audit_rate=0.25,
    resumes=3,
    simulated=True,
    repair=None,
)
LINKED = LinkedModel(
    run=RUN,
    model=THREE,
    records=9,
    commitments=ONE,
    audit_rate=0.0,
    resumes=0,
    simulated=True,
    repair=Repair(run=RUN, model=TWO, quarantine=THREE, records=4),
)


def test_known_bytes() -> None:
    assert canonical_json(RELEASED).decode() == (
        f'{{"audit_rate":0.25,"epochs":4,"front_public":false,"manifest":"{TWO}","model":"{THREE}","plan":"{ONE}",'
        f'"repair":null,"resumes":3,"run":"{RUN}","simulated":true,"version":1}}'
    )
    assert canonical_json(LINKED).decode() == (
        f'{{"audit_rate":0,"commitments":"{ONE}","model":"{THREE}","records":9,'
        f'"repair":{{"model":"{TWO}","quarantine":"{THREE}","records":4,"run":"{RUN}","without":[]}},'
        f'"resumes":0,"run":"{RUN}","simulated":true,"version":1}}'
    )


@pytest.mark.parametrize("statement", [RELEASED, LINKED])
@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"run": "x"}, {"model": "sha1:0"}, {"note": 1}, {"simulated": 1}, {"audit_rate": True}]
)
def test_a_statement_of_another_form_is_refused_when_read(statement: msgspec.Struct, changes: dict[str, Any]) -> None:
    fields = msgspec.to_builtins(statement)
    assert msgspec.convert(fields, type(statement)) == statement
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields | changes, type(statement))


@pytest.mark.parametrize("field", ["run", "model", "audit_rate", "simulated", "repair"])
@pytest.mark.parametrize("statement", [RELEASED, LINKED])
def test_a_statement_cannot_leave_out_what_it_rests_on(statement: msgspec.Struct, field: str) -> None:
    fields = msgspec.to_builtins(statement)
    del fields[field]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, type(statement))
