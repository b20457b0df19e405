"""The enclave as a state machine without I/O of its own: one table says what is accepted when, and what follows.

    state      message             handler            next state
    ---------  ------------------  -----------------  ---------------------------------------
    new        Configure           configure          enrolling
    new        Resume              resume             resuming
    resuming   Attest, Rejoin      attest, rejoin     resuming; with the quorum where the run was
    enrolling  Attest, Provision   attest, provision  enrolling
    enrolling  MakeManifest        make_manifest      agreeing
    agreeing   Countersign         countersign        agreeing, agreed with the last signature
    agreed     Ingest              ingest             ready
    ready      Train               train              ready, trained after the last epoch
    ready      Assess              assess             ready, assessing where the parties vote
    assessing  Vote                vote               assessing, ready with the last vote
    ready      MoveCut             move_cut           ready
    trained    Hunt                hunt               hunted
    hunted     Release             release            released
    released   Link                link               linked
    linked     Attest, Query, RecordDisclosure        linked
    any        Stop                                   stopped

A request that fails before the run began (up to `agreeing`), while votes are due, or after it ended (`linked`) changes
nothing, save that the nonce and the budget that it used stay used; one that fails between leaves a run that cannot be
trusted, so it stops for good, with an event that says why. A request that the table does not have is refused without
either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from caltrain.attestation.evidence import Attester
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import (
    REQUESTS,
    Assess,
    Attest,
    Configure,
    Countersign,
    Done,
    Failed,
    Hunt,
    Ingest,
    Link,
    MakeManifest,
    MoveCut,
    Provision,
    Query,
    RecordDisclosure,
    Rejoin,
    Release,
    Reply,
    Request,
    Resume,
    Stop,
    Train,
    Vote,
)
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.answer import query, record_disclosure
from caltrain.enclave.assess import assess, vote
from caltrain.enclave.cut import move_cut
from caltrain.enclave.door import Door
from caltrain.enclave.enrol import attest, configure, countersign, make_manifest, provision
from caltrain.enclave.hunt import hunt
from caltrain.enclave.ingest import ingest
from caltrain.enclave.release import link, release
from caltrain.enclave.resume import rejoin, resume
from caltrain.enclave.run import Run, State
from caltrain.enclave.train import train
from caltrain.enclave.vault import Vault
from caltrain.errors import CaltrainError, LineageError, ProtocolError
from caltrain.provenance.chain import Chain
from caltrain.training.prefetch import Prefetch

Handler = Callable[[Run, Any], tuple[Done, State]]
TABLE: dict[tuple[State, type], tuple[Handler, frozenset[State]]] = {
    (State.NEW, Configure): (configure, frozenset({State.ENROLLING})),
    (State.NEW, Resume): (resume, frozenset({State.RESUMING})),
    (State.RESUMING, Attest): (attest, frozenset({State.RESUMING})),
    (State.RESUMING, Rejoin): (rejoin, frozenset({State.RESUMING, State.AGREED, State.READY, State.TRAINED})),
    (State.ENROLLING, Attest): (attest, frozenset({State.ENROLLING})),
    (State.ENROLLING, Provision): (provision, frozenset({State.ENROLLING})),
    (State.ENROLLING, MakeManifest): (make_manifest, frozenset({State.AGREEING})),
    (State.AGREEING, Countersign): (countersign, frozenset({State.AGREEING, State.AGREED})),
    (State.AGREED, Ingest): (ingest, frozenset({State.READY})),
    (State.READY, Train): (train, frozenset({State.READY, State.TRAINED})),
    (State.READY, Assess): (assess, frozenset({State.READY, State.ASSESSING})),
    (State.ASSESSING, Vote): (vote, frozenset({State.ASSESSING, State.READY})),
    (State.READY, MoveCut): (move_cut, frozenset({State.READY})),
    (State.TRAINED, Hunt): (hunt, frozenset({State.HUNTED})),
    (State.HUNTED, Release): (release, frozenset({State.RELEASED})),
    (State.RELEASED, Link): (link, frozenset({State.LINKED})),
    (State.LINKED, Attest): (attest, frozenset({State.LINKED})),
    (State.LINKED, Query): (query, frozenset({State.LINKED})),
    (State.LINKED, RecordDisclosure): (record_disclosure, frozenset({State.LINKED})),
}
_HARMLESS = frozenset({State.NEW, State.ENROLLING, State.RESUMING, State.AGREEING, State.ASSESSING, State.LINKED})


def enclave_main(
    channel: Channel,
    attester: Attester,
    storage: Channel | None = None,
    *,
    wheel: bytes = b"",
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Serve requests until `Stop` or the end of the stream (which raises EnvironmentFault). `clock` gives seconds."""
    vault = Vault(attester)
    chain = Chain(vault.signing, run=vault.run)
    run = Run(vault=vault, door=Door(channel, storage), chain=chain, wheel=wheel, clock=clock)
    while run.state is not State.STOPPED:
        request = channel.receive(REQUESTS)
        channel.send(handle(run, request))


def handle(run: Run, request: Request) -> Reply:
    """One request through the table. Never raises: an error becomes a `Failed` reply, one of our own makes it fatal."""
    if isinstance(request, Stop):
        run.state = State.STOPPED
        return Done()
    before, fatal = run.state, False
    run.pending.clear()
    try:
        handler, allowed = _look_up(before, request)
        # Decided before the handler runs: the code of its error may be the host's own words.
        fatal = before not in _HARMLESS
        reply, after = handler(run, request)
        if after not in allowed:
            raise _refused("session.other-state", f"{type(request).__name__} led from {before} to {after}")
        events = tuple(run.chain.append(kind, body) for kind, body in run.pending)
    except CaltrainError as error:
        return Failed(error.diagnostics(), fatal, _stopped(run, error) if fatal else ())
    except Exception:  # noqa: BLE001  # what it says may hold anything: the host is told that it was, and no more
        internal = _refused("enclave.internal", f"the enclave failed unexpectedly while the run was {before}")
        return Failed(internal.diagnostics(), fatal=True, events=_stopped(run, internal))
    run.state = after
    return msgspec.structs.replace(reply, events=events)


def _stopped(run: Run, error: CaltrainError) -> tuple[Envelope, ...]:
    """The run ends here. The chain says why, or only that the host said so: its words are not signed."""
    before, run.state = run.state, State.STOPPED
    if isinstance(run.batches, Prefetch):
        run.batches.stop()
    why = "host.reported" if error.reported else error.code
    try:
        return (run.chain.append("stopped", {"state": before, "code": why}),)
    except LineageError:  # the chain is full
        return ()


def _look_up(state: State, request: Request) -> tuple[Handler, frozenset[State]]:
    entry = TABLE.get((state, type(request)))
    if entry is None:
        raise _refused("session.not-now", f"{type(request).__name__} is not accepted while the run is {state}")
    return entry


def _refused(code: str, what: str) -> ProtocolError:
    return ProtocolError(code, what, step="handle request", fix="Send requests in the order that the protocol gives.")
