"""How often an agent dials a server that is away."""

import asyncio
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc
import pytest

from spiffe_wire.backoff import Backoff
from spiffe_wire.frontdoor import dialer as dialing
from spiffe_wire.frontdoor import names
from spiffe_wire.frontdoor.dialer import Dialer
from tests.support.stack import a_folder

SOON = timedelta(milliseconds=1)


@asynccontextmanager
async def a_dialer(
    port: int, backoff: Backoff, host: str = "127.0.0.1"
) -> AsyncIterator[Dialer]:
    """A dialer to *port* of this machine, which trusts nobody."""
    with a_folder() as folder:
        async with Dialer(
            host, port, context=lambda: ssl.create_default_context(),
            check=lambda _: None, runtime_dir=folder / "i",
        ) as dialer:  # fmt: skip
            dialer._backoff = backoff
            yield dialer


async def ask(dialer: Dialer) -> grpc.StatusCode:
    """A call of something."""
    try:
        await dialer.channel.unary_unary("/a.B/C")(b"", timeout=0.3)
    except grpc.aio.AioRpcError as error:
        return error.code()
    raise AssertionError("answered")


async def test_sec_107_who_is_away_is_not_dialled_all_the_time() -> None:
    """SEC-107: whatever asks and however often, the next dial waits for its random moment."""
    dialled = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dialled
        dialled += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    minute = timedelta(minutes=1)
    async with a_dialer(port, Backoff(minute, minute, random.Random(1))) as dialer:  # 8 s
        loop = asyncio.get_running_loop()
        started = loop.time()
        while loop.time() - started < 1.5:
            assert await ask(dialer) in (
                grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
            )  # fmt: skip
            await asyncio.sleep(0.01)
        assert dialled == 1 and str(port) in dialer.problem
    server.close()
    await server.wait_closed()


async def test_sec_106_dialled_again_before_long() -> None:
    """SEC-106: the longest pause is well below the thirty seconds in which agents are back."""
    assert timedelta(seconds=15) == dialing.LONGEST_PAUSE
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    quick = Backoff(timedelta(milliseconds=1), timedelta(milliseconds=1))
    async with a_dialer(port, quick) as dialer:
        await ask(dialer)
        came = asyncio.Event()

        async def come(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.set()
            writer.close()

        server = await asyncio.start_server(come, "127.0.0.1", port)
        async with asyncio.timeout(10):
            while not came.is_set():
                await ask(dialer)
                await asyncio.sleep(0.02)
        server.close()
        await server.wait_closed()


async def test_sec_106_dialled_at_once_with_another_certificate() -> None:
    """SEC-106: cut for a new certificate, it does not wait for what the old one met."""
    dialled = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dialled
        dialled += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    minute = timedelta(minutes=1)
    async with a_dialer(port, Backoff(minute, minute, random.Random(1))) as dialer:  # 8 s
        await ask(dialer)
        assert dialled == 1
        dialer.cut()
        async with asyncio.timeout(5):
            while dialled < 2:
                await ask(dialer)
                await asyncio.sleep(0.01)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("seed", range(3))
def test_sec_107_full_jitter(seed: int) -> None:
    """SEC-107: pauses are drawn evenly from nothing to a bound that doubles up to its cap."""
    rng = random.Random(seed)
    drawn = [[] for _ in range(8)]
    for _ in range(400):
        backoff = Backoff(dialing.FIRST_PAUSE, dialing.LONGEST_PAUSE, rng)
        for pauses in drawn:
            pauses.append(backoff.next().total_seconds())
    for number, pauses in enumerate(drawn):
        bound = min(0.2 * 2**number, 15)
        assert max(pauses) <= bound and min(pauses) < bound / 10
        assert abs(sum(pauses) / len(pauses) - bound / 2) < bound / 10


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.2", "127.0.0.1"]])
async def test_a_name_with_several_addresses(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """The first address that answers is taken; those before it are tried."""
    came = asyncio.get_running_loop().create_future()

    async def hear(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set_result(writer.get_extra_info("sockname")[0])
        writer.close()

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]
    monkeypatch.setattr(names.socket, "getaddrinfo", lambda *_, **__: found)
    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with a_dialer(port, Backoff(SOON, SOON), "server.test") as dialer:
            asking = asyncio.create_task(ask(dialer))
            assert await asyncio.wait_for(came, 5) == "127.0.0.1"
            await asking


async def test_sec_107_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEC-107: one look-up at a time, the call fails in time, and nobody waits at the end."""
    asked, go = [], threading.Event()

    def hang(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        go.wait(30)
        return []

    monkeypatch.setattr(names.socket, "getaddrinfo", hang)
    monkeypatch.setattr(dialing, "CONNECT_TIMEOUT", 0.05)
    loop = asyncio.get_running_loop()
    try:
        async with a_dialer(1, Backoff(SOON, SOON), "server.test") as dialer:
            for _ in range(3):
                assert await ask(dialer) in (
                    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
                )  # fmt: skip
            assert "TimeoutError" in dialer.problem
            leaving = loop.time()
        assert loop.time() - leaving < 5, "the resolver would have hung for 30 s"
        assert asked == ["server.test"]
    finally:
        go.set()


async def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the resolver says is said, and it is asked again at the next dial."""
    asked = 0

    def refuse(*_: object, **__: object) -> list[object]:
        nonlocal asked
        asked += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(names.socket, "getaddrinfo", refuse)
    async with a_dialer(1, Backoff(SOON, SOON), "server.test") as dialer:
        await ask(dialer)
        while asked < 2:
            await ask(dialer)
        assert "Name or service not known" in dialer.problem
