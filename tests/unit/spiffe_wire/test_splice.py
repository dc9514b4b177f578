"""Two legs, one byte stream: nothing is lost, reordered or left open (rules for the splice)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from spiffe_wire.frontdoor.conduct import ConductError
from spiffe_wire.frontdoor.splice import Leg, join, notice_dead_peer
from tests.support.door import eventually, on_both_loops

MANY = bytes(range(256)) * 4096  # 1 MiB


async def read_all(end: socket.socket, size: int) -> bytes:
    """Exactly *size* bytes from *end*."""
    loop = asyncio.get_running_loop()
    got = bytearray()
    async with asyncio.timeout(10):
        while len(got) < size and (more := await loop.sock_recv(end, 65536)):
            got += more
    return bytes(got)


@asynccontextmanager
async def a_leg(**options: Any) -> AsyncIterator[tuple[Leg, socket.socket]]:
    """A leg, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    for one in (ours, theirs):
        one.setblocking(False)
    leg = Leg(**options)
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(lambda: leg, ours)
    with theirs:
        yield leg, theirs
        leg.close()
        await asyncio.wait_for(leg.closed, 10)


@on_both_loops
async def test_bytes_go_both_ways() -> None:
    """A megabyte in each direction arrives whole and in order, early bytes first."""
    loop = asyncio.get_running_loop()
    async with a_leg() as (one, left), a_leg() as (two, right):
        sending = [asyncio.ensure_future(loop.sock_sendall(end, MANY)) for end in (left, right)]
        await asyncio.sleep(0)
        join(one, two)
        got = await asyncio.gather(read_all(right, len(MANY)), read_all(left, len(MANY)))
        assert got == [MANY, MANY]
        await asyncio.gather(*sending)


@on_both_loops
async def test_early_bytes_are_bounded() -> None:
    """A client that sends without end before there is another leg is not read without end."""
    loop = asyncio.get_running_loop()
    async with a_leg() as (one, left):
        sending = asyncio.ensure_future(loop.sock_sendall(left, MANY * 8))
        await eventually(lambda: len(one._early) > 64 * 1024)
        seen = len(one._early)
        await asyncio.sleep(0.05)  # time in which it could read on
        assert len(one._early) == seen < 1024 * 1024
        assert not sending.done()
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending


@pytest.mark.parametrize("how", ["end", "eof", "cut"])
@on_both_loops
async def test_both_close_together(how: str) -> None:
    """When one side ends, shuts its sending side, or is cut, the other is closed too."""
    async with a_leg() as (one, left), a_leg() as (two, right):
        join(one, two)
        if how == "end":
            left.close()
        elif how == "eof":
            left.shutdown(socket.SHUT_WR)
        else:
            one.close()
        assert await read_all(right, 1) == b""
        await asyncio.wait_for(asyncio.gather(one.closed, two.closed), 10)


@pytest.mark.parametrize("first", [True, False])
@on_both_loops
async def test_joined_too_late(first: bool) -> None:
    """Joining a leg that has gone closes the other, and raises nothing."""
    async with a_leg() as (one, left), a_leg() as (two, right):
        left.close()
        await asyncio.wait_for(one.closed, 10)
        join(*((one, two) if first else (two, one)))
        assert await read_all(right, 1) == b""
        await asyncio.wait_for(two.closed, 10)


@on_both_loops
async def test_the_last_words_arrive() -> None:
    """What one side has sent before it ended is still delivered to the other."""
    loop = asyncio.get_running_loop()
    async with a_leg() as (one, left), a_leg() as (two, right):
        join(one, two)
        await loop.sock_sendall(left, MANY[:100_000])
        left.close()
        assert await read_all(right, 200_000) == MANY[:100_000]


@on_both_loops
async def test_sec_83_nobody_waits_for_last_words_that_are_not_read() -> None:
    """SEC-83: a leg that is to close but whose peer reads nothing is cut after a while."""
    loop = asyncio.get_running_loop()
    async with a_leg() as (one, left), a_leg(linger=0.2) as (two, _):
        join(one, two)
        while not two.transport.get_write_buffer_size():
            await loop.sock_sendall(left, b"x" * 4096)
            await asyncio.sleep(0)
        left.close()
        await asyncio.wait_for(asyncio.gather(one.closed, two.closed), 4)


@on_both_loops
async def test_sec_83_a_stalled_peer_is_cut() -> None:
    """SEC-83: a peer that takes nothing while bytes wait is cut, and its source with it."""
    loop = asyncio.get_running_loop()
    stall = timedelta(seconds=0.2)
    async with a_leg() as (one, left), a_leg(stall=stall) as (two, _):
        join(one, two)
        sending = asyncio.ensure_future(loop.sock_sendall(left, MANY * 4))
        await asyncio.wait_for(asyncio.gather(one.closed, two.closed), 5)
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sending


@on_both_loops
async def test_what_is_objected_to_is_not_passed_on() -> None:
    """SEC-82: bytes that the inspection refuses do not reach the other side."""
    loop = asyncio.get_running_loop()
    objections: list[ConductError] = []

    def inspect(data: bytes) -> None:
        if b"bad" in data:
            raise ConductError("no", b"bye")

    def objected(error: ConductError) -> None:
        objections.append(error)
        one.finish(error.farewell)

    async with (
        a_leg(inspect=inspect, objected=objected) as (one, left),
        a_leg() as (two, right),
    ):
        join(one, two)
        await loop.sock_sendall(left, b"good")
        assert await read_all(right, 4) == b"good"
        await loop.sock_sendall(left, b"bad")
        assert await read_all(left, 3) == b"bye"
        assert await read_all(right, 1) == b""
        assert len(objections) == 1


def test_dead_machines_are_noticed() -> None:
    """A TCP connection whose other machine vanished is ended by the kernel in about 30 s."""
    with socket.socket() as connection:
        notice_dead_peer(connection)
        tcp = socket.IPPROTO_TCP
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            connection.getsockopt(tcp, one)
            for one in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count <= 30
        assert connection.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 30_000


async def test_a_leg_that_is_cut_before_it_is_connected() -> None:
    """A connection that comes up after it was given up is ended at once: none is left open."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    leg = Leg()
    leg.close()
    try:
        await loop.create_connection(lambda: leg, sock=ours)
        await asyncio.wait_for(leg.closed, 5)
        assert await loop.sock_recv(theirs, 1) == b""
    finally:
        theirs.close()
