"""Sealed messages: one opens in one enclave, for one plan, purpose, nonce and sender, and only as it was sealed."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltrain.attestation.evidence import Binding
from caltrain.boundary.sealed import (
    MAX_QUESTIONS,
    PartySecret,
    Question,
    ResumeSecret,
    SealedMessage,
    SuspicionReport,
    open_for,
    open_message,
    seal_for,
    seal_message,
    transcript_digest,
)
from caltrain.crypto import hpke
from caltrain.crypto.aead import seal
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import SigningKey, open_envelope
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.crypto.kdf import derive
from caltrain.errors import IntegrityError
from caltrain.plan import ManifestShard

KEY, OTHER_KEY = HpkePrivateKey(), HpkePrivateKey()
SIGNER = SigningKey()
BINDING = Binding(
    purpose="training",
    encryption_key=KEY.public,
    signing_key=SigningKey().public,
    plan=digest("plan", b"one"),
    nonce="0a" * 32,
)
SECRET = PartySecret(
    data_key=b"k" * 32,
    entropy=b"e" * 32,
    shards=(ManifestShard(shard="ab" * 16, root=digest("root"), records=3),),
)
OTHERS = {
    "purpose": msgspec.structs.replace(BINDING, purpose="query"),
    "purpose of a restart": msgspec.structs.replace(BINDING, purpose="resume"),
    "encryption key": msgspec.structs.replace(BINDING, encryption_key=OTHER_KEY.public),
    "signing key": msgspec.structs.replace(BINDING, signing_key=SigningKey().public),
    "plan": msgspec.structs.replace(BINDING, plan=digest("plan", b"two")),
    "nonce": msgspec.structs.replace(BINDING, nonce="0b" * 32),
}


def sealed(sender: str = "alpha", *, binding: Binding = BINDING) -> SealedMessage:
    envelope = seal_message("provision", SECRET, binding=binding, sender=sender, signer=SIGNER)
    return open_envelope(envelope, "provision", SIGNER.public, SealedMessage, step="test")


def opened(message: SealedMessage, *, binding: Binding = BINDING, key: HpkePrivateKey = KEY) -> PartySecret:
    return open_message(message, PartySecret, binding=binding, key=key, step="provision")


def refused(message: SealedMessage, code: str, *, binding: Binding = BINDING, key: HpkePrivateKey = KEY) -> None:
    with pytest.raises(IntegrityError, match=rf"^{code}: .*\(step: provision\)"):
        opened(message, binding=binding, key=key)


def with_plain(plain: bytes) -> SealedMessage:
    """A message of a correct form around any plaintext: what a party that we do not trust can make."""
    transcript = transcript_digest(BINDING, "alpha")
    raw = hpke.seal_to(KEY.public, plain, info=transcript.encode())
    return SealedMessage(
        sender="alpha", nonce=BINDING.nonce, transcript=transcript, sealed=base64.b64encode(raw).decode()
    )


def test_a_message_opens_where_it_was_sealed_for() -> None:
    message = sealed()
    assert (message.sender, message.nonce) == ("alpha", BINDING.nonce)
    assert opened(message) == SECRET
    assert opened(with_plain(msgspec.msgpack.encode(SECRET))) == SECRET


def test_a_message_shows_nothing_of_its_secret() -> None:
    raw = msgspec.json.encode(sealed())
    plain = base64.b64decode(sealed().sealed)
    for secret in (SECRET.data_key, SECRET.entropy):
        assert secret not in raw
        assert secret not in plain


def test_a_message_signed_for_one_kind_does_not_pass_for_the_other() -> None:
    envelope = seal_message("query", SECRET, binding=BINDING, sender="alpha", signer=SIGNER)
    with pytest.raises(IntegrityError, match=r"^signature\.invalid: "):
        open_envelope(envelope, "provision", SIGNER.public, SealedMessage, step="test")


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_message_for_another_binding_is_refused(other: Binding) -> None:
    refused(sealed(), "sealed.malformed", binding=other)
    refused(sealed(binding=other), "sealed.malformed")


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_transcript_that_was_exchanged_does_not_help(other: Binding) -> None:
    claimed = msgspec.structs.replace(sealed(binding=other), transcript=transcript_digest(BINDING, "alpha"))
    refused(claimed, "hpke.not-authentic")


def test_a_message_in_another_senders_name_is_refused() -> None:
    renamed = msgspec.structs.replace(sealed(), sender="beta")
    refused(renamed, "sealed.malformed")
    refused(
        msgspec.structs.replace(renamed, transcript=transcript_digest(BINDING, "beta")),
        "hpke.not-authentic",
    )


def test_another_enclaves_key_does_not_open_it() -> None:
    refused(sealed(), "hpke.not-authentic", key=OTHER_KEY)


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize("at", [0, 600, 1087, 1120, -17, -1])
def test_a_flipped_bit_anywhere_is_refused(at: int) -> None:
    message = sealed()
    raw = base64.b64decode(message.sealed)
    altered = base64.b64encode(flipped(raw, at % len(raw))).decode()
    refused(msgspec.structs.replace(message, sealed=altered), "hpke.not-authentic")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "hpke.not-authentic"),
        ("AAAA", "hpke.not-authentic"),
        ("AAA", "sealed.malformed"),
        ("A A=", "sealed.malformed"),
        ("ümläut", "sealed.malformed"),
        ("\0", "sealed.malformed"),
    ],
)
def test_text_that_is_no_sealed_message_is_refused(text: str, code: str) -> None:
    refused(msgspec.structs.replace(sealed(), sealed=text), code)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_raises_anything_unnamed(text: str) -> None:
    message = SealedMessage(
        sender="alpha", nonce=BINDING.nonce, transcript=transcript_digest(BINDING, "alpha"), sealed=text
    )
    with pytest.raises(IntegrityError, match=r"^(sealed\.malformed|hpke\.not-authentic): "):
        opened(message)


SHARDS = msgspec.to_builtins(SECRET)["shards"]
PLAIN: dict[str, object] = {"data_key": b"k" * 32, "entropy": b"e" * 32, "shards": SHARDS}
UNFIT: list[dict[str, object]] = [
    {"data_key": b"k" * 31},
    {"entropy": b"e" * 33},
    {"shards": []},
    {"shards": SHARDS * 4097},
    {"shards": [SHARDS[0] | {"records": 0}]},
    {"more": 1},
]
GARBAGE = [b"", b"\xc1", b"\x81\xa1\xff\x01", b"\x91" * 100_000]


@pytest.mark.parametrize("plain", [msgspec.msgpack.encode(PLAIN | change) for change in UNFIT] + GARBAGE, ids=range(10))
def test_a_secret_out_of_its_form_is_refused(plain: bytes) -> None:
    refused(with_plain(plain), "sealed.malformed")


WORD: dict[str, object] = {"data_key": b"k" * 32, "run": "ab" * 16, "head": digest("head")}


def test_a_word_for_a_restart_opens_as_one_and_as_nothing_else() -> None:
    binding = msgspec.structs.replace(BINDING, purpose="resume")
    word = msgspec.convert(WORD, ResumeSecret)
    envelope = seal_message("rejoin", word, binding=binding, sender="alpha", signer=SIGNER)
    with pytest.raises(IntegrityError, match=r"^signature\.invalid: "):
        open_envelope(envelope, "provision", SIGNER.public, SealedMessage, step="test")
    message = open_envelope(envelope, "rejoin", SIGNER.public, SealedMessage, step="test")
    assert open_message(message, ResumeSecret, binding=binding, key=KEY, step="resume") == word
    refused(message, "sealed.malformed", binding=binding)  # it is no PartySecret


@pytest.mark.parametrize(
    "change",
    [{"data_key": b"k" * 31}, {"run": "AB" * 16}, {"head": "sha384:" + "0" * 64}, {"entropy": b"e" * 32}],
    ids=str,
)
def test_a_word_out_of_its_form_is_refused(change: dict[str, object]) -> None:
    message = with_plain(msgspec.msgpack.encode(WORD | change))
    with pytest.raises(IntegrityError, match=r"^sealed\.malformed: "):
        open_message(message, ResumeSecret, binding=BINDING, key=KEY, step="resume")


def test_a_report_of_suspicion_is_read_by_shard() -> None:
    scores = {"ab" * 16: b"\xe8\x03\0\0\x01\x02\xff\xff", "cd" * 16: b""}
    report = SuspicionReport(model=digest("model"), scores={"disagreement": scores, "labels": {"ab" * 16: b"\x01\0"}})
    assert report.of("ab" * 16) == (1000, 0, 513, None)
    assert report.of("cd" * 16) == ()
    assert report.of("ab" * 16, scan="labels") == (1,)


@pytest.mark.parametrize("count", [0, MAX_QUESTIONS + 1])
def test_a_question_has_a_bounded_number_of_inputs(count: int) -> None:
    plain = {"kind": "trace", "count": count, "inputs": b"", "answer_key": bytes(32)}
    with pytest.raises(IntegrityError, match=r"^sealed\.malformed: "):
        open_message(with_plain(msgspec.msgpack.encode(plain)), Question, binding=BINDING, key=KEY, step="query")


@pytest.mark.parametrize("method", ["magic", "", None, ["trak"]])
def test_a_question_has_a_method_that_there_is(method: object) -> None:
    plain = {"kind": "trace", "count": 1, "inputs": b"", "answer_key": bytes(32)}
    sealed = with_plain(msgspec.msgpack.encode(plain))
    assert open_message(sealed, Question, binding=BINDING, key=KEY, step="query").method == "fingerprint"
    with pytest.raises(IntegrityError, match=r"^sealed\.malformed: "):
        open_message(
            with_plain(msgspec.msgpack.encode(plain | {"method": method})),
            Question,
            binding=BINDING,
            key=KEY,
            step="query",
        )


# --- what the enclave seals to somebody's key ------------------------------------------------------------------


def test_a_payload_opens_with_its_key_purpose_and_context() -> None:
    raw = seal_for(b"k" * 32, "release/v1", SECRET, context="run")
    assert open_for(b"k" * 32, "release/v1", raw, PartySecret, context="run", step="test") == SECRET


@pytest.mark.parametrize(
    ("key", "purpose", "context"),
    [(b"x" * 32, "release/v1", "run"), (b"k" * 32, "answer/v1", "run"), (b"k" * 32, "release/v1", "other run")],
)
def test_a_payload_for_another_key_purpose_or_context_is_refused(key: bytes, purpose: str, context: str) -> None:
    raw = seal_for(b"k" * 32, "release/v1", SECRET, context="run")
    with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: .*\(step: receive\)"):
        open_for(key, purpose, raw, PartySecret, context=context, step="receive")


@pytest.mark.parametrize("plain", [*GARBAGE, msgspec.msgpack.encode({})], ids=range(5))
def test_a_payload_out_of_its_form_is_refused(plain: bytes) -> None:
    raw = seal(derive(b"k" * 32, "release/v1"), plain, aad=b"run")
    with pytest.raises(IntegrityError, match=r"^sealed\.malformed: .*\(step: receive\)"):
        open_for(b"k" * 32, "release/v1", raw, PartySecret, context="run", step="receive")
