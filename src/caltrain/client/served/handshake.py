"""What a user checks before anything is sealed, and how a session begins. No input or output here.

(1) the package is signed by the owner whom the user named;  (2) it is the model and version that was asked for, and
if another one was served before, a later one with the same records and classes;  (3) it names the user with their
key;  (4) the evidence is for serving this very package, answers this nonce, and satisfies the user's policy;
(5) the enclave runs the program that the package's owner trusts.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from caltrain.attestation.verify import Claims, Policy, verify_evidence
from caltrain.boundary.sealed import open_for, seal_message, transcript_digest
from caltrain.client.served.session import Session
from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.errors import AccessError, ConfigError, IntegrityError
from caltrain.serving.package import ModelName, Package, match_package, open_package, user_of
from caltrain.serving.session import Offer, SessionOpened, SessionRequest, SessionSecret

MAX_OPENED = 2 << 20
_STEP = "verify served model"
_VERSION = re.compile(r"[1-9][0-9]{0,6}")


@dataclass(frozen=True)
class Expectations:
    """What a user relies on: the owner's public key, their own policy; and who they are."""

    owner: str
    policy: Policy
    user: str
    signer: SigningKey = field(repr=False)
    credential: Envelope | None = None
    """The issuer's, where the package does not name the user."""


@dataclass(frozen=True)
class Checked:
    """A verified package and enclave; `request` opens a session with it."""

    package: Package
    claims: Claims
    request: SessionRequest
    _key: bytes = field(repr=False)
    _transcript: str

    def open(self, sealed: bytes) -> Session:
        """The session. Raises IntegrityError for what another enclave, or one for another user, has sealed."""
        step = "open session"
        opened = open_for(self._key, "session-opened/v1", sealed, SessionOpened, context=self._transcript, step=step)
        return Session(self.package, self.claims, opened, self._key)


class Handshake:
    """One attempt: its nonce and session key are used once. `known` is the package that was served until now.

    Raises ConfigError `ask.bad-name`.
    """

    def __init__(
        self, expected: Expectations, model: str, version: str | None = None, *, known: Package | None = None
    ) -> None:
        check_names(model, version)
        self._expected, self._model, self._version, self._known = expected, model, version, known
        self._key = os.urandom(32)
        self.nonce = os.urandom(32).hex()

    def check(self, offer: Offer, *, now: datetime) -> Checked:
        """Verify an offer in the order above, then seal a session key to its enclave.

        Raises IntegrityError, ConfigError, AccessError `user.not-named`, `user.other-key`, AttestationError.
        """
        expected = self._expected
        package = open_package(offer.package, expected.owner)  # (1)
        self._check_model(package)  # (2)
        _check_user(package, expected)  # (3)
        claims = verify_evidence(
            offer.bundle, expected.policy, purpose="serving", plan=package.digest(), nonce=self.nonce, now=now
        )  # (4)
        match_package(claims.measurement, package)  # (5)
        binding = offer.bundle.binding
        sealed = seal_message(
            "session", SessionSecret(key=self._key), binding=binding, sender=expected.user, signer=expected.signer
        )
        request = SessionRequest(envelope=sealed, credential=expected.credential)
        return Checked(package, claims, request, self._key, transcript_digest(binding, expected.user))

    def _check_model(self, package: Package) -> None:
        terms = package.terms
        if terms.name != self._model or self._version not in {None, str(terms.revision)}:
            raise _refuse(
                "package.not-asked-for", f"the host shows {terms.name} {terms.revision}, another one was asked for"
            )
        known = self._known
        if known is None or same(package.digest(), known.digest()):
            return
        if terms.revision <= known.terms.revision:
            raise _refuse(
                "package.rolled-back",
                f"the host shows another package of revision {terms.revision}, after one of {known.terms.revision}",
            )
        if package.data != known.data:
            raise _refuse("package.other-schema", f"revision {terms.revision} takes other records or has other classes")


def check_names(model: str, version: str | None) -> None:
    """Raise ConfigError `ask.bad-name` for what no model and no version can be called."""
    try:
        msgspec.convert(model, ModelName)
    except msgspec.ValidationError:
        pass
    else:
        if version is None or _VERSION.fullmatch(version):
            return
    raise ConfigError(
        "ask.bad-name",
        "no model has that name or version",
        step=_STEP,
        fix="Names are lower case letters, digits, '_', '.' and '-'; versions are numbers from 1.",
    )


def _check_user(package: Package, expected: Expectations) -> None:
    if user_of(package, expected.user, expected.credential).public_key != expected.signer.public:
        raise AccessError(
            "user.other-key",
            f"the package or credential names another key for {expected.user}",
            step=_STEP,
            fix="Ask with the key that is named there, or ask the model's owner or issuer to name yours.",
        )


def _refuse(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code, what, step=_STEP, fix="Ask the model's owner which package is served; if they know nothing of it, refuse."
    )
