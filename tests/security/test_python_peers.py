"""
Python peers that refuse: whoever is wrong gets 0 application bytes, and gives none.

Each test names its rule.  The wrong end is plain
`ssl` in a thread, which trusts everybody and records what it can decrypt; the right end is each
of the ways that `workload_api.client` offers.
"""

import asyncio
import contextlib
import http.client
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from spiffe_core.bundle import BundleSet
from spiffe_core.matching import one_of
from tests.support.door import (
    ECHO,
    Echo,
    call,
    eventually,
    on_both_loops,
    on_uvloop,
    wall_clock,
)
from tests.support.http2 import OPENING, PREFACE, request
from tests.support.peers import (
    ALICE,
    BOB,
    CAROL,
    RIGHT,
    SECRET,
    WRONG,
    Chain,
    Material,
    RawServer,
    World,
    raw_context,
    raw_talk,
    recording,
)
from workload_api.client import grpc_peers, http_peers
from workload_api.client.ssl_context import client_context, server_context

WELCOME = one_of((ALICE, CAROL))
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
Options = dict[str, Any]


# Our clients, and a server that is wrong.


async def by_streams(bob: Material, port: int, **options: Any) -> None:
    """asyncio's streams."""
    context = client_context(bob, authorize=WELCOME, **options)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(SECRET)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def by_http_client(bob: Material, port: int, **options: Any) -> None:
    """The standard library's HTTP client, in a thread."""
    context = client_context(bob, authorize=WELCOME, **options)

    def ask() -> None:
        asking = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
        with contextlib.closing(asking):
            asking.request("GET", "/", headers={"X-Secret": SECRET.decode()})

    await asyncio.to_thread(ask)


async def by_aiohttp(bob: Material, port: int, **options: Any) -> None:
    """aiohttp."""
    async with http_peers.session(bob, authorize=WELCOME, **options) as session:
        timeout = aiohttp.ClientTimeout(total=0.3)
        async with session.post(f"https://127.0.0.1:{port}/", data=SECRET, timeout=timeout):
            pass


async def by_grpc(bob: Material, port: int, **options: Any) -> None:
    """grpcio."""
    async with grpc_peers.channel(
        bob, "127.0.0.1", port, authorize=WELCOME, **options
    ) as channel:
        try:
            await call(channel, ECHO, SECRET, timeout=0.3)
        except grpc.aio.AioRpcError as error:
            raise OSError(error.details()) from error


CLIENTS: dict[str, Callable[..., Awaitable[None]]] = {
    "streams": by_streams,
    "http.client": by_http_client,
    "aiohttp": by_aiohttp,
    "grpcio": by_grpc,
}


@asynccontextmanager
async def impostor(
    world: World, chain: Chain | None, by: str, greeting: bytes = b"", **options: Any
) -> AsyncIterator[RawServer]:
    """A server with *chain*, or one without TLS."""
    context = None
    if chain is not None:
        alpn = ("h2",) if by == "grpcio" else ()
        context = raw_context(world, chain, server=True, alpn=alpn, **options)
    server = RawServer(context, greeting)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)  # it ends when our loop has closed its sockets


def everything(error: BaseException | None) -> str:
    """What an error and its causes say."""
    said = ""
    while error is not None:
        said += f"{error}\n"
        error = error.__cause__
    return said


@pytest.mark.parametrize("who", WRONG)
@pytest.mark.parametrize("by", CLIENTS)
@on_uvloop
async def test_sec_11_a_wrong_server_is_told_nothing(by: str, who: str) -> None:
    """SEC-11, X509-31, FED-43: a server that is not exactly right gets 0 application bytes."""
    world = World()
    chain, why = WRONG[who]
    async with impostor(world, chain(world), by) as server:
        with pytest.raises((OSError, aiohttp.ClientError)) as refused:
            await CLIENTS[by](world.material(BOB), server.port)
        assert why in everything(refused.value)
    assert (server.accepted, server.decrypted) == (1, b"")


@pytest.mark.parametrize("who", WRONG)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sec_11_in_either_version_and_on_either_loop(
    version: ssl.TLSVersion, who: str
) -> None:
    """SEC-11, SEC-17: TLS 1.2 and 1.3 refuse alike, also on asyncio's own loop."""
    world = World()
    chain, why = WRONG[who]
    async with impostor(world, chain(world), "streams", version=version) as server:
        with pytest.raises(ssl.SSLError) as refused:
            await by_streams(world.material(BOB), server.port)
        assert why in everything(refused.value)
    assert (server.accepted, server.decrypted) == (1, b"")


@pytest.mark.parametrize("who", RIGHT)
@pytest.mark.parametrize("by", CLIENTS)
@on_both_loops
async def test_the_right_server_is_told(by: str, who: str) -> None:
    """The impostors' twins that are right receive bytes, so that their counters do count."""
    world = World()
    async with impostor(world, RIGHT[who][1](world), by) as server:
        with contextlib.suppress(OSError, aiohttp.ClientError, http.client.HTTPException):
            await CLIENTS[by](world.material(BOB), server.port)
        await eventually(lambda: len(server.decrypted) >= min(len(PREFACE), len(SECRET)))


@pytest.mark.parametrize("by", CLIENTS)
@on_both_loops
async def test_sec_17_a_server_without_tls_is_told_nothing(by: str) -> None:
    """SEC-17: what greets without TLS gets a ClientHello, and no byte of the application."""
    world = World()
    async with impostor(world, None, by, b"220 welcome\r\n") as server:
        with pytest.raises((OSError, aiohttp.ClientError)):
            await CLIENTS[by](world.material(BOB), server.port)
    assert b"GET" not in server.decrypted and b"PRI" not in server.decrypted
    assert SECRET not in server.decrypted


CLOCKS = {"expired": timedelta(hours=2), "not valid yet": timedelta(hours=-1)}


@pytest.mark.parametrize("when", CLOCKS)
@pytest.mark.parametrize("by", CLIENTS)
@on_uvloop
async def test_sec_16_our_own_clock_decides(by: str, when: str) -> None:
    """SEC-16: an SVID that OpenSSL lets pass is refused by our own look at the time."""
    world = World()
    async with impostor(world, world.chain(ALICE), by) as server:
        with pytest.raises((OSError, aiohttp.ClientError)) as refused:
            await CLIENTS[by](
                world.material(BOB), server.port, now=lambda: wall_clock() + CLOCKS[when]
            )
        assert "SVID has expired or is not valid yet" in everything(refused.value)
    assert server.decrypted == b""


# Our servers, and a client that is wrong.


class Server:
    """One of our servers: where it listens, and what its application saw."""

    def __init__(self, port: int, saw: Callable[[], int], said: bytes) -> None:
        self.port = port
        self.saw = saw
        self.said = said
        """What a client says to it."""


@asynccontextmanager
async def on_streams(bob: Material, **options: Any) -> AsyncIterator[Server]:
    """A protocol that greets who comes."""
    async with recording(server_context(bob, authorize=WELCOME, **options)) as seen:
        yield Server(seen.port, lambda: len(seen.bytes) + len(seen.transports), SECRET)


@asynccontextmanager
async def on_aiohttp(bob: Material, **options: Any) -> AsyncIterator[Server]:
    """An application of aiohttp."""
    seen = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        answer = web.Response(body=SECRET)
        answer.force_close()
        return answer

    app = web.Application()
    app.router.add_get("/", handler)
    async with http_peers.serving(app, bob, authorize=WELCOME, **options) as port:
        yield Server(port, lambda: seen, GET)


@asynccontextmanager
async def on_grpc(bob: Material, **options: Any) -> AsyncIterator[Server]:
    """A servicer."""
    echo = Echo()
    seen = 0

    async def count(asked: bytes, _: Any) -> bytes:
        nonlocal seen
        seen += 1
        return asked

    echo.echo = count  # type: ignore[method-assign]
    async with grpc_peers.serving(bob, echo.register, authorize=WELCOME, **options) as port:
        yield Server(port, lambda: seen, OPENING + request(1, ECHO, SECRET))


SERVERS: dict[str, Callable[..., Any]] = {
    "streams": on_streams,
    "aiohttp": on_aiohttp,
    "grpcio": on_grpc,
}


async def talk(context: ssl.SSLContext | None, server: Server) -> bytes:
    """What a client with *context* gets."""
    return await asyncio.to_thread(raw_talk, context, server.port, server.said)


def alpn_for(on: str) -> tuple[str, ...]:
    """What a client of one of the servers offers."""
    return ("h2",) if on == "grpcio" else ()


@pytest.mark.parametrize("who", [*WRONG, "no certificate"])
@pytest.mark.parametrize("on", SERVERS)
@on_uvloop
async def test_sec_11_a_wrong_client_is_told_nothing(on: str, who: str) -> None:
    """SEC-11, X509-31, FED-43: a client that is not exactly right gets 0 application bytes."""
    world = World()
    chain = WRONG[who][0](world) if who in WRONG else ()
    context = raw_context(world, chain, server=False, alpn=alpn_for(on))
    async with SERVERS[on](world.material(BOB)) as server:
        assert await talk(context, server) == b""
        assert server.saw() == 0


@pytest.mark.parametrize("who", [*WRONG, "no certificate"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sec_11_a_wrong_client_in_either_version(
    version: ssl.TLSVersion, who: str
) -> None:
    """SEC-11, SEC-17: TLS 1.2 and 1.3 refuse alike, also on asyncio's own loop."""
    world = World()
    chain = WRONG[who][0](world) if who in WRONG else ()
    context = raw_context(world, chain, server=False, version=version)
    async with on_streams(world.material(BOB)) as server:
        assert await talk(context, server) == b""
        assert server.saw() == 0


@pytest.mark.parametrize("who", RIGHT)
@pytest.mark.parametrize("on", SERVERS)
@on_both_loops
async def test_the_right_client_is_served(on: str, who: str) -> None:
    """The wrong clients' twins that are right are served, so that their counters do count."""
    world = World()
    context = raw_context(world, RIGHT[who][1](world), server=False, alpn=alpn_for(on))
    bob = world.material(BOB)
    options: Options = {} if on == "streams" else {"max_age": timedelta(seconds=0.3)}
    async with SERVERS[on](bob, **options) as server:
        talking = asyncio.ensure_future(talk(context, server))
        await eventually(lambda: server.saw() > 0)
        if on == "grpcio":
            bob.give(bob.svid, BundleSet())  # nobody is vouched for any more, so it ends
        assert len(await talking) >= len(SECRET)


@pytest.mark.parametrize("on", SERVERS)
@on_both_loops
async def test_sec_17_a_client_without_tls_is_told_nothing(on: str) -> None:
    """SEC-17: what speaks without TLS reaches no application, and gets none of its bytes."""
    world = World()
    async with SERVERS[on](world.material(BOB)) as server:
        got = await talk(None, server)
        assert SECRET not in got and b"HTTP/1.1 200" not in got
        assert server.saw() == 0


@pytest.mark.parametrize("when", CLOCKS)
@pytest.mark.parametrize("on", SERVERS)
@on_uvloop
async def test_sec_16_our_own_clock_decides_over_clients(on: str, when: str) -> None:
    """SEC-16: a client's SVID that OpenSSL lets pass is refused by our own look at the time."""
    world = World()
    context = raw_context(world, world.chain(ALICE), server=False, alpn=alpn_for(on))
    ahead = {"now": lambda: wall_clock() + CLOCKS[when]}
    async with SERVERS[on](world.material(BOB), **ahead) as server:
        assert await talk(context, server) == b""
        assert server.saw() == 0
