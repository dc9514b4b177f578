"""
The one family of errors raised on purpose.

A kind says what the outcome is, never how it is sent: gRPC and HTTP each map it
once (`spiffe_wire.status`).  Source: design, style 4.
"""

import enum
from typing import ClassVar


class ErrorKind(enum.Enum):
    """The outcome of a refused or failed request."""

    MALFORMED = enum.auto()
    """What the caller sent breaks a rule; sending it again cannot help."""
    NOT_FOUND = enum.auto()
    ALREADY_EXISTS = enum.auto()
    FORBIDDEN = enum.auto()
    """We know who calls, and the answer is no."""
    UNAUTHENTICATED = enum.auto()
    """We cannot tell who calls."""
    PRECONDITION = enum.auto()
    """Right request, wrong state; an operator has to act first."""
    EXHAUSTED = enum.auto()
    """A limit of ours (security requirements, table 1) was reached."""
    NOT_READY = enum.auto()
    """Starting, overloaded, cut off or shutting down: try again with back-off."""
    UNSUPPORTED = enum.auto()
    """This build or configuration does not offer it."""
    DEADLINE = enum.auto()
    ABORTED = enum.auto()
    """Lost a race against another change: read again, then retry."""
    INTERNAL = enum.auto()


class SpiffeError(Exception):
    """
    Base of every error raised on purpose.

    The message may reach the peer.  What the peer must not see goes into the
    exception this one is raised from, and so only into the log.
    """

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


class MalformedError(SpiffeError):
    """Somebody's bytes break a rule; the message names the rule, never the bytes."""

    kind = ErrorKind.MALFORMED


class NotFoundError(SpiffeError):
    """No such thing, or none that this caller may know of."""

    kind = ErrorKind.NOT_FOUND


class AlreadyExistsError(SpiffeError):
    """It is there already; nothing was changed."""

    kind = ErrorKind.ALREADY_EXISTS


class ForbiddenError(SpiffeError):
    """The caller is known and may not."""

    kind = ErrorKind.FORBIDDEN


class UnauthenticatedError(SpiffeError):
    """The caller cannot be identified."""

    kind = ErrorKind.UNAUTHENTICATED


class PreconditionError(SpiffeError):
    """The state does not allow it now."""

    kind = ErrorKind.PRECONDITION


class ExhaustedError(SpiffeError):
    """A limit was reached; the refusal is cheap and changes nothing."""

    kind = ErrorKind.EXHAUSTED


class NotReadyError(SpiffeError):
    """Not now; retry with back-off."""

    kind = ErrorKind.NOT_READY


class UnsupportedError(SpiffeError):
    """Not offered; the message says why."""

    kind = ErrorKind.UNSUPPORTED


class DeadlineError(SpiffeError):
    """It took longer than its limit."""

    kind = ErrorKind.DEADLINE


class AbortedError(SpiffeError):
    """Another change came first."""

    kind = ErrorKind.ABORTED


class InternalError(SpiffeError):
    """Our own fault, or that of something we rely on; never the caller's."""

    kind = ErrorKind.INTERNAL
