"""The security header at the wire: what counts as one, for every kind of method (SEC-38)."""

from collections.abc import AsyncIterator

import grpc
import pytest

from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.interceptors import ErrorInterceptor
from spiffe_wire.security_header import (
    KEY,
    METADATA,
    VALUE,
    SecurityHeaderInterceptor,
    has_header,
)
from tests.support.door import CHAT, ECHO, GATHER, HOLD, Door, Echo, call
from tests.support.http2 import HEADERS, OPENING, request
from tests.support.stack import a_folder

RIGHT = (KEY, VALUE)
WRONG = {
    "none": (),
    "no value": ((KEY, ""),),
    "True": ((KEY, "True"),),
    "TRUE": ((KEY, "TRUE"),),
    "1": ((KEY, "1"),),
    "yes": ((KEY, "yes"),),
    "false": ((KEY, "false"),),
    "truetrue": ((KEY, "truetrue"),),
    "two in one": ((KEY, "true,true"),),
    "twice": (RIGHT, RIGHT),
    "right and wrong": (RIGHT, (KEY, "false")),
    "wrong and right": ((KEY, "false"), RIGHT),
    "the broker's": (("broker.spiffe.io", "true"),),
    "another key": (("x-workload.spiffe.io", "true"),),
    "binary": ((f"{KEY}-bin", b"true"),),
}
METHODS = [
    ECHO,
    "/SpiffeWorkloadAPI/FetchX509SVID",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/test.Echo/Nothing",
    "/no.Such/Method",
]


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """A door that demands the header, as the workload socket does."""
    echo = Echo()
    interceptors = [SecurityHeaderInterceptor(), ErrorInterceptor()]
    with a_folder() as folder:
        async with FrontDoor(
            echo.register, runtime_dir=folder / "i", interceptors=interceptors
        ) as made:
            await made.listen_unix(folder / "s", mode=0o600)
            yield Door("unix", made, echo, folder, folder / "s")


@pytest.mark.parametrize("what", WRONG)
async def test_wep_08_what_is_no_header(what: str, door: Door) -> None:
    """WEP-08, WEP-09, SEC-38: all but one header of exactly this value is refused with 3."""
    async with door.channel() as channel:
        for method in METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(channel, method, metadata=WRONG[what])
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "security header missing" in refused.value.details()
    assert door.echo.held == 0


async def test_wep_07_with_the_header(door: Door) -> None:
    """WEP-07, WEP-23: with it a known method is served, and an unknown one is UNIMPLEMENTED."""
    async with door.channel() as channel:
        assert await call(channel, ECHO, b"x", metadata=METADATA) == b"x"
        extra = (("a", "b"), *METADATA, ("z", "y"))
        assert await call(channel, ECHO, b"x", metadata=extra) == b"x"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await call(channel, "/no.Such/Method", metadata=METADATA)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_wep_08_every_shape_of_call(door: Door) -> None:
    """WEP-08: streams are refused like unary calls, before a message of theirs is read."""
    async with door.channel() as channel:
        calls = [
            channel.unary_stream(HOLD)(b"", timeout=5),
            channel.stream_unary(GATHER)(iter([b"a"]), timeout=5),
            channel.stream_stream(CHAT)(iter([b"a"]), timeout=5),
        ]
        for one in calls:
            assert await one.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not door.echo.entered.is_set()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(KEY, "true")], 0),
        ([(KEY, "true"), (KEY, "true")], 3),
        ([(KEY, " true")], 3),
        ([(KEY, "true ")], 3),
        ([(KEY, "tr\tue")], 3),
        ([(KEY, "true, true")], 3),
    ],
)
async def test_sec_38_by_hand(headers: list[tuple[str, str]], status: int, door: Door) -> None:
    """SEC-38: the same for clients that send what a gRPC library would not."""
    async with door.raw() as client:
        await client.send(OPENING, request(1, ECHO, b"x", headers))
        while (answer := await client.until(HEADERS, 1)) is not None:
            if answer.grpc_status is not None:
                break
        assert answer is None or answer.grpc_status == status
        assert answer is not None or status


@pytest.mark.parametrize(
    "key", ["Workload.Spiffe.Io", "WORKLOAD.SPIFFE.IO", "workload.Spiffe.io"]
)
async def test_sec_38_the_case_of_the_key(key: str, door: Door) -> None:
    """SEC-38: HTTP/2 names are lower case; another spelling is not served."""
    async with door.raw() as client:
        await client.send(OPENING, request(1, ECHO, b"x", [(key, "true")]))
        answer = await client.until(HEADERS, 1)
        assert answer is None or answer.grpc_status not in (None, 0)


def test_no_metadata_is_no_header() -> None:
    """SEC-38: a call without any metadata has no header."""
    assert not has_header(None)
    assert not has_header(())
    assert has_header(METADATA)
