"""
The front door on TLS, and the agent's dialer: who is let in, and who gets not a byte.

Source: transport (server TLS, agent as client, tests), SEC-17, SEC-57, T-09, T-10.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography import x509

from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.door import DoorLimits
from spiffe_wire.frontdoor.limits import Turns, address_key
from spiffe_wire.frontdoor.tls import client_context
from tests.support.ca import FakeCa, uri_san
from tests.support.door import (
    ECHO,
    HOLD,
    WHO,
    Door,
    Pki,
    a_door,
    call,
    current,
    current_ca,
    eventually,
    on_both_loops,
    on_uvloop,
    wall_clock,
    workload_key,
)
from tests.support.http2 import DATA, GOAWAY, HEADERS, OPENING, PREFACE, raw_tls, request
from tests.support.stack import a_folder

AGENT = "spiffe://example.org/spire/agent/x/1"
TWO_IDS = uri_san(AGENT, "spiffe://example.org/other", critical=True)


def intermediate(ca: FakeCa, **changes: Any) -> FakeCa:
    """A CA under *ca* that is valid by the real clock."""
    now = wall_clock()
    return ca.child(
        not_before=now - timedelta(days=1), not_after=now + timedelta(days=1), **changes
    )


SERVED: dict[str, tuple[Callable[[Pki], tuple[bytes, ...]], str]] = {
    "no certificate": (lambda _: (), "anonymous"),
    "an agent": (lambda pki: pki.agent(), AGENT),
    "an agent under an intermediate": (lambda pki: pki.agent(intermediate(pki.ca)), AGENT),
    "a workload": (
        lambda pki: pki.ca.chain(current(pki.ca.leaf("/w"))),
        "spiffe://example.org/w",
    ),
}
REFUSED: dict[str, Callable[[Pki], tuple[bytes, ...]]] = {
    "another CA of the same name": lambda pki: pki.agent(current_ca(which="evil")),
    "an expired one": lambda pki: pki.agent(not_after=wall_clock() - timedelta(seconds=2)),
    "one that is not valid yet": lambda pki: pki.agent(
        not_before=wall_clock() + timedelta(minutes=5)
    ),
    "two URI SANs": lambda pki: pki.ca.chain(
        current(pki.ca.leaf("/spire/agent/x/1")).having(TWO_IDS)
    ),
    "no URI SAN": lambda pki: pki.ca.chain(
        current(pki.ca.leaf()).having(uri_san(critical=True))
    ),
    "another trust domain under our CA": lambda pki: pki.ca.chain(
        current(pki.ca.leaf("spiffe://other.org/spire/agent/x/1"))
    ),
    "an intermediate that is not sent": lambda pki: pki.agent(intermediate(pki.ca))[:1],
    "an expired intermediate": lambda pki: pki.agent(
        pki.ca.child(
            not_before=wall_clock() - timedelta(days=2),
            not_after=wall_clock() - timedelta(days=1),
        )
    ),
}


@asynccontextmanager
async def as_client(door: Door, chain: tuple[bytes, ...]) -> AsyncIterator[Any]:
    """A channel of a client with *chain*."""
    assert door.pki is not None
    async with door.pki.dialer(door.port, door.folder, chain) as dialer:
        yield dialer.channel


@pytest.mark.parametrize("who", SERVED)
@on_both_loops
async def test_sec_17_who_is_let_in(who: str) -> None:
    """SEC-17: a certificate is optional; one that is right is the caller's identity."""
    chain, expected = SERVED[who]
    async with a_door("tls") as door:
        async with as_client(door, chain(door.pki)) as channel:
            assert await call(channel, WHO) == expected.encode()
        await door.settled()


@pytest.mark.parametrize("who", REFUSED)
@on_uvloop
async def test_sec_17_who_is_not_let_in(who: str) -> None:
    """SEC-17, X509-31: a certificate that is wrong in any way gets nothing, not a frame."""
    async with a_door("tls") as door:
        context = door.pki.client(REFUSED[who](door.pki))
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            async with raw_tls("127.0.0.1", door.port, context) as client:
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    await client.send(OPENING, request(1, HOLD, b"x"))
                assert await client.everything() == []
        assert door.echo.held == 0
        assert door.door.refusals.counts.total() == 1
        await door.neighbour()
        await door.settled()


@on_both_loops
async def test_rotation_at_run_time() -> None:
    """A new certificate serves the next connection; the ones that are open go on."""
    async with a_door("tls") as door:
        async with door.raw() as old:
            await old.send(OPENING, request(1, ECHO, b"before"))
            assert await old.until(DATA) is not None
            serials = [await server_serial(door)]
            door.pki.server_changes = {"serial": 0x7777}
            serials.append(await server_serial(door))
            assert serials == [0x1001, 0x7777]
            await old.send(request(3, ECHO, b"after"))
            assert await old.until(DATA, 3) is not None
        # Another CA: whoever still presents what the old one signed is refused.
        stale = door.pki.agent()
        door.pki.ca = current_ca(which="next")
        async with as_client(door, ()) as channel:
            assert await call(channel, WHO) == b"anonymous"
        async with as_client(door, stale) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(channel, WHO, timeout=1)


async def server_serial(door: Door) -> int:
    """The serial number of the certificate that the door presents now."""
    seen: list[bytes] = []

    def check(chain: tuple[bytes, ...]) -> None:
        seen.append(chain[0])

    async with Dialer(
        "127.0.0.1",
        door.port,
        context=door.pki.client,
        check=check,
        runtime_dir=door.folder / "d",
    ) as dialer:
        await call(dialer.channel, ECHO)
    return x509.load_der_x509_certificate(seen[0]).serial_number


VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def blocking_client(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession | None, bool, bytes, str | None]:
    """Connect, call once; return the session, whether it was resumed, and what came back."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        with context.wrap_socket(plain, session=session) as tls:
            tls.sendall(OPENING + request(1, ECHO, b"x"))
            got = b""
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while b"grpc-status" not in got and (more := tls.recv(65536)):
                    got += more
            return tls.session, bool(tls.session_reused), got, tls.version()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("certificate", [False, True], ids=["anonymous", "agent"])
@on_both_loops
async def test_sec_17_no_session_is_resumed(version: str, certificate: bool) -> None:
    """SEC-17: a client that offers its old session gets a full handshake, or nothing at all."""
    async with a_door("tls") as door:
        shared = door.pki.server()  # as in production: one context until it is rotated
        door.pki.server = lambda: shared  # type: ignore[method-assign]
        context = door.pki.client(door.pki.agent() if certificate else ())
        context.minimum_version = context.maximum_version = VERSIONS[version]
        session, resumed, got, spoken = await asyncio.to_thread(
            blocking_client, context, door.port
        )
        assert (resumed, spoken) == (False, f"TLSv{version}")
        assert b"grpc-status" in got
        for _ in range(2):
            _, resumed, got, _ = await asyncio.to_thread(
                blocking_client, context, door.port, session
            )
            assert not (resumed and got)
            # No ticket was handed out in 1.3, so there the same client is served as new.
            assert version == "1.2" or b"grpc-status" in got
        await door.settled()


@on_uvloop
async def test_sec_17_a_session_can_be_resumed_elsewhere() -> None:
    """SEC-17: the clients of the test above do resume where a server lets them."""
    pki = Pki()
    context = pki.server()
    context.num_tickets = 2
    context.options &= ~ssl.OP_NO_TICKET

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"grpc-status")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server:
        client = pki.client()
        session, *_ = await asyncio.to_thread(blocking_client, client, port)
        _, resumed, _, _ = await asyncio.to_thread(blocking_client, client, port, session)
        assert resumed


@pytest.mark.parametrize(("version", "served"), [("1.1", False), ("1.2", True), ("1.3", True)])
@on_uvloop
async def test_sec_17_versions(version: str, served: bool) -> None:
    """SEC-17: TLS 1.2 and 1.3 are spoken, 1.1 is not, however willing the client is."""
    async with a_door("tls") as door:
        context = door.pki.client()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TLS 1.1
            only = getattr(ssl.TLSVersion, "TLSv" + version.replace(".", "_"))
            context.minimum_version = context.maximum_version = only
        asked = asyncio.to_thread(blocking_client, context, door.port)
        if served:
            assert (await asked)[3] == f"TLSv{version}"
        else:
            lenient = server_context_for_old_clients(door.pki)
            assert in_memory(context, lenient) == "TLSv1.1"  # the client does its part
            with pytest.raises(ssl.SSLError):
                await asked


def server_context_for_old_clients(pki: Pki) -> ssl.SSLContext:
    """A server that speaks everything; ours, with the safety taken out."""
    context = pki.server()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    return context


def in_memory(client: ssl.SSLContext, server: ssl.SSLContext) -> str | None:
    """Shake hands without a socket, and return the version."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname="x"),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].version()


@pytest.mark.parametrize(
    ("protocols", "served"),
    [(["h2"], True), (["http/1.1", "h2"], True), (["http/1.1"], False), ([], False)],
    ids=["h2", "h2 among others", "http/1.1", "none"],
)
@on_uvloop
async def test_alpn_is_h2_and_nothing_else(protocols: list[str], served: bool) -> None:
    """A client that does not offer h2 is closed, and gets no byte of HTTP/2."""
    async with a_door("tls") as door:
        context = client_context([door.pki.ca.cert.der])
        context.set_alpn_protocols(protocols)
        got = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            _, _, got, _ = await asyncio.to_thread(blocking_client, context, door.port)
        assert bool(got) == served
        await door.settled()


@on_uvloop
async def test_sec_17_connections_age() -> None:
    """SEC-17: a connection is ended gracefully at its age; its stream goes on, calls move."""
    async with a_door("tls", max_age=timedelta(seconds=0.5)) as door:
        async with door.raw() as client, door.channel() as channel:
            await client.send(OPENING, request(1, HOLD, b"x"))
            assert await client.until(DATA) is not None
            started = asyncio.get_running_loop().time()
            assert await client.until(GOAWAY) is not None
            assert 0.2 < asyncio.get_running_loop().time() - started < 2
            assert door.echo.held == 1  # a held stream is let finish
            assert await call(channel, ECHO, b"x") == b"x"


@on_uvloop
async def test_sec_17_unix_connections_do_not_age() -> None:
    """SEC-17: a door without an age sends no GOAWAY; on Unix sockets every call is checked."""
    async with a_door("unix") as door, door.raw() as client:
        assert "grpc.max_connection_age_ms" not in dict(door.door._options)
        await client.send(OPENING, request(1, ECHO, b"x"))
        assert await client.until(HEADERS) is not None


# Handshakes.


@pytest.mark.parametrize(
    "said",
    [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40)],
    ids=["nothing", "half a header", "half a hello"],
)
@on_uvloop
async def test_sec_80_a_handshake_has_its_time(said: bytes) -> None:
    """SEC-80: a client that does not finish its handshake is cut, and gets no byte."""
    async with a_door("tls", limits=DoorLimits(opening=timedelta(seconds=0.2))) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(said)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await door.neighbour()
        await door.settled()


@pytest.mark.parametrize("said", [OPENING, b"GET / HTTP/1.1\r\n\r\n"], ids=["h2c", "http"])
@on_both_loops
async def test_sec_17_nothing_is_read_before_the_handshake(said: bytes) -> None:
    """SEC-17: plain bytes on the TLS port never reach the server."""
    async with a_door("tls") as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(said + request(1, HOLD))
        with contextlib.suppress(ConnectionError):
            assert b"grpc" not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert door.echo.held == 0
        await door.settled()


@on_both_loops
async def test_sec_81_stalled_handshakes_hold_up_nobody_else() -> None:
    """SEC-81: one address that fills its share of handshakes leaves the others theirs."""
    async with a_door("tls", limits=DoorLimits(handshakes=8)) as door:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stalled = stack.enter_context(socket.socket())
                stalled.bind(("127.0.0.2", 0))
                stalled.connect(("127.0.0.1", door.port))
            await eventually(lambda: door.door.connections == 20)
            await asyncio.wait_for(door.neighbour(), 2)
        await door.settled()


@on_uvloop
async def test_sec_81_connections_of_an_address() -> None:
    """SEC-81: an address has its number of anonymous connections; proven callers are free."""
    async with a_door("tls", limits=DoorLimits(unproven_per_address=2)) as door:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                client = await stack.enter_async_context(door.raw())
                await client.send(OPENING, request(1, HOLD, b"x"))
                assert await client.until(DATA) is not None
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await stack.enter_async_context(door.raw())
            assert door.door.refusals.counts == {"ExhaustedError": 1}
            await stack.aclose()
            await eventually(lambda: door.door.connections == 0)
            for _ in range(5):
                context = door.pki.client(door.pki.agent())
                client = await stack.enter_async_context(
                    raw_tls("127.0.0.1", door.port, context)
                )
                await client.send(OPENING, request(1, HOLD, b"x"))
                assert await client.until(DATA) is not None
        await door.settled()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_sec_81_what_one_address_is(one: str, other: str, same: bool) -> None:
    """SEC-81, table 1: limits count an IPv4 address, or an IPv6 /64, however it is written."""
    assert (address_key(one) == address_key(other)) is same


async def test_sec_81_turns_are_shared_out() -> None:
    """SEC-81: a key gets a quarter of the turns at once, and its waiters leave no trace."""
    turns = Turns(8)
    inside = 0
    go = asyncio.Event()

    async def take(key: str) -> None:
        nonlocal inside
        async with turns.turn(key):
            inside += 1
            await go.wait()
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(take("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert inside == 2
        for key in "bcd":
            for _ in range(3):
                group.create_task(take(key))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert inside == 8
        go.set()
    assert inside == 0 and not turns._mine and not turns._waiting


@on_both_loops
async def test_ipv6() -> None:
    """The door and the dialer work on the IPv6 loopback."""
    if not ipv6_is_there():
        pytest.skip("this machine has no IPv6 loopback")
    async with a_door("tls", listen={"host": "::1"}) as door:
        async with door.pki.dialer(
            door.port, door.folder, door.pki.agent(), host="::1"
        ) as dialer:
            assert await call(dialer.channel, WHO) == AGENT.encode()


def ipv6_is_there() -> bool:
    """Whether ::1 can be listened on."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# The agent's side.


class Impostor:
    """A TLS server that counts what it is sent; *pki* says who it claims to be."""

    def __init__(self) -> None:
        self.application_bytes = 0
        self.handshakes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Count until the client leaves."""
        self.handshakes += 1
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65536):
                self.application_bytes += len(data)
        writer.transport.abort()


@asynccontextmanager
async def an_impostor(context: ssl.SSLContext) -> AsyncIterator[tuple[Impostor, int]]:
    """An `Impostor` on a port of its own."""
    impostor = Impostor()
    server = await asyncio.start_server(impostor.serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield impostor, server.sockets[0].getsockname()[1]


def other(**changes: Any) -> Callable[[Pki], Pki]:
    """A server that differs from the right one in *changes*."""
    return lambda pki: Pki(**{"ca": pki.ca, **changes})


IMPOSTORS: dict[str, tuple[Callable[[Pki], Pki], str]] = {
    "a workload's ID": (other(server_path="/w"), "spiffe"),
    "an agent's ID": (other(server_path="/spire/agent/x/1"), "spiffe"),
    "the server of another trust domain": (
        other(server_path="spiffe://other.org/spire/server"),
        "trust domain",
    ),
    "an evil CA of the same name": (
        lambda _: Pki(ca=current_ca(which="evil")),
        "certificate verify failed",
    ),
    "an expired server": (
        other(server_changes={"not_after": wall_clock() - timedelta(seconds=2)}),
        "certificate has expired",
    ),
    "two URI SANs": (
        other(
            server_changes={
                "extensions": current_ca().leaf("/spire/server").having(TWO_IDS).extensions
            }
        ),
        "exactly one URI SAN",
    ),
}


@pytest.mark.parametrize("who", IMPOSTORS)
@on_uvloop
async def test_sec_57_not_a_byte_to_an_impostor(who: str, tmp_folder: Any) -> None:
    """SEC-57: a server that is not exactly ours receives 0 application bytes."""
    right = Pki()
    wrong, why = IMPOSTORS[who]
    async with an_impostor(wrong(right).server()) as (impostor, port):
        async with right.dialer(port, tmp_folder, right.agent()) as dialer:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(dialer.channel, ECHO, b"secret", timeout=3)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert why in dialer.problem and f"127.0.0.1:{port}" in dialer.problem
        assert impostor.application_bytes == 0


@on_both_loops
async def test_sec_57_the_right_server_is_sent_to(tmp_folder: Any) -> None:
    """SEC-57: the impostor's twin that is right does receive bytes, so its counter counts."""
    right = Pki()
    async with an_impostor(right.server()) as (server, port):
        async with right.dialer(port, tmp_folder, right.agent()) as dialer:
            asked = asyncio.ensure_future(call(dialer.channel, ECHO, b"secret", timeout=3))
            await eventually(lambda: server.application_bytes >= len(PREFACE))
            assert dialer.problem == ""
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("bug"), KeyError("x")])
@on_both_loops
async def test_sec_57_a_check_that_breaks_is_a_refusal(
    error: Exception, tmp_folder: Any
) -> None:
    """SEC-57: whatever the check of the server raises, nothing is sent and nothing hangs."""
    right = Pki()

    def check(_: tuple[bytes, ...]) -> None:
        raise error

    async with an_impostor(right.server()) as (server, port):
        async with Dialer(
            "127.0.0.1", port, context=right.client, check=check, runtime_dir=tmp_folder
        ) as dialer:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(dialer.channel, ECHO, timeout=2)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert dialer.problem
            assert not dialer._legs
        assert server.application_bytes == 0


@on_uvloop
async def test_a_server_without_http2_is_refused(tmp_folder: Any) -> None:
    """A server that does not select h2 gets no byte."""
    right = Pki()
    context = right.server()
    context.set_alpn_protocols(["http/1.1"])
    async with an_impostor(context) as (server, port):
        async with right.dialer(port, tmp_folder) as dialer:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(dialer.channel, ECHO, timeout=2)
            assert "HTTP/2" in dialer.problem or "alert" in dialer.problem
        assert server.application_bytes == 0


@on_uvloop
async def test_the_dialer_says_why(tmp_folder: Any) -> None:
    """Nobody listening, and no such host, are told apart in `problem`; no call hangs."""
    right = Pki()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with right.dialer(port, tmp_folder) as dialer:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(dialer.channel, ECHO, timeout=2)
            assert f"127.0.0.1:{port}: " in dialer.problem


@on_both_loops
async def test_a_rotation_on_the_agents_side() -> None:
    """After `cut` the next call dials anew, with the certificate of then."""
    async with a_door("tls") as door:
        chains = [(), door.pki.agent()]
        async with Dialer(
            "127.0.0.1",
            door.port,
            context=lambda: door.pki.client(chains[0]),
            check=door.pki.check,
            runtime_dir=door.folder / "d",
        ) as dialer:
            assert await call(dialer.channel, WHO) == b"anonymous"
            del chains[0]
            assert await call(dialer.channel, WHO) == b"anonymous"
            dialer.cut()
            assert await call(dialer.channel, WHO, wait_for_ready=True) == AGENT.encode()
        await door.settled()


@on_both_loops
async def test_a_dialer_closed_in_the_middle_of_a_handshake(tmp_folder: Any) -> None:
    """Closing a dialer while it waits for a silent server leaves no task and no socket."""
    before = asyncio.all_tasks()
    right = Pki()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with right.dialer(silent.getsockname()[1], tmp_folder) as dialer:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(dialer.channel, ECHO, timeout=0.3)
            assert dialer._tasks
    await eventually(lambda: asyncio.all_tasks() <= before)


def test_keys_never_touch_a_disk(tmp_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context is made without a single file being opened for writing on a disk."""
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    before = len(os.listdir("/proc/self/fd"))
    Pki().client(Pki().agent())
    assert opened == [] and len(os.listdir("/proc/self/fd")) == before
    assert workload_key()


@pytest.fixture
def tmp_folder() -> Iterator[Any]:
    """A private folder with a short name."""
    with a_folder() as folder:
        yield folder
