"""Errors of ours as gRPC sends them, and back (style 4, SPIRE API 2.3 and 3.1)."""

import grpc
import pytest
from google.protobuf import any_pb2
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spiffe_core import errors
from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_core.permission import AgentDeniedError, DenialReason
from spiffe_wire.pb._pool import message
from spiffe_wire.pb.google.rpc import status_pb2
from spiffe_wire.pb.spire.api.types import status_pb2 as types_status_pb2
from spiffe_wire.status import DETAILS_KEY, STATUS, error_of, status_of

patient = hypothesis_settings(deadline=None)  # the machine may be busy

ERRORS = [
    one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, SpiffeError) and one is not SpiffeError
]
# Conformance 3.1 and SPIRE API 3.1, written out a second time.
CODES = {
    "MALFORMED": 3,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "FORBIDDEN": 7,
    "UNAUTHENTICATED": 16,
    "PRECONDITION": 9,
    "EXHAUSTED": 8,
    "NOT_READY": 14,
    "UNSUPPORTED": 12,
    "DEADLINE": 4,
    "ABORTED": 10,
    "INTERNAL": 13,
}


def an_answer(
    code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED,
    text: str = "no",
    details: "bytes | str | None" = None,
) -> grpc.aio.AioRpcError:
    """What a client of ours is told."""
    trailers = () if details is None else ((DETAILS_KEY, details),)
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, grpc.aio.Metadata(*trailers), details=text)


def test_every_kind_has_a_status() -> None:
    """A new kind of error can't be added without saying how it is sent."""
    assert set(STATUS) == set(ErrorKind)
    assert {kind.name: code.value[0] for kind, code in STATUS.items()} == CODES


@pytest.mark.parametrize("kind", ERRORS, ids=lambda one: one.__name__)
def test_there_and_back(kind: type[SpiffeError]) -> None:
    """Each error arrives as its kind, with its text."""
    sent = status_of(kind("why it is so"))
    assert (sent.number, sent.text, sent.details) == (
        CODES[kind.kind.name],
        "why it is so",
        None,
    )
    back = error_of(an_answer(sent.code, sent.text))
    assert (type(back), str(back)) == (kind, "why it is so")


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_code_is_an_error_of_ours(code: grpc.StatusCode) -> None:
    """A code that we never send is INTERNAL when it comes; no text at all becomes its name."""
    back = error_of(an_answer(code, ""))
    assert str(back) == code.name
    if code not in STATUS.values():
        assert type(back) is errors.InternalError


@pytest.mark.parametrize(
    "stranger",
    [ValueError("join token s3cret"), KeyError("s3cret"), RuntimeError(), OSError(2, "s3cret")],
    ids=repr,
)
def test_sec_90_a_strangers_error_says_nothing(stranger: Exception) -> None:
    """SEC-90: the text of an exception that is not ours never reaches a peer."""
    sent = status_of(stranger)
    assert (sent.code, sent.text) == (grpc.StatusCode.INTERNAL, "internal error")


def test_sec_90_the_cause_is_not_sent() -> None:
    """SEC-90: what an error of ours was raised from stays with us."""
    try:
        try:
            raise ValueError("s3cret")
        except ValueError as cause:
            raise errors.NotFoundError("no such entry") from cause
    except errors.NotFoundError as error:
        assert status_of(error).text == "no such entry"


@pytest.mark.parametrize("reason", DenialReason)
def test_denials_are_typed(reason: DenialReason) -> None:
    """SPIRE API 2.3: a denial's trailer repeats code and text, and holds the reason as Any."""
    sent = status_of(AgentDeniedError("agent is banned", reason))
    assert sent.code is grpc.StatusCode.PERMISSION_DENIED and sent.details is not None
    inside = status_pb2.Status.FromString(sent.details)
    assert (inside.code, inside.message) == (7, "agent is banned")
    (detail,) = inside.details
    assert detail.type_url == "type.googleapis.com/spire.api.types.PermissionDeniedDetails"
    assert types_status_pb2.PermissionDeniedDetails.FromString(detail.value).reason == reason
    back = error_of(an_answer(sent.code, sent.text, sent.details))
    assert isinstance(back, AgentDeniedError)
    assert (back.reason, str(back)) == (reason, "agent is banned")


def details_with(reason: int, kind: str = "spire.api.types.PermissionDeniedDetails") -> bytes:
    """A trailer with one detail."""
    status = status_pb2.Status(code=7, message="no")
    value = types_status_pb2.PermissionDeniedDetails(reason=reason).SerializeToString()
    status.details.append(
        message("google.protobuf.Any")(type_url=f"type.googleapis.com/{kind}", value=value)
    )
    return bytes(status.SerializeToString())


@pytest.mark.parametrize(
    "details",
    [
        None,
        b"",
        b"\xff\xff",
        details_with(99),
        details_with(4, "google.rpc.BadRequest"),
        details_with(4).replace(b"\x08\x04", b"\x08"),
    ],
    ids=["none", "empty", "garbage", "unknown reason", "another type", "cut off"],
)
def test_a_denial_without_a_reason(details: "bytes | None") -> None:
    """SEC-95: a trailer that is missing, foreign or broken makes a plain denial."""
    back = error_of(an_answer(details=details))
    assert type(back) is errors.ForbiddenError


def test_only_a_denial_has_a_reason() -> None:
    """SPIRE API 2.3: the detail counts with PERMISSION_DENIED alone."""
    back = error_of(an_answer(grpc.StatusCode.UNAVAILABLE, "later", details_with(4)))
    assert type(back) is errors.NotReadyError


@patient
@given(st.binary(max_size=60), st.sampled_from(list(grpc.StatusCode)), st.text(max_size=20))
def test_any_answer_is_an_error_of_ours(
    details: bytes, code: grpc.StatusCode, text: str
) -> None:
    """Whatever a server puts into its trailers, a client of ours raises one of our errors."""
    assert isinstance(error_of(an_answer(code, text, details)), SpiffeError)


def test_our_any_is_not_the_global_one() -> None:
    """T-29: the details use the class of our own pool."""
    assert message("google.protobuf.Any") is not any_pb2.Any
