"""Hand a package's key to an enclave whose evidence was verified, and again when it was restarted."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from caltrain.attestation.verify import Claims, Policy, verify_evidence
from caltrain.boundary.sealed import seal_message, transcript_digest
from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.errors import EnvironmentFault, ProvisioningError
from caltrain.host_client import HostClient
from caltrain.owner.package import package_key
from caltrain.serving.package import OWNER, GrantReceipt, Package, PackageKey, match_package
from caltrain.serving.session import Offer

_STEP = "hand over key"


def grant(
    host: HostClient,
    package: Package,
    policy: Policy,
    *,
    signer: SigningKey,
    data_key: bytes,
    clock: Callable[[], datetime],
) -> Claims:
    """Verify the serving enclave of `package` and give it the key of the sealed part; returns what it proved.

    With the key all budgets begin anew: whoever restarts the enclave needs the owner for it.
    Raises AttestationError before anything is sealed, ProvisioningError `grant.other-receipt`, the error of the host.
    """
    nonce = os.urandom(32).hex()
    asked = {"nonce": nonce, "model": package.terms.name, "version": str(package.terms.revision)}
    bundle = host.get("/attestation", Offer, params=asked).bundle
    claims = verify_evidence(bundle, policy, purpose="serving", plan=package.digest(), nonce=nonce, now=clock())
    match_package(claims.measurement, package)
    secret = PackageKey(key=package_key(data_key, package.id))
    envelope = seal_message("grant", secret, binding=bundle.binding, sender=OWNER, signer=signer)
    receipt = host.post(f"{_path(package)}/grant", envelope, Envelope)
    said = open_envelope(receipt, "grant-receipt", bundle.binding.signing_key, GrantReceipt, step=_STEP)
    if not same(said.transcript, transcript_digest(bundle.binding, OWNER)):
        raise ProvisioningError(
            "grant.other-receipt",
            "the enclave's receipt is for another message",
            step=_STEP,
            fix="Ask the operator which enclave answers there, and hand over the key again.",
        )
    return claims


def await_enclave(host: HostClient, package: Package, *, tries: int, pause: Callable[[], None] = lambda: None) -> None:
    """Wait, a `pause` between two of at most `tries`, until the enclave is up; `grant` says so where it is not."""
    for _ in range(tries):
        if _lack(host, package) != "serving.starting":
            break
        pause()


def watch_enclave(
    host: HostClient,
    package: Package,
    again: Callable[[], Claims],
    *,
    at_most: int,
    pause: Callable[[], None],
    on_grant: Callable[[Claims], None],
) -> None:
    """Call `again` whenever the enclave waits for its key, `at_most` times; a host that is away is waited for."""
    granted = 0
    while granted < at_most:
        if _lack(host, package) == "serving.no-key":
            granted += 1  # also if it fails then: the key may have come through
            with suppress(EnvironmentFault):
                on_grant(again())
        pause()


def _lack(host: HostClient, package: Package) -> str:
    """By its code, why the model is not ready; empty where it is."""
    try:
        host.check(f"{_path(package)}/ready")
    except EnvironmentFault as error:
        return error.code
    return ""


def _path(package: Package) -> str:
    return f"/v2/models/{package.terms.name}/versions/{package.terms.revision}"
