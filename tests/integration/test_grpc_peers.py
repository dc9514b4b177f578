"""
grpcio services that talk by SPIFFE ID: every shape of call, rotations, expiry, authorization.

Each test names its rule.  Who gets not a byte stands in
tests/security/test_python_peers.py.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import PreconditionError, UnauthenticatedError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.matching import any_id, exactly, one_of
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.frontdoor import dialer
from tests.support.authorities import NOW
from tests.support.clock import DrivenClock
from tests.support.door import (
    Traces,
    call,
    eventually,
    on_both_loops,
    on_uvloop,
    settled_traces,
)
from tests.support.peers import ALICE, BOB, CAROL, Material, World, without_key
from tests.support.stack import a_folder
from tests.support.tokens import a_bundle, a_token
from workload_api.client import grpc_peers
from workload_api.client.grpc_peers import caller_of, caller_svid_of, jwt_svid_of
from workload_api.client.jwt_auth import JwtVerifier, metadata_of

SERVICE = "/test.Greeter"
NEVER = timedelta(hours=1)
"""For a sweep that is to have no part in a test."""


class Greeter:
    """A service of somebody's: one method of each shape, and one that writes to its context."""

    def __init__(self) -> None:
        self.served = 0
        self.holding = asyncio.Event()

    def register(self, server: Any) -> None:
        """As generated code does."""
        handlers = {
            "Who": grpc.unary_unary_rpc_method_handler(self.who),
            "Serial": grpc.unary_unary_rpc_method_handler(self.serial),
            "Break": grpc.unary_unary_rpc_method_handler(self.breaks),
            "Hold": grpc.unary_stream_rpc_method_handler(self.hold),
            "Write": grpc.unary_stream_rpc_method_handler(self.write),
            "Gather": grpc.stream_unary_rpc_method_handler(self.gather),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
            "Read": grpc.stream_stream_rpc_method_handler(self.read),
            "Jwt": grpc.unary_unary_rpc_method_handler(self.jwt),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE[1:], handlers),)
        )
        server.add_registered_method_handlers(SERVICE[1:], handlers)

    async def who(self, request: bytes, context: Any) -> bytes:
        """Who calls."""
        self.served += 1
        return request + caller_of(context).uri.encode()

    async def serial(self, _: bytes, context: Any) -> bytes:
        """With which SVID."""
        return caller_svid_of(context).serial.encode()

    async def breaks(self, _: bytes, __: Any) -> bytes:
        """Fail in a way that nobody outside should read about."""
        raise ValueError("the password is hunter2")

    async def hold(self, _: bytes, context: Any) -> AsyncIterator[bytes]:
        """Answer, and hold the stream."""
        yield caller_of(context).uri.encode()
        self.holding.set()
        await asyncio.Event().wait()

    async def write(self, request: bytes, context: Any) -> None:
        """Two answers, written to the context."""
        await context.write(request)
        await context.write(caller_of(context).uri.encode())

    async def gather(self, requests: AsyncIterator[bytes], _: Any) -> bytes:
        """All of it."""
        return b"".join([one async for one in requests])

    async def chat(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        """Each of it."""
        async for one in requests:
            yield one

    async def read(self, _: Any, context: Any) -> None:
        """Each of it, read from and written to the context."""
        while (one := await context.read()) is not grpc.aio.EOF:
            await context.write(one)

    async def jwt(self, _: bytes, context: Any) -> bytes:
        """Whose JWT-SVID came along."""
        return jwt_svid_of(context).spiffe_id.uri.encode()


class Two:
    """Bob's service and alice's channel to it."""

    def __init__(self) -> None:
        self.world = World()
        self.alice, self.bob = self.world.material(ALICE), self.world.material(BOB)
        self.greeter = Greeter()
        self.clock = DrivenClock()
        self.port = 0
        self.channel: Any = None

    async def call(self, method: str, request: bytes = b"", **options: Any) -> bytes:
        """A unary call."""
        return await call(self.channel, f"{SERVICE}/{method}", request, **options)

    async def held(self) -> Any:
        """A stream that alice holds open."""
        stream = self.channel.unary_stream(f"{SERVICE}/Hold")(b"")
        assert await stream.read() == ALICE.uri.encode()
        await self.greeter.holding.wait()
        return stream


@asynccontextmanager
async def two(
    server: dict[str, Any] | None = None, client: dict[str, Any] | None = None
) -> AsyncIterator[Two]:
    """Both up; *server* and *client* are what a test changes at either."""
    made = Two()
    serves = {"authorize": exactly(ALICE), "now": made.clock.now, **(server or {})}
    calls = {"authorize": exactly(BOB), "now": made.clock.now, **(client or {})}
    async with grpc_peers.serving(made.bob, made.greeter.register, **serves) as made.port:
        async with grpc_peers.channel(made.alice, "127.0.0.1", made.port, **calls) as channel:
            made.channel = channel
            yield made


async def outcome(awaited: Any) -> tuple[str, str]:
    """Code and details of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await awaited
    return failed.value.code().name, failed.value.details() or ""


@on_both_loops
async def test_every_shape_of_call() -> None:
    """All shapes of calls pass both ways, in both manners of grpc.aio, and name the caller."""
    async with two() as peers:
        assert await peers.call("Who", b"hi ") == b"hi " + ALICE.uri.encode()
        wrote = peers.channel.unary_stream(f"{SERVICE}/Write")(b"1")
        assert [one async for one in wrote] == [b"1", ALICE.uri.encode()]
        gather = peers.channel.stream_unary(f"{SERVICE}/Gather")
        assert await gather(iter([b"a", b"b"])) == b"ab"
        gathering = gather()
        for one in (b"c", b"d"):
            await gathering.write(one)
        await gathering.done_writing()
        assert await gathering == b"cd"
        for method in ("Chat", "Read"):
            talk = peers.channel.stream_stream(f"{SERVICE}/{method}")()
            for one in (b"1", b"2"):
                await talk.write(one)
                assert await talk.read() == one
            await talk.done_writing()
            assert await talk.read() is grpc.aio.EOF
            assert await talk.code() is grpc.StatusCode.OK


@on_both_loops
async def test_a_call_is_cancelled() -> None:
    """A stream that the caller cancels ends at the server too, and the channel goes on."""
    async with two() as peers:
        stream = await peers.held()
        assert stream.cancel()
        slow = asyncio.ensure_future(peers.call("Who"))
        await asyncio.sleep(0)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert await peers.call("Who") == ALICE.uri.encode()


@on_both_loops
async def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After server and channel are closed no folder, descriptor or task of theirs is left."""
    with a_folder() as folder:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        async with two() as peers:
            await peers.call("Who")
        await settled_traces()
        start = Traces.now()
        async with two(server={"grace": timedelta(0)}) as peers:
            assert len(list(folder.iterdir())) == 2
            stream = await peers.held()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await stream.read()
        del stream, peers  # grpcio polls for as long as somebody holds a call
        gc.collect()
        await eventually(lambda: Traces.now().within(start), lambda: (Traces.now(), start))
        assert list(folder.iterdir()) == []


@on_uvloop
async def test_a_rotation_cuts_nothing() -> None:
    """After a rotation the held stream goes on; new connections present the new SVID."""
    async with two() as peers:
        stream = await peers.held()
        peers.alice.give(peers.world.identity(ALICE, serial=0x7777))
        assert await peers.call("Serial") == str(0x1001).encode()
        assert not stream.done()
        async with grpc_peers.channel(
            peers.alice, "127.0.0.1", peers.port, authorize=exactly(BOB)
        ) as fresh:
            assert await call(fresh, f"{SERVICE}/Serial") == str(0x7777).encode()


@on_uvloop
async def test_sec_17_connections_age() -> None:
    """SEC-17: connections end gracefully at their age, so that new SVIDs come into use."""
    async with two(server={"max_age": timedelta(seconds=0.2)}) as peers:
        stream = await peers.held()
        peers.alice.give(peers.world.identity(ALICE, serial=0x7777))
        async with asyncio.timeout(10):
            while await peers.call("Serial") != str(0x7777).encode():
                await asyncio.sleep(0.02)
        assert not stream.done()


# An SVID that ends while the connection is open.


@on_uvloop
async def test_sec_17_a_caller_that_expires_is_refused_at_its_next_call() -> None:
    """SEC-17: on every call the caller's expiry is looked at, on a connection that is open."""
    async with two(server={"sweep_every": NEVER}, client={"now": None}) as peers:
        assert await peers.call("Who") == ALICE.uri.encode()
        peers.clock.advance(timedelta(hours=2))
        assert await outcome(peers.call("Who")) == (
            "UNAUTHENTICATED",
            "the caller's X509-SVID is refused",
        )
        assert peers.greeter.served == 1


@on_uvloop
async def test_sec_17_a_held_stream_of_an_expired_caller_is_cut() -> None:
    """SEC-17: a stream that is held does not outlive the caller's SVID."""
    sweeps = {"sweep_every": timedelta(seconds=0.05)}
    async with two(server=sweeps, client={"now": None}) as peers:
        stream = await peers.held()
        peers.clock.advance(timedelta(hours=2))
        assert (await outcome(stream.read()))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("side", ["server", "client"])
@on_uvloop
async def test_sec_17_who_is_not_vouched_for_any_more_is_cut(side: str) -> None:
    """SEC-17: at once when a bundle loses the authority, without waiting for the next sweep."""
    options: dict[str, Any] = {"sweep_every": NEVER}
    async with two(server=options, client=options) as peers:
        stream = await peers.held()
        material = peers.bob if side == "server" else peers.alice
        material.give(material.svid, without_key(material.bundles, "example.org"))
        assert (await outcome(stream.read()))[0] == "UNAVAILABLE"
        _, why = await outcome(peers.call("Who", timeout=2))
        said = {"server": "may not accept our SVID", "client": "certificate verify failed"}
        assert said[side] in why


@on_uvloop
async def test_sec_17_a_taint_of_another_domain_cuts_nobody() -> None:
    """SEC-17: what changes for another trust domain does not touch a connection."""
    async with two() as peers:
        stream = await peers.held()
        for material in (peers.alice, peers.bob):
            material.give(material.svid, without_key(material.bundles, "partner.test"))
        assert await peers.call("Who") == ALICE.uri.encode()
        assert not stream.done()


@pytest.mark.parametrize("whose", ["our own", "the server's"])
@on_uvloop
async def test_sec_17_a_client_leaves_when_an_svid_ends(whose: str) -> None:
    """SEC-17: a client's connection ends with either SVID, and is dialled with the renewed."""
    sweeps = {"sweep_every": timedelta(seconds=0.05)}
    async with two(server={"now": None, "sweep_every": NEVER}, client=sweeps) as peers:
        longer = {"not_after": peers.clock.now().replace(microsecond=0) + timedelta(hours=3)}
        stays, ends = peers.bob, peers.alice
        if whose == "the server's":
            stays, ends = ends, stays
        who = {id(peers.alice): ALICE, id(peers.bob): BOB}
        stays.give(peers.world.identity(who[id(stays)], **longer))
        stream = await peers.held()
        peers.clock.advance(timedelta(hours=2))
        assert (await outcome(stream.read()))[0] == "UNAVAILABLE"
        ends.give(peers.world.identity(who[id(ends)], serial=0x7777, **longer))
        serial = 0x7777 if ends is peers.alice else 0x1001
        assert await peers.call("Serial", wait_for_ready=True) == str(serial).encode()


# Who may.


@on_uvloop
async def test_methods_ask_more() -> None:
    """A method, or a service, asks for more than the server; what it does not name is open."""
    methods = {
        f"{SERVICE}/Who": exactly(CAROL),
        f"{SERVICE}/Serial": exactly(ALICE),
    }
    async with two(server={"methods": methods}) as peers:
        code, why = await outcome(peers.call("Who"))
        assert code == "PERMISSION_DENIED" and "not the expected identity" in why
        assert peers.greeter.served == 0
        assert await peers.call("Serial") == str(0x1001).encode()
    async with two(server={"methods": {SERVICE: exactly(CAROL)}}) as peers:
        for method in ("Who", "Serial"):
            assert (await outcome(peers.call(method)))[0] == "PERMISSION_DENIED"
        stream = peers.channel.unary_stream(f"{SERVICE}/Hold")(b"")
        assert (await outcome(stream.read()))[0] == "PERMISSION_DENIED"


NOBODYS = ("", "/", "test.Greeter", "test.Greeter/Who", "/test.Greeter/", "/test.Greeter/who",
           "/test.Greeter/Who/", "/other.Service", "/other.Service/Who")  # fmt: skip


@pytest.mark.parametrize("name", NOBODYS)
async def test_a_method_that_nobody_has_is_refused(name: str) -> None:
    """A name that no servicer has is refused at the start, as it would protect nothing."""
    with pytest.raises(PreconditionError, match=r"no servicer has .*/package\.Service"):
        async with two(server={"methods": {name: any_id()}}):
            pass


@on_uvloop
async def test_sec_17_authorize_is_asked_at_each_call() -> None:
    """SEC-17: a caller that is not wanted any more is refused on its open connection."""
    banned: set[SpiffeId] = set()

    def authorize(who: SpiffeId) -> None:
        if who in banned:
            raise LookupError("a list of ours says no")

    async with two(server={"authorize": authorize, "sweep_every": NEVER}) as peers:
        assert await peers.call("Who") == ALICE.uri.encode()
        banned.add(ALICE)
        assert await outcome(peers.call("Who")) == (
            "PERMISSION_DENIED",
            "the caller is not welcome",
        )


@on_uvloop
async def test_federation() -> None:
    """FED-43: a caller of a federated trust domain is served, by its own domain's bundle."""
    async with two(server={"authorize": one_of((ALICE, CAROL))}) as peers:
        carol = peers.world.material(CAROL)
        async with grpc_peers.channel(
            carol, "127.0.0.1", peers.port, authorize=exactly(BOB)
        ) as channel:
            assert await call(channel, f"{SERVICE}/Who") == CAROL.uri.encode()


@on_uvloop
async def test_errors_of_a_servicer_say_nothing() -> None:
    """A servicer that breaks answers INTERNAL, without a word of what broke."""
    async with two() as peers:
        assert await outcome(peers.call("Break")) == ("INTERNAL", "internal error")


async def test_caller_of_is_for_our_servers_alone() -> None:
    """A servicer behind a plain grpcio server has no caller."""
    greeter = Greeter()
    server = grpc.aio.server()
    greeter.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen: list[BaseException] = []

    async def who(_: bytes, context: Any) -> bytes:
        for ask in (caller_of, jwt_svid_of):
            with pytest.raises(UnauthenticatedError) as refused:
                ask(context)
            seen.append(refused.value)
        return b""

    handlers = {"Ask": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Y", handlers),))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await call(channel, "/x.Y/Ask")
    await server.stop(None)
    assert len(seen) == 2


# Why not.

SHAPES: dict[str, Callable[[Any], Any]] = {
    "unary_unary": lambda channel: channel.unary_unary(f"{SERVICE}/Who")(b""),
    "unary_stream": lambda channel: channel.unary_stream(f"{SERVICE}/Hold")(b"").read(),
    "stream_unary": lambda channel: channel.stream_unary(f"{SERVICE}/Gather")(iter([b"a"])),
    "stream_stream": lambda channel: channel.stream_stream(f"{SERVICE}/Chat")(
        iter([b"a"])
    ).read(),
}


@pytest.mark.parametrize("shape", SHAPES)
@on_both_loops
async def test_a_call_says_why_there_is_no_connection(shape: str) -> None:
    """The details of a call to the wrong server say what was wrong with it."""
    async with two(client={"authorize": exactly(CAROL)}) as peers:
        code, why = await outcome(SHAPES[shape](peers.channel))
        assert code == "UNAVAILABLE"
        assert f"127.0.0.1:{peers.port}: " in why
        assert f'the peer is "{BOB}", which is not the expected identity' in why
        assert peers.greeter.served == 0


@on_uvloop
async def test_no_server_and_no_svid_are_told_apart() -> None:
    """Nobody listening, no such host and no SVID of our own each have their words."""
    world = World()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = []
        empty = Material(None, world.bundles)
        for material, host in (
            (world.material(), "127.0.0.1"),
            (world.material(), "no.such.host.invalid"),
            (empty, "127.0.0.1"),
        ):
            async with two() as peers:
                target = peers.port if material is empty else port
                async with grpc_peers.channel(
                    material, host, target, authorize=any_id()
                ) as channel:
                    said.append((await outcome(call(channel, f"{SERVICE}/Who", timeout=3)))[1])
    assert "refused" in said[0].lower()
    assert "no.such.host.invalid" in said[1]
    assert "no SVID" in said[2]


@on_uvloop
async def test_a_server_that_comes_late_is_waited_for() -> None:
    """A call that waits for ready goes through once the right server is there."""
    world = World()
    greeter = Greeter()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with grpc_peers.channel(
        world.material(ALICE), "127.0.0.1", port, authorize=exactly(BOB)
    ) as channel:
        waiting = asyncio.ensure_future(
            call(channel, f"{SERVICE}/Who", timeout=20, wait_for_ready=True)
        )
        await asyncio.sleep(0.05)
        bob = world.material(BOB)
        async with grpc_peers.serving(
            bob, greeter.register, authorize=exactly(ALICE), port=port
        ):
            assert await waiting == ALICE.uri.encode()


@on_uvloop
async def test_a_change_is_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that waits out its back-off dials again when SVID or bundles change."""
    monkeypatch.setattr("random.SystemRandom.random", lambda _: 1.0)
    monkeypatch.setattr(dialer, "FIRST_PAUSE", timedelta(seconds=15))
    async with two() as peers:
        late = peers.world.material(ALICE)
        late.bundles = without_key(late.bundles, "example.org")
        async with grpc_peers.channel(
            late, "127.0.0.1", peers.port, authorize=exactly(BOB)
        ) as channel:
            assert (await outcome(call(channel, f"{SERVICE}/Who")))[0] == "UNAVAILABLE"
            waiting = asyncio.ensure_future(
                call(channel, f"{SERVICE}/Who", wait_for_ready=True, timeout=10)
            )
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            assert not done
            late.give(late.svid, peers.world.bundles)
            assert await waiting == ALICE.uri.encode()


@on_uvloop
async def test_large_messages() -> None:
    """Messages above gRPC's 4 MiB pass where both ends are told so."""
    size = {"max_message_bytes": 8 * 1024 * 1024}
    options = {"options": {"grpc.max_receive_message_length": 8 * 1024 * 1024}}
    async with two(server=size, client=options) as peers:
        assert len(await peers.call("Who", bytes(6 * 1024 * 1024))) > 6 * 1024 * 1024


@on_both_loops
async def test_a_server_that_does_not_want_us_is_told_apart() -> None:
    """The details of a call say so when the server left after the handshake, without a word."""
    async with two(server={"authorize": exactly(CAROL)}) as peers:
        code, why = await outcome(peers.call("Who"))
        assert code == "UNAVAILABLE"
        assert f"127.0.0.1:{peers.port}: it left without a word" in why
        assert peers.greeter.served == 0


# JWT-SVIDs.


class Bundles:
    """As `BundleSource`."""

    def __init__(self, bundles: BundleSet) -> None:
        self.bundles = bundles


W = SpiffeId.parse("spiffe://example.org/w")


@asynccontextmanager
async def with_jwt() -> AsyncIterator[Two]:
    """A service that asks for a JWT-SVID of w, for the audience db."""
    source = Bundles(BundleSet.of([a_bundle()]))
    verifier = JwtVerifier(source, "db", exactly(W), now=lambda: NOW)
    async with two(server={"interceptors": [grpc_peers.jwt_svids(verifier)]}) as peers:
        yield peers


@on_both_loops
async def test_jwt_23_metadata_carry_a_jwt_svid() -> None:
    """JWT-23: a JWT-SVID comes as ``authorization: Bearer``, beside the X509-SVID."""
    async with with_jwt() as peers:
        svid = JwtSvid.parse_unverified(a_token())
        assert await peers.call("Jwt", metadata=metadata_of(svid)) == W.uri.encode()
        assert await peers.call("Who", metadata=metadata_of(svid)) == ALICE.uri.encode()


REFUSED: dict[str, tuple[Callable[[], list[tuple[str, str]]], str]] = {
    "none": (list, "UNAUTHENTICATED"),
    "two": (lambda: [("authorization", f"Bearer {a_token()}")] * 2, "UNAUTHENTICATED"),
    "basic": (lambda: [("authorization", "Basic dTpw")], "UNAUTHENTICATED"),
    "garbage": (lambda: [("authorization", "Bearer x.y.z")], "UNAUTHENTICATED"),
    "another audience": (
        lambda: [("authorization", f"Bearer {a_token(aud=['web'])}")],
        "UNAUTHENTICATED",
    ),
    "another subject": (
        lambda: [("authorization", f"Bearer {a_token(sub='spiffe://example.org/x')}")],
        "PERMISSION_DENIED",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@on_uvloop
async def test_jwt_23_what_is_refused(what: str) -> None:
    """JWT-23: without exactly one good JWT-SVID for us no servicer is reached."""
    metadata, expected = REFUSED[what]
    async with with_jwt() as peers:
        code, why = await outcome(peers.call("Who", metadata=metadata()))
        assert code == expected
        assert "ey" not in why  # as every part of a token begins
        assert peers.greeter.served == 0
