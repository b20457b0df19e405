"""Waiting for a run to end, through deaths of the host and of its enclave."""

from __future__ import annotations

import time
from collections.abc import Callable

from caltrain.errors import CaltrainError, EnvironmentFault, ProvisioningError, from_wire
from caltrain.host_client import HostClient, RunStatus

OnStep = Callable[[str], None]
OnStatus = Callable[[RunStatus], None]
_PASSING = {
    "host.unreachable": "the host does not answer; waiting for it to come back",
    "enclave.died": "the enclave has ended; waiting for the operator to resume the run",
    "enclave.did-not-start": "the enclave has not started; waiting for the operator to resume the run",
}
_POLL = 0.5


def wait_through(
    host: HostClient,
    phases: set[str],
    *,
    party: str,
    deadline: float,
    on_status: OnStatus,
    on_step: OnStep,
) -> RunStatus:
    """Poll until the run is in one of `phases`; a host or enclave that is gone is waited for.

    `deadline` is a time of the monotonic clock. Raises the run's other errors and those of `on_status`; after the
    deadline what is still wrong, or EnvironmentFault `host.too-slow`; ProvisioningError `join.begun-anew`.
    """
    said = ""
    while True:
        status, error = _status(host, on_status)
        if status is not None and status.phase in phases:
            return status
        now = _PASSING[error.code] if error is not None else _wanted(status, party)
        if now and now != said:
            on_step(now)
        elif said and not now:
            on_step("the run goes on")
        said = now
        if time.monotonic() > deadline:
            raise error or EnvironmentFault(
                "host.too-slow",
                f"the run is still in phase {status.phase if status else ''!r:.60}",
                step=f"wait for {' or '.join(sorted(phases))}",
                fix="Ask those who are waited for, or wait longer with --timeout.",
            )
        time.sleep(_POLL)


def _status(host: HostClient, on_status: OnStatus) -> tuple[RunStatus | None, CaltrainError | None]:
    """The run's status, or the error that may pass."""

    def looked(status: RunStatus) -> None:
        if status.phase in {"approvals", "provisioning"}:
            raise ProvisioningError(
                "join.begun-anew",
                "the host has begun another run: the one that was countersigned will not come to an end",
                step="wait for the run",
                fix="Ask the operator. If the parties agree to that, join the new run with --allow-second-manifest.",
            )
        on_status(status)

    return glance(host, looked)


def glance(host: HostClient, on_status: OnStatus) -> tuple[RunStatus | None, CaltrainError | None]:
    """The run's status, or the error that may pass. Raises any other, and those of `on_status`."""
    try:
        status = host.status()
        if status.error is not None:
            raise from_wire(status.error)
        on_status(status)
    except EnvironmentFault as error:
        if error.code not in _PASSING:
            raise
        return None, error
    return status, None


def _wanted(status: RunStatus | None, party: str) -> str:
    """What the party is told while it is waited for itself."""
    if status is None or party not in status.waiting_for:
        return ""
    commands = {"resume": "party rejoin", "cut": "party agree-cut", "assess": "party assess"}
    command = commands.get(status.phase)
    return f"the run waits for your word: caltrain {command}" if command else ""
