"""The vault: a nonce is answered once, redeemed once, for its purpose; a flood costs only the oldest."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from caltrain.attestation.evidence import Binding, Purpose
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary.sealed import SealedMessage
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import SigningKey
from caltrain.enclave import vault as vault_module
from caltrain.enclave.vault import Vault
from caltrain.errors import ProtocolError

PLAN = digest("plan")
PURPOSES: tuple[Purpose, ...] = ("training", "query")
ROOM = 16
ATTESTER = SimulatedAttester(SigningKey(), measurement="sha384:" + "ab" * 48)


def nonce(number: int) -> str:
    return f"{number:064x}"


def message(number: int) -> SealedMessage:
    return SealedMessage(sender="alpha", nonce=nonce(number), transcript=digest("t"), sealed="")


def attest(vault: Vault, number: int, purpose: Purpose = "training") -> Binding:
    return vault.attest(purpose, plan=PLAN, nonce=nonce(number)).binding


def refused(vault: Vault, number: int, purpose: Purpose = "training") -> None:
    with pytest.raises(ProtocolError, match=r"^nonce\.unknown: "):
        vault.redeem(message(number), purpose)


def test_evidence_is_over_the_purpose_both_keys_the_plan_and_the_nonce() -> None:
    vault = Vault(ATTESTER)
    bundle = vault.attest("query", plan=PLAN, nonce=nonce(1))
    expected = Binding(
        purpose="query",
        encryption_key=vault.encryption.public,
        signing_key=vault.signing.public,
        plan=PLAN,
        nonce=nonce(1),
    )
    assert bundle.binding == expected
    # Ed25519 is deterministic, so the evidence says which report data it was made over.
    assert bundle.evidence == ATTESTER.evidence(expected.report_data())
    other = msgspec.structs.replace(expected, purpose="training")
    assert bundle.evidence != ATTESTER.evidence(other.report_data())


def test_a_nonce_is_redeemed_once() -> None:
    vault = Vault(ATTESTER)
    binding = attest(vault, 1)
    assert vault.redeem(message(1), "training") == binding
    refused(vault, 1)


def test_a_nonce_is_answered_once_before_and_after_it_was_redeemed() -> None:
    vault = Vault(ATTESTER)
    attest(vault, 1)
    for _ in range(2):
        for purpose in PURPOSES:
            with pytest.raises(ProtocolError, match=r"^nonce\.reused: "):
                attest(vault, 1, purpose)
        if vault._pending:
            vault.redeem(message(1), "training")


def test_a_nonce_that_was_never_answered_is_unknown() -> None:
    refused(Vault(ATTESTER), 1)


def test_a_nonce_serves_its_purpose_only_and_a_wrong_try_does_not_use_it_up() -> None:
    vault = Vault(ATTESTER)
    attest(vault, 1, "training")
    refused(vault, 1, "query")
    vault.redeem(message(1), "training")


@pytest.fixture
def small_vault(monkeypatch: pytest.MonkeyPatch) -> Vault:
    """A vault that keeps few unanswered nonces, so that a flood is quickly made."""
    assert vault_module.MAX_PENDING < 1 << 16, "what the host can make us keep must stay small"
    monkeypatch.setattr(vault_module, "MAX_PENDING", ROOM)
    return Vault(ATTESTER)


def test_a_flood_of_nonces_pushes_out_the_oldest_and_no_more(small_vault: Vault) -> None:
    vault = small_vault
    for number in range(ROOM + 2):
        attest(vault, number)
    refused(vault, 0)
    refused(vault, 1)
    for number in (2, 3, ROOM, ROOM + 1):
        vault.redeem(message(number), "training")


def test_what_a_flood_pushed_out_can_be_asked_for_again(small_vault: Vault) -> None:
    vault = small_vault
    first = attest(vault, 0)
    for number in range(1, ROOM + 1):
        attest(vault, number)
    assert attest(vault, 0) == first
    assert vault.redeem(message(0), "training") == first


def test_redeemed_nonces_make_room(small_vault: Vault) -> None:
    vault = small_vault
    attest(vault, 0)
    for number in range(1, ROOM):
        attest(vault, number)
    vault.redeem(message(1), "training")
    attest(vault, ROOM)
    vault.redeem(message(0), "training")


def test_every_enclave_has_secrets_of_its_own() -> None:
    vaults = [Vault(ATTESTER) for _ in range(3)]
    for one, other in pairwise(vaults):
        assert one.encryption.public != other.encryption.public
        assert one.signing.public != other.signing.public
        assert one.run != other.run
        assert one.randomness != other.randomness
    assert len(vaults[0].randomness) == 32
    assert len(bytes.fromhex(vaults[0].run)) == 16


def test_a_vault_that_has_used_as_many_nonces_as_it_may_forgets_them_with_its_key() -> None:
    vault = Vault(ATTESTER, most_used=3)
    first = attest(vault, 0)
    attest(vault, 9)
    for number in range(3):
        if number:
            attest(vault, number)
        assert vault.redeem(message(number), "training").encryption_key == first.encryption_key
    assert vault.encryption.public == first.encryption_key  # the last message is yet to be opened
    renewed = attest(vault, 0)
    assert renewed.encryption_key == vault.encryption.public != first.encryption_key
    assert renewed.signing_key == first.signing_key
    refused(vault, 9)


def test_nonces_that_were_answered_before_do_not_carry_a_vault_past_its_limit() -> None:
    vault = Vault(ATTESTER, most_used=3)
    key = attest(vault, 0).encryption_key
    for number in range(1, 6):
        attest(vault, number)
    for number in range(5):
        assert vault.redeem(message(number), "training").encryption_key == key
    assert attest(vault, 6).encryption_key != key
    refused(vault, 5)


def test_a_vault_of_training_keeps_its_key_and_its_nonces() -> None:
    vault = Vault(ATTESTER)
    key = vault.encryption.public
    for number in range(100):
        attest(vault, number)
        vault.redeem(message(number), "training")
    assert vault.encryption.public == key
    with pytest.raises(ProtocolError, match=r"^nonce\.reused: "):
        attest(vault, 0)
