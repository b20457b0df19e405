"""The named errors of the serving host: each has one place, and says what a caller does next."""

from __future__ import annotations

from caltrain.errors import AccessError, CaltrainError, DataError, EnvironmentFault, ProtocolError

Outcome = bytes | CaltrainError
"""A sealed answer, or why there is none."""


def restarted() -> EnvironmentFault:
    """The enclave died."""
    return EnvironmentFault(
        "serving.restarted",
        "the enclave ended before it answered; what it held is gone",
        step="infer",
        fix="Attest again, open a new session and ask again.",
    )


def starting() -> EnvironmentFault:
    """There is no enclave yet."""
    return EnvironmentFault(
        "serving.starting", "the enclave is being started", step="find enclave", fix="Try again in a few seconds."
    )


def no_key() -> EnvironmentFault:
    """The owner's key is not there yet."""
    return EnvironmentFault(
        "serving.no-key",
        "the model's owner has not handed the enclave its key yet",
        step="find enclave",
        fix="Try again once the owner has granted it.",
    )


def busy(what: str) -> EnvironmentFault:
    """Too much is waiting."""
    return EnvironmentFault("serving.busy", what, step="queue request", fix="Try again in a second.")


def draining() -> EnvironmentFault:
    """Nothing new is begun."""
    return EnvironmentFault(
        "serving.draining",
        "this enclave or its server is about to stop",
        step="queue request",
        fix="Attest again and open a new session in a few seconds.",
    )


def too_slow(seconds: float) -> EnvironmentFault:
    """The caller has waited long enough."""
    return EnvironmentFault(
        "serving.too-slow",
        f"no answer came within {seconds:g} seconds",
        step="infer",
        fix="Ask again with a new number; ask with fewer records at a time.",
    )


def center_failed() -> EnvironmentFault:
    """The CenterNet could not compute a batch."""
    return EnvironmentFault(
        "center.failed",
        "the host could not compute its part of the model for this batch",
        step="infer",
        fix="Try again; if it repeats, the operator looks at the server's log.",
    )


def session_busy(what: str) -> AccessError:
    """One session, or all of one user, have too much under way."""
    return AccessError(
        "session.busy",
        f"{what}, the most that there may be",
        step="queue request",
        fix="Wait for answers before asking more.",
    )


def session_unknown() -> ProtocolError:
    """A session that is not, or no longer, one of this enclave."""
    return ProtocolError(
        "session.unknown",
        "the request belongs to no open session of this model's enclave",
        step="find session",
        fix="Attest again and open a new session.",
    )


def model_unknown(what: str) -> AccessError:
    """No such model, or no such version of it."""
    return AccessError("model.unknown", what, step="find model", fix="Ask for one that the server lists or was given.")


def bad_rows(what: str) -> DataError:
    """A request that cannot hold whole records, or holds too many."""
    return DataError(
        "request.rows", what, step="read request", fix="Send whole records, as many as the package allows at a time."
    )
