"""Secrets of one enclave: its own keys, the nonces it has answered, what the parties handed over."""

from __future__ import annotations

import os
from collections import OrderedDict

from caltrain.attestation.evidence import Attester, Binding, EvidenceBundle, Purpose
from caltrain.boundary.sealed import PartySecret, SealedMessage
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import ProtocolError

MAX_PENDING = 4096


class Vault:
    """Made once at start; what is written of it is sealed in a checkpoint.

    Nonces of training are bounded by its parties' patience, those of a service by `most_used`: then they are forgotten
    with the encryption key that they were answered for, so that what was sealed for them opens nowhere.
    """

    def __init__(self, attester: Attester, *, most_used: int | None = None) -> None:
        self.attester = attester
        self._most_used = most_used
        self.encryption = HpkePrivateKey()
        self.signing = SigningKey()
        self.run = os.urandom(16).hex()
        self.randomness = os.urandom(32)
        self.parties: dict[str, PartySecret] = {}
        self._pending: OrderedDict[str, Binding] = OrderedDict()
        self._used: set[str] = set()

    def attest(self, purpose: Purpose, *, plan: str, nonce: str) -> EvidenceBundle:
        """Evidence for one nonce. Raises ProtocolError `nonce.reused`: a nonce is answered once."""
        if self._most_used is not None and len(self._used) >= self._most_used:
            self._renew()  # not when a nonce is used: its message is yet to be opened
        if nonce in self._pending or nonce in self._used:
            raise _nonce("nonce.reused", "this nonce was already answered", "attest")
        binding = Binding(
            purpose=purpose,
            encryption_key=self.encryption.public,
            signing_key=self.signing.public,
            plan=plan,
            nonce=nonce,
        )
        if len(self._pending) >= MAX_PENDING:  # whoever floods us pushes out the oldest; its owner asks again
            self._pending.popitem(last=False)
        self._pending[nonce] = binding
        return EvidenceBundle(binding=binding, evidence=self.attester.evidence(binding.report_data()))

    def _renew(self) -> None:
        self.encryption = HpkePrivateKey()
        self._pending.clear()
        self._used.clear()

    def take_over(self, run: str, signing: SigningKey, parties: dict[str, PartySecret]) -> None:
        """Go on as the enclave that began this run: its name, its signing key, what it was given."""
        self.run, self.signing, self.parties = run, signing, dict(parties)

    def redeem(self, message: SealedMessage, purpose: Purpose) -> Binding:
        """The binding that a signed message answers to; each serves once. Raises ProtocolError `nonce.unknown`."""
        binding = self._pending.get(message.nonce)
        if binding is None or binding.purpose != purpose:
            raise _nonce(
                "nonce.unknown", "no evidence for this purpose was given for this nonce, or it was used", "open"
            )
        del self._pending[message.nonce]
        self._used.add(message.nonce)
        return binding


def _nonce(code: str, what: str, step: str) -> ProtocolError:
    return ProtocolError(code, what, step=step, fix="Draw a fresh nonce, ask for evidence, and verify it again.")
