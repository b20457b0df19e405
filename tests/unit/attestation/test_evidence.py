"""What evidence binds: every field is in the report data, and in the transcript of each sealed message."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from caltrain.attestation.evidence import MAX_EVIDENCE, Binding, Evidence
from caltrain.boundary.sealed import transcript_digest
from support.samples import signer

BINDING = Binding(
    purpose="training",
    encryption_key="xwing:AAAA",
    signing_key=signer("enclave").public,
    plan="sha256:" + "12" * 32,
    nonce="34" * 32,
)
OTHERS: list[dict[str, Any]] = [
    {"purpose": "query"},
    {"encryption_key": "xwing:AAAB"},
    {"signing_key": signer("other").public},
    {"plan": "sha256:" + "13" * 32},
    {"nonce": "35" * 32},
]


def test_known_report_data() -> None:
    assert BINDING.report_data().hex() == (
        "1dbeeb64c3a445f77371cd5c911d442975ed4b4d48a394bd65f762f73420da79"
        "76757b76807c38ea7f1692386bd103db9fe70be4021b0b1965d1667972c0f203"
    )


def test_known_transcript() -> None:
    expected = "sha256:b7a4af8e6fbaf728a371f1f5c9dc3b6cbad7a06b9532cd18a40262e997750b46"
    assert transcript_digest(BINDING, "alpha") == expected


def test_report_data_is_sha_512_of_the_canonical_binding() -> None:
    written = (
        '{"encryption_key":"xwing:AAAA","nonce":"' + "34" * 32 + '","plan":"sha256:' + "12" * 32 + '",'
        f'"purpose":"training","signing_key":"{signer("enclave").public}"}}'
    )
    expected = hashlib.sha512(b"caltrain:attestation-binding/v1\0" + written.encode()).digest()
    assert BINDING.report_data() == expected


def test_every_field_of_a_binding_is_in_report_data_and_transcript() -> None:
    bindings = [BINDING, *(msgspec.structs.replace(BINDING, **change) for change in OTHERS)]
    assert len({binding.report_data() for binding in bindings}) == len(bindings)
    assert len({transcript_digest(binding, "alpha") for binding in bindings}) == len(bindings)


def test_the_sender_is_in_the_transcript() -> None:
    assert transcript_digest(BINDING, "alpha") != transcript_digest(BINDING, "alph")


BAD_BINDINGS: dict[str, dict[str, Any]] = {
    "unknown purpose": {"purpose": "release"},
    "short nonce": {"nonce": "34" * 31},
    "nonce in upper case": {"nonce": "AB" * 32},
    "nonce with a line end": {"nonce": "34" * 32 + "\n"},
    "plan of another algorithm": {"plan": "sha512:" + "12" * 32},
    "key of another scheme": {"encryption_key": "rsa:AAAA"},
    "unknown field": {"run": "x"},
}


@pytest.mark.parametrize("changes", BAD_BINDINGS.values(), ids=BAD_BINDINGS)
def test_what_is_no_binding_is_refused_when_read(changes: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(BINDING) | changes, Binding)


@pytest.mark.parametrize("changes", [{"kind": "x" * 41}, {"blob": "x" * (MAX_EVIDENCE + 1)}, {"aux": 1}, {"crl": ""}])
def test_evidence_is_bounded(changes: dict[str, Any]) -> None:
    assert msgspec.convert({"kind": "tdx", "blob": "AAAA"}, Evidence).aux == ""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "tdx", "blob": "AAAA"} | changes, Evidence)
