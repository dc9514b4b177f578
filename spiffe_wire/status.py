"""
Kinds of error to gRPC status codes, both ways, in the one place that knows.

Source: SPIRE API 2.3, 3.1; conformance 3.1.  A denial of an agent carries a typed detail in
the trailer ``grpc-status-details-bin``, and the embedded status repeats code and message:
when they differ, SPIRE's agent reports INTERNAL and retries for ever.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from spiffe_core import errors
from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_wire.pb._pool import message
from spiffe_wire.pb.google.rpc import status_pb2
from spiffe_wire.pb.spire.api.types import status_pb2 as types_status_pb2

DETAILS_KEY: Final = "grpc-status-details-bin"
_Any = message("google.protobuf.Any")

STATUS: Final[Mapping[ErrorKind, grpc.StatusCode]] = {
    ErrorKind.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorKind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    ErrorKind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorKind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Workload Endpoint 6: clients retry UNAVAILABLE, never INVALID_ARGUMENT.
    ErrorKind.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorKind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorKind.ABORTED: grpc.StatusCode.ABORTED,
    ErrorKind.INTERNAL: grpc.StatusCode.INTERNAL,
}

_ERRORS: Final[Mapping[grpc.StatusCode, type[SpiffeError]]] = {
    STATUS[one.kind]: one
    for one in (
        errors.MalformedError, errors.NotFoundError, errors.AlreadyExistsError,
        errors.ForbiddenError, errors.UnauthenticatedError, errors.PreconditionError,
        errors.ExhaustedError, errors.NotReadyError, errors.UnsupportedError,
        errors.DeadlineError, errors.AbortedError, errors.InternalError,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an error is sent."""

    code: grpc.StatusCode
    text: str
    details: bytes | None = None

    @property
    def number(self) -> int:
        """The code as the number that batch results carry."""
        return int(self.code.value[0])


def status_of(error: Exception) -> Outcome:
    """Return how *error* is sent; a stranger's error says nothing."""
    if isinstance(error, AgentDeniedError):
        return Outcome(grpc.StatusCode.PERMISSION_DENIED, str(error), _details(error))
    if isinstance(error, SpiffeError):
        return Outcome(STATUS[error.kind], str(error))
    return Outcome(grpc.StatusCode.INTERNAL, "internal error")


def error_of(error: grpc.aio.AioRpcError) -> SpiffeError:
    """Return the error of ours that a server's answer stands for."""
    text = error.details() or error.code().name
    reason = _reason_of(error)
    if reason is not None:
        return AgentDeniedError(text, reason)
    return _ERRORS.get(error.code(), errors.InternalError)(text)


def _details(error: AgentDeniedError) -> bytes:
    status = status_pb2.Status(
        code=grpc.StatusCode.PERMISSION_DENIED.value[0], message=str(error)
    )
    detail = _Any()
    detail.Pack(types_status_pb2.PermissionDeniedDetails(reason=int(error.reason)))
    status.details.append(detail)
    return bytes(status.SerializeToString())


def _reason_of(error: grpc.aio.AioRpcError) -> DenialReason | None:
    """The reason in the trailer of a denial; what cannot be read is none."""
    if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
        return None
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        with contextlib.suppress(DecodeError):
            for detail in status_pb2.Status.FromString(value).details:
                denied = types_status_pb2.PermissionDeniedDetails()
                if detail.Unpack(denied) and denied.reason in set(DenialReason):
                    return DenialReason(denied.reason)
    return None


# How grpcio's own words begin when no answer came; a server's words are its own.
_NO_ANSWER: Final = (
    "failed to connect", "connections to all backends", "Socket closed", "recvmsg:", "sendmsg:",
    "Stream removed", "Connection reset", "Broken pipe", "GOAWAY", "Endpoint closing",
)  # fmt: skip


def never_answered(error: grpc.aio.AioRpcError) -> bool:
    """True when nobody answered, so that UNAVAILABLE is no server's word."""
    said = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and said.startswith(_NO_ANSWER)
