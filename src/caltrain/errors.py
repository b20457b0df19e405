"""Errors that say what failed, at which step, and what to do.

    CaltrainError
    ├── ConfigError         a plan, a policy or an option is not usable            exit 10
    ├── DataError           records do not fit the schema, or cannot be read       exit 11
    ├── IntegrityError      sealed bytes, a signature or a digest do not verify    exit 12
    ├── AttestationError    evidence was refused by a policy                       exit 13
    ├── ProvisioningError   a key was not handed over, or not accepted             exit 14
    ├── ProtocolError       a message that is not allowed here, or is malformed    exit 15
    ├── AccessError         the caller is not named for this, or the budget is spent  exit 16
    ├── LineageError        a commitment, proof or chain does not match            exit 17
    └── EnvironmentFault    port in use, disk full, a process that died            exit 18

Codes are stable (`family.reason`); `docs/errors.md` has one entry for each.
"""

from __future__ import annotations

from typing import Any, ClassVar

# What decoding untrusted JSON, MessagePack or TOML can raise: wrong form and bad UTF-8, nesting without end.
UNDECODABLE = (ValueError, RecursionError)
# What figures that cannot be worked out raise: no convergence, a singular matrix, a class without records.
UNCOMPUTABLE = (ArithmeticError, LookupError, RuntimeError, ValueError)
_MAX_WIRE_TEXT = 2_000


class CaltrainError(Exception):
    """Root of all errors that this package raises on purpose.

    `code` is stable, `what` says what failed, `step` where, `fix` what to do next.
    """

    exit_code: ClassVar[int] = 1
    reported = False
    """Whether the error is another side's own report (`from_wire`): its words are that side's."""

    def __init__(self, code: str, what: str, *, step: str, fix: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.step = step
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.code}: {self.what} (step: {self.step}). {self.fix}"

    def diagnostics(self) -> dict[str, str]:
        """The error as plain text fields: what a screen prints and a wire carries."""
        return {
            "family": type(self).__name__,
            "code": self.code,
            "what": self.what,
            "step": self.step,
            "fix": self.fix,
        }


class ConfigError(CaltrainError):
    """A plan, a policy or an option is not usable."""

    exit_code = 10


class DataError(CaltrainError):
    """Records do not fit the schema, or cannot be read."""

    exit_code = 11


class IntegrityError(CaltrainError):
    """Sealed bytes, a signature or a digest do not verify."""

    exit_code = 12


class AttestationError(CaltrainError):
    """Evidence was refused by a policy."""

    exit_code = 13


class ProvisioningError(CaltrainError):
    """A key was not handed over, or not accepted."""

    exit_code = 14


class ProtocolError(CaltrainError):
    """A message that is not allowed here, or is malformed."""

    exit_code = 15


class AccessError(CaltrainError):
    """The caller is not named for this, or the budget is spent."""

    exit_code = 16


class LineageError(CaltrainError):
    """A commitment, an inclusion proof or the event chain does not match."""

    exit_code = 17


class EnvironmentFault(CaltrainError):
    """The machine: a port in use, a full disk, a process that died."""

    exit_code = 18


FAMILIES: dict[str, type[CaltrainError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        DataError,
        IntegrityError,
        AttestationError,
        ProvisioningError,
        ProtocolError,
        AccessError,
        LineageError,
        EnvironmentFault,
    )
}


def from_wire(fields: object) -> CaltrainError:
    """Rebuild an error that the other side reported. Never raises: the text is untrusted and bounded."""
    table: dict[str, Any] = fields if isinstance(fields, dict) else {}

    def text(key: str, default: str) -> str:
        value = table.get(key)
        if not isinstance(value, str):
            return default
        # Control characters would let the other side write over the reader's terminal.
        return "".join(c for c in value[:_MAX_WIRE_TEXT] if c.isprintable()) or default

    family = FAMILIES.get(text("family", ""), ProtocolError)
    error = family(
        text("code", "protocol.unreadable-error"),
        text("what", "the other side failed without a readable error"),
        step=text("step", "remote"),
        fix=text("fix", "Look at the log of the other side."),
    )
    error.reported = True
    return error
