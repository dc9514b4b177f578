"""
What hostile clients do to HTTP/2, on both kinds of socket (transport, tests; SEC-82).

After each attack a well-behaved neighbour is served, the hostile connection is gone, and
connections, descriptors and tasks are back where they were.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc
import pytest

from spiffe_wire.frontdoor.door import DoorLimits
from spiffe_wire.interceptors import ErrorInterceptor
from tests.support.children import a_python
from tests.support.door import (
    CHAT,
    ECHO,
    FLOOD,
    GATHER,
    HOLD,
    Door,
    a_door,
    call,
    eventually,
    on_uvloop,
)
from tests.support.http2 import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    LAST_STORED,
    MAX_CONCURRENT_STREAMS,
    OPENING,
    PING,
    PREFACE,
    PRIORITY,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    field,
    frame,
    headers,
    request,
    settings,
    stored,
)

KINDS = pytest.mark.parametrize("kind", ["unix", "tls"])
LIMITS = DoorLimits(
    opening=timedelta(seconds=0.15),
    first_request=timedelta(seconds=0.3),
    stall=timedelta(seconds=0.4),
)
SLOW = [ErrorInterceptor(stall=timedelta(seconds=0.4))]
A_PING = frame(PING, payload=b"12345678")
A_BIG_STREAM = (2**24 - 1).to_bytes(3) + bytes((DATA, 0)) + (1).to_bytes(4)


def reset(stream: int) -> bytes:
    """RST_STREAM, as a client that cancels."""
    return frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4))


def streams(count: int) -> Iterator[int]:
    """The numbers of the first *count* streams of a client."""
    yield from range(1, 2 * count, 2)


SILENT: dict[str, list[bytes]] = {
    "nothing": [],
    "half a preface": [PREFACE[:10]],
    "a preface alone": [PREFACE],
    "half a SETTINGS frame": [PREFACE + settings((4, 1))[:5]],
    "an opening alone": [OPENING],
    "half a HEADERS frame": [OPENING, headers(1, HOLD)[:-20]],
    "headers that do not end": [OPENING, headers(1, HOLD, flags=0)],
    "pings alone": [OPENING, A_PING * 2],
}
NO_HTTP2: dict[str, list[bytes]] = {
    "garbage": [bytes(range(255, 191, -1))],
    "zeros": [bytes(64)],
    "HTTP/1.1": [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    "a TLS hello": [b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"],
    "a preface with a wrong end": [PREFACE[:-1] + b"x"],
    "PING first": [PREFACE + A_PING],
    "HEADERS first": [PREFACE + headers(1, ECHO)],
    "an ACK first": [PREFACE + frame(SETTINGS, ACK)],
    "SETTINGS of a megabyte": [PREFACE + (2**20).to_bytes(3) + bytes((SETTINGS, 0)) + bytes(4)],
}
# Each says what floods, and is far more than its limit.
FLOODS: dict[str, list[bytes]] = {
    "pings": [OPENING + request(1, HOLD), *[A_PING * 100] * 20],
    "pings on no stream": [OPENING, *[A_PING * 100] * 20],
    "settings": [OPENING + request(1, HOLD), *[settings((4, 65535)) * 100] * 20],
    "acknowledged settings": [OPENING, *[frame(SETTINGS, ACK) * 500] * 20],
    "acknowledged pings": [OPENING, *[frame(PING, ACK, payload=b"12345678") * 500] * 20],
    "rapid reset": [
        OPENING,
        *[request(one, HOLD) + reset(one) for one in streams(2000)],
    ],
    "rapid reset of headers alone": [
        OPENING,
        *[headers(one, CHAT) + reset(one) for one in streams(2000)],
    ],
    "CONTINUATION": [
        OPENING + headers(1, ECHO, flags=0),
        *[frame(CONTINUATION, 0, 1, field(b"x", b"y" * 1000))] * 500,
    ],
    "empty CONTINUATION": [
        OPENING + headers(1, ECHO, flags=0),
        frame(CONTINUATION, 0, 1) * 2000,
    ],
    "HPACK bomb": [
        OPENING + headers(1, ECHO, more=stored(b"x-b", b"v" * 4000)),
        *[headers(one, ECHO, more=LAST_STORED * 4000) for one in streams(20)][1:],
    ],
    "HPACK bomb in pieces": [
        OPENING + headers(1, ECHO, more=stored(b"x-b", b"v" * 4000)),
        headers(3, ECHO, flags=0),
        *[frame(CONTINUATION, 0, 3, LAST_STORED * 100)] * 20,
        frame(CONTINUATION, END_HEADERS, 3),
    ],
    "HPACK bomb of names": [
        OPENING + headers(1, ECHO, more=stored(b"x" * 4000, b"v")),
        headers(3, ECHO, more=b"\x0f\x2f\x01v" * 200),
    ],
    "400 streams": [OPENING, *[request(one, HOLD) for one in streams(400)]],
    "window updates": [
        OPENING + request(1, HOLD),
        *[frame(WINDOW_UPDATE, 0, 0, (1).to_bytes(4)) * 500] * 20,
    ],
    "empty DATA": [OPENING + headers(1, GATHER), *[frame(DATA, 0, 1) * 100] * 20],
    "PRIORITY": [OPENING, *[frame(PRIORITY, 0, 1, bytes(5)) * 100] * 20],
    "frames of no known kind": [OPENING, *[frame(0x77, 0, 0, b"zzz") * 100] * 20],
}


@asynccontextmanager
async def attacked(kind: str, parts: list[bytes]) -> AsyncIterator[tuple[Door, list[Frame]]]:
    """A door that was sent *parts*, and every frame it answered until it cut."""
    async with a_door(kind, limits=LIMITS, interceptors=SLOW) as door:
        async with door.raw() as hostile:
            hostile.polite = False
            try:
                for part in parts:
                    await hostile.send(part)
            except ConnectionError:
                pass  # cut in the middle of it
            answers = await hostile.everything()
        yield door, answers
        await door.neighbour()
        await door.settled()


@KINDS
@pytest.mark.parametrize("attack", SILENT)
@on_uvloop
async def test_sec_80_a_silent_client_is_cut(kind: str, attack: str) -> None:
    """SEC-80: whoever has not begun HTTP/2, or asked for anything, in its time is cut."""
    async with attacked(kind, SILENT[attack]) as (door, _):
        assert door.door.refusals.counts.keys() <= {"silent", "no_request"}
        assert door.door.refusals.counts.total() == 1


@KINDS
@pytest.mark.parametrize("attack", NO_HTTP2)
@on_uvloop
async def test_sec_82_other_protocols_never_reach_the_server(kind: str, attack: str) -> None:
    """SEC-82: what is not HTTP/2 is cut at once, and not a byte comes back."""
    async with attacked(kind, NO_HTTP2[attack]) as (_, answers):
        assert answers == []


@KINDS
@pytest.mark.parametrize("attack", FLOODS)
@on_uvloop
async def test_sec_82_a_flood_is_cut(kind: str, attack: str) -> None:
    """SEC-82: each flood is cut by the door, long before it has ended."""
    async with attacked(kind, FLOODS[attack]) as (door, _):
        assert door.door.refusals.counts["flood"] == 1


@KINDS
@pytest.mark.parametrize(
    ("most", "one"),
    [(20, A_PING), (100, settings((INITIAL_WINDOW_SIZE, 65535)))],
    ids=["idle pings", "settings"],
)
@on_uvloop
async def test_sec_82_goaway_one_over_the_limit(kind: str, most: int, one: bytes) -> None:
    """SEC-82, SEC-80: 20 idle pings or 100 settings are answered; one more gets GOAWAY."""
    async with a_door(kind) as door:
        async with door.raw() as client:
            await client.send(OPENING, request(1, HOLD, b"x"))
            assert await client.until(DATA) is not None
            await client.send(one * most)
            answered = 0
            while answered < most:
                answer = await client.until(one[3])
                assert answer is not None
                answered += answer.flags == ACK
            assert door.echo.held == 1
            await client.send(one)
            *_, last = await client.everything()
            assert (last.kind, last.error) == (GOAWAY, ENHANCE_YOUR_CALM)
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_82_goaway_one_reset_over_the_limit(kind: str) -> None:
    """SEC-82, SEC-80: a client may cancel 200 calls in 10 s; the next reset gets GOAWAY."""
    async with a_door(kind) as door:
        async with door.raw() as client:
            await client.send(OPENING)
            for stream in range(1, 401, 2):
                await client.send(headers(stream, CHAT), reset(stream))
                if stream % 20 == 1:  # the server has caught up
                    await client.send(request(1000 + stream, ECHO, b"x"))
                    assert await client.until(DATA) is not None
            await client.send(headers(2001, CHAT), reset(2001))
            *_, last = await client.everything()
            assert (last.kind, last.error) == (GOAWAY, ENHANCE_YOUR_CALM)
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_80_streams_on_one_connection(kind: str) -> None:
    """SEC-80, table 1: 128 streams of one connection are served, and the next is refused."""
    async with a_door(kind) as door:
        async with door.raw() as client:
            await client.send(OPENING)
            announced = await client.until(SETTINGS)
            assert announced is not None
            assert announced.settings[MAX_CONCURRENT_STREAMS] == 128
            for stream in streams(129):
                await client.send(request(stream, HOLD, b"x"))
            refused = await client.until(RST_STREAM)
            assert refused is not None and refused.stream == 257
            assert refused.error in (REFUSED_STREAM, ENHANCE_YOUR_CALM)
            await eventually(lambda: door.echo.held == 128)
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_82_hpack_bomb_in_little_memory(kind: str) -> None:
    """SEC-82: what references to one header field unpack to is bounded, stream by stream."""
    bomb = [headers(one, GATHER, more=LAST_STORED * 100) for one in streams(128)][1:]
    async with a_door(kind) as door:
        before = resident_bytes()
        async with door.raw() as client:
            await client.send(OPENING, headers(1, GATHER, more=stored(b"x-b", b"v" * 4000)))
            await client.send(*bomb, request(1001, ECHO, b"x"))
            await door.neighbour()
            assert resident_bytes() - before < 128 * 2**20
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_83_a_client_that_never_reads_is_cut(kind: str) -> None:
    """SEC-83: a client that takes nothing from its socket is dropped, and little was queued."""
    async with a_door(kind, limits=LIMITS) as door:
        before = resident_bytes()
        async with door.raw() as client:
            # Windows without end: only the socket itself holds the server back.
            wide = settings((INITIAL_WINDOW_SIZE, 2**31 - 1))
            update = frame(WINDOW_UPDATE, 0, 0, (2**31 - 2**16).to_bytes(4))
            client.stop_reading()
            await client.send(PREFACE + wide + update, request(1, FLOOD), request(3, FLOOD))
            await eventually(lambda: door.echo.held == 2)
            await door.neighbour()
            await eventually(lambda: door.door.connections == 0)
            assert resident_bytes() - before < 32 * 2**20
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_83_a_window_that_stays_shut_is_cut(kind: str) -> None:
    """SEC-83, SEC-82: a client that reads its socket but opens no window is dropped too."""
    async with a_door(kind, limits=LIMITS, interceptors=SLOW) as door:
        async with door.raw() as client:
            await client.send(PREFACE + settings((INITIAL_WINDOW_SIZE, 0)), request(1, FLOOD))
            await eventually(lambda: door.echo.held == 1)
            await client.everything()
        await door.neighbour()
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_83_a_slow_reader_that_reads_is_served(kind: str) -> None:
    """SEC-83: slow is not stalled; whoever takes something now and then is not cut."""
    async with a_door(kind, limits=LIMITS) as door:
        async with door.raw() as client:
            wide = settings((INITIAL_WINDOW_SIZE, 2**31 - 1))
            update = frame(WINDOW_UPDATE, 0, 0, (2**31 - 2**16).to_bytes(4))
            await client.send(PREFACE + wide + update, request(1, FLOOD))
            taken = 0
            until = asyncio.get_running_loop().time() + 3 * LIMITS.stall.total_seconds()
            while asyncio.get_running_loop().time() < until:
                answer = await client.until(DATA)
                assert answer is not None
                taken += len(answer.payload)
                await asyncio.sleep(0.01)  # what is slow about it
            assert taken
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_82_a_half_closed_connection_is_closed(kind: str) -> None:
    """SEC-82: a client that shuts its sending side, as gRPC never does, is closed whole."""
    async with a_door(kind) as door:
        async with door.raw() as client:
            await client.send(OPENING, request(1, HOLD, b"x"))
            assert await client.until(DATA) is not None
            shutdown(client.raw_socket)
            await client.everything()
            await eventually(lambda: door.echo.held == 0)
        await door.settled()


@KINDS
@on_uvloop
async def test_sec_82_clients_killed_in_the_middle(kind: str) -> None:
    """SEC-82: 40 clients with two streams each are killed -9, and nothing stays behind."""
    async with a_door(kind, limits=DoorLimits(per_pid=100)) as door:
        code = KNOCK.replace("OPENING", repr(OPENING + request(1, HOLD) + request(3, HOLD)))
        target = str(door.path) if kind == "unix" else str(door.port)
        with contextlib.ExitStack() as children:
            clients = [children.enter_context(a_python(code, kind, target)) for _ in range(4)]
            for client in clients:
                assert await asyncio.to_thread(client.hear) == "open"
            await eventually(lambda: door.echo.held == 80)
            await door.neighbour()
            for client in clients:
                client.end()
            await door.neighbour()
            await eventually(lambda: door.echo.held == 0)
        await door.settled()


# Ten connections, each with whatever stands for OPENING, held until it is killed.
KNOCK = """
import socket, ssl, sys
kind, target = sys.argv[1:]
held = []
for _ in range(10):
    if kind == "unix":
        one = socket.socket(socket.AF_UNIX)
        one.connect(target)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        one = context.wrap_socket(socket.create_connection(("127.0.0.1", int(target))))
    one.sendall(OPENING)
    held.append(one)
print("open", flush=True)
sys.stdin.read()
"""


@on_uvloop
async def test_sec_80_one_message_over_the_limit() -> None:
    """SEC-80, table 1: a message at the door's limit is served, and one byte more is not."""
    async with a_door(max_message_bytes=64 * 1024) as door, door.channel() as channel:
        assert await call(channel, ECHO, bytes(64 * 1024)) == bytes(64 * 1024)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(channel, ECHO, bytes(64 * 1024 + 1))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@on_uvloop
async def test_sec_80_one_header_list_over_the_limit() -> None:
    """SEC-80, table 1: a header list of 16 KiB is refused, one well below it is served."""
    async with a_door() as door, door.channel() as channel:
        for size, served in ((12 * 1024, True), (17 * 1024, False)):
            asked = call(channel, ECHO, b"x", metadata=(("x-long", "v" * size),))
            if served:
                assert await asked == b"x"
            else:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await asked
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def resident_bytes() -> int:
    """The memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shutdown(connection: "asyncio.trsock.TransportSocket") -> None:
    """Shut the sending side of a socket that a transport holds."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_WR)
