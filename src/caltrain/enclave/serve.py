"""A serving enclave: one package for its whole life, as a state machine; one table says what is accepted when.

    state    message                     handler                  next state
    -------  --------------------------  -----------------------  ----------
    new      LoadPackage                 load_package             loaded
    loaded   Attest                      attest                   loaded
    loaded   Grant                       grant                    serving
    serving  Attest                      attest                   serving
    serving  OpenSession, CloseSession   open_session, ...        serving
    serving  Infer                       infer                    serving
    serving  center-out tensors          take_output              serving
    serving  Abandon                     abandon                  serving
    any      Stop                                                 stopped

What fails changes nothing, save that nonces, numbers of lanes and budgets that were used stay used, and a batch whose
center part came is over. The service then goes on: no request of one user, and nothing that the center gives, may end
it for the others. Whoever restarts it cannot make budgets whole: a new enclave needs the owner's key anew.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from caltrain.attestation.evidence import Attester
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import Attest, Failed, Stop
from caltrain.boundary.sealed import SealedMessage, open_message, seal_for
from caltrain.boundary.serving import (
    SERVING_REQUESTS,
    Abandon,
    Admitted,
    Answered,
    CloseSession,
    Grant,
    Infer,
    LoadPackage,
    OpenSession,
    Served,
    ServingReply,
    ServingRequest,
)
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.door import Door
from caltrain.enclave.infer import Batches
from caltrain.enclave.run import present
from caltrain.enclave.served_model import ServedModel, load_model
from caltrain.enclave.sessions import Sessions
from caltrain.enclave.vault import Vault
from caltrain.errors import AccessError, AttestationError, CaltrainError, ProtocolError
from caltrain.models.wheel import Factory, load_wheel, no_wheel
from caltrain.serving.package import GrantReceipt, Package, PackageKey, match_package, open_package, user_of
from caltrain.serving.session import SessionOpened, SessionSecret

MAX_USED_NONCES = 1 << 16
Incoming = ServingRequest | tuple[TensorHead, Tensors]
Outgoing = tuple[ServingReply, Sequence[Tensor]]
"""A reply, and the IR that follows it, if any."""
_HARMLESS = frozenset({"tensor.malformed", "door.unexpected", "ring.out-of-range"})
"""Errors after which the next frame can be read as if nothing had been."""


class State(StrEnum):
    """Where the service is. It only moves forward."""

    NEW = "new"
    LOADED = "loaded"
    SERVING = "serving"
    STOPPED = "stopped"


@dataclass
class Service:
    """Everything that a serving enclave knows; optional fields fill as it moves on."""

    vault: Vault
    door: Door
    wheel: bytes = b""
    """The wheel that was measured with the program, if any."""
    draw: Callable[[], float] = secrets.SystemRandom().random
    state: State = State.NEW
    package: Package | None = None
    factory: Factory = no_wheel
    model: ServedModel | None = None
    sessions: Sessions | None = None
    batches: Batches | None = None


def serving_main(channel: Channel, attester: Attester, storage: Channel, *, wheel: bytes = b"") -> None:
    """Serve requests until `Stop` or the end of the stream (which raises EnvironmentFault)."""
    service = Service(Vault(attester, most_used=MAX_USED_NONCES), Door(channel, storage), wheel=wheel)
    while service.state is not State.STOPPED:
        try:
            incoming = channel.receive_any(SERVING_REQUESTS)
        except ProtocolError as error:
            if error.code not in _HARMLESS:
                raise
            channel.send(Failed(error.diagnostics(), fatal=False))
            continue
        reply, ir = handle(service, incoming)
        channel.send(reply)
        if isinstance(reply, Admitted) and ir:
            package = present(service.package)
            channel.send_tensors(ir, role="ir", run=package.id, epoch=0, step=reply.batch)


def handle(service: Service, incoming: Incoming) -> Outgoing:
    """One message or the center's tensors through the table. Never raises: an error becomes the reply."""
    if isinstance(incoming, Stop):
        service.state = State.STOPPED
        return Served(), ()
    try:
        handler, after = _look_up(service.state, incoming)
        outgoing = handler(service, incoming)
    except CaltrainError as error:
        return _failed(incoming, error), ()
    except Exception:  # noqa: BLE001  # what it says may hold anything: the host is told that it was, and no more
        what = f"the enclave failed unexpectedly while the service was {service.state}"
        return _failed(incoming, _refused("enclave.internal", what)), ()
    service.state = after
    return outgoing


def load_package(service: Service, message: LoadPackage) -> Outgoing:
    """Take the package to serve, if it names this program and its wheel. Whose it is, the evidence will say."""
    package = open_package(message.package)
    match_package(service.vault.attester.measurement, package)
    if (package.spec.wheel is None) != (not service.wheel):
        raise AttestationError(
            "package.wheel-missing",
            "the package names a wheel and the enclave was started without, or the reverse",
            step="load package",
            fix="Start the enclave with the wheel of the package.",
        )
    if package.spec.wheel is not None:
        service.factory = load_wheel(service.wheel, package.spec.wheel)
    service.package = package
    return Served(), ()


def attest(service: Service, message: Attest) -> Outgoing:
    """Evidence for the owner or a user: both bind the package."""
    if message.purpose != "serving":
        raise AttestationError(
            "attest.purpose",
            f"a serving enclave gives no evidence for {message.purpose}",
            step="attest",
            fix="Ask for evidence for serving.",
        )
    bundle = service.vault.attest("serving", plan=present(service.package).digest(), nonce=message.nonce)
    return Served(bundle=bundle), ()


def grant(service: Service, message: Grant) -> Outgoing:
    """Take the package's key from its owner, open its parts and begin to serve. Budgets count from here."""
    package, vault = present(service.package), service.vault
    sealed = open_envelope(message.envelope, "grant", package.owner, SealedMessage, step="grant")
    binding = vault.redeem(sealed, "serving")
    secret = open_message(sealed, PackageKey, binding=binding, key=vault.encryption, step="grant")
    model = load_model(package, secret.key, service.door, factory=service.factory)
    service.sessions = Sessions(package.digest(), (user.public_key for user in package.terms.users))
    service.model = model
    service.batches = Batches(package, model, service.sessions, draw=service.draw)
    return Served(signed=vault.signing.sign("grant-receipt", GrantReceipt(transcript=sealed.transcript))), ()


def open_session(service: Service, message: OpenSession) -> Outgoing:
    """Take a user's session key, if the package or a credential of its issuer names them by the key that signed."""
    package, vault = present(service.package), service.vault
    step, signer = "open session", message.envelope.signer
    sealed = open_envelope(message.envelope, "session", signer, SealedMessage, step=step)
    user = user_of(package, sealed.sender, message.credential)
    if user.public_key != signer:
        raise AccessError(
            "user.not-named",
            f"refused: {user.name} is named with another key than the one that signed",
            step=step,
            fix="Ask the model's owner to be named in the package, or its issuer for a credential.",
        )
    binding = vault.redeem(sealed, "serving")
    secret = open_message(sealed, SessionSecret, binding=binding, key=vault.encryption, step=step)
    sessions = present(service.sessions)
    session = sessions.open(user, secret.key)
    opened = SessionOpened(
        session=session.id,
        classes=present(service.model).classes,
        budget_left=sessions.left(user),
        simulated=vault.attester.simulated,
    )
    reply = seal_for(secret.key, "session-opened/v1", opened, context=sealed.transcript)
    return Served(session=session.id, sealed=reply), ()


def close_session(service: Service, message: CloseSession) -> Outgoing:
    """Forget a session. What it asked before is still answered."""
    present(service.sessions).close(message.session)
    return Served(), ()


def infer(service: Service, message: Infer) -> Outgoing:
    """Admit requests; the IR of the admitted ones goes out."""
    return present(service.batches).begin(message.batch, message.requests)


def take_output(service: Service, output: tuple[TensorHead, Tensors]) -> Outgoing:
    """What the center gave for a batch: answered."""
    return present(service.batches).finish(*output), ()


def abandon(service: Service, message: Abandon) -> Outgoing:
    """The center gives nothing for a batch."""
    return present(service.batches).abandon(message.batch), ()


Handler = Callable[[Service, Any], Outgoing]
TABLE: dict[tuple[State, type], tuple[Handler, State]] = {
    (State.NEW, LoadPackage): (load_package, State.LOADED),
    (State.LOADED, Attest): (attest, State.LOADED),
    (State.LOADED, Grant): (grant, State.SERVING),
    (State.SERVING, Attest): (attest, State.SERVING),
    (State.SERVING, OpenSession): (open_session, State.SERVING),
    (State.SERVING, CloseSession): (close_session, State.SERVING),
    (State.SERVING, Infer): (infer, State.SERVING),
    (State.SERVING, tuple): (take_output, State.SERVING),
    (State.SERVING, Abandon): (abandon, State.SERVING),
}


def _look_up(state: State, incoming: Incoming) -> tuple[Handler, State]:
    entry = TABLE.get((state, type(incoming)))
    if entry is None:
        what = "a tensor" if isinstance(incoming, tuple) else type(incoming).__name__
        raise _refused("session.not-now", f"{what} is not accepted while the service is {state}")
    return entry


def _failed(incoming: Incoming, error: CaltrainError) -> ServingReply:
    """Tensors are always answered as the batch that they claim to be of."""
    if isinstance(incoming, tuple):
        return Answered(incoming[0].step, error=error.diagnostics())
    return Failed(error.diagnostics(), fatal=False)


def _refused(code: str, what: str) -> ProtocolError:
    return ProtocolError(code, what, step="handle request", fix="Send requests in the order that the protocol gives.")
