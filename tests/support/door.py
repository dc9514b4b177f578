"""
A running front door with a small service behind it, for tests: on a Unix socket, or on TLS.

`a_door` opens one; `Door.neighbour` is the well-behaved client that must be served whatever
the others do; `Door.settled` waits until connections, descriptors and tasks are back where
they were.
"""

import asyncio
import contextlib
import functools
import inspect
import os
import resource
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from spiffe_core.bundle import BundleSet
from spiffe_core.matching import exactly
from spiffe_core.x509svid import X509Svid, verify_x509_svid
from spiffe_wire.frontdoor.dialer import Dialer
from spiffe_wire.frontdoor.door import FrontDoor
from spiffe_wire.frontdoor.peer import REGISTRY, UnixPeer, peer_of, unix_peer_of
from spiffe_wire.frontdoor.tls import client_context, server_context
from spiffe_wire.interceptors import ErrorInterceptor
from tests.support.authorities import a_key
from tests.support.ca import Cert, FakeCa
from tests.support.http2 import Raw, raw_tls, raw_unix
from tests.support.stack import a_folder

SERVICE = "test.Echo"
ECHO, WHO, HOLD, FLOOD, GATHER, CHAT = (
    f"/{SERVICE}/{name}" for name in ("Echo", "Who", "Hold", "Flood", "Gather", "Chat")
)
PATIENCE = 10.0
"""Seconds after which what should have happened has not."""
CHUNK = b"x" * 32 * 1024


@dataclass
class Echo:
    """The service behind the door: one method of each shape, and two that never end."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0
    """How many streams are held at this moment."""
    ended: list[BaseException | None] = field(default_factory=list)

    def register(self, server: Any) -> None:
        """Add the methods to *server*."""
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Who": grpc.unary_unary_rpc_method_handler(self.who),
            "Hold": grpc.unary_stream_rpc_method_handler(self.hold),
            "Flood": grpc.unary_stream_rpc_method_handler(self.flood),
            "Gather": grpc.stream_unary_rpc_method_handler(self.gather),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )

    async def echo(self, request: bytes, _: Any) -> bytes:
        """What was sent."""
        return request

    async def who(self, _: bytes, context: Any) -> bytes:
        """Who calls: the proven peer."""
        peer = peer_of(context)
        if isinstance(peer, UnixPeer):
            peer = unix_peer_of(context)
            return f"pid={peer.pid} uid={peer.uid} gid={peer.gid} {peer.proof.value}".encode()
        return b"anonymous" if peer.svid is None else peer.svid.spiffe_id.uri.encode()

    async def hold(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Answer once, then hold until the process behind the call ends."""
        self.held += 1
        self.entered.set()
        try:
            yield request
            peer = peer_of(context)
            if isinstance(peer, UnixPeer):
                await asyncio.wait([peer.exited()])
                peer.check_alive()
            await asyncio.Event().wait()
        finally:
            self.held -= 1

    async def flood(self, _: bytes, __: Any) -> AsyncIterator[bytes]:
        """Answer for ever."""
        self.held += 1
        self.entered.set()
        try:
            while True:
                yield CHUNK
        finally:
            self.held -= 1

    async def gather(self, requests: AsyncIterator[bytes], _: Any) -> bytes:
        """Everything that was sent, joined."""
        return b"".join([one async for one in requests])

    async def chat(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        """Each of what was sent."""
        async for one in requests:
            yield one


@dataclass
class Door:
    """An open door, and the ways to knock."""

    kind: str
    door: FrontDoor
    echo: Echo
    folder: Path
    path: Path
    host: str = "127.0.0.1"
    port: int = 0
    pki: "Pki | None" = None
    start: "Traces | None" = None

    @asynccontextmanager
    async def raw(self) -> AsyncIterator[Raw]:
        """A connection that speaks what the test wants."""
        if self.kind == "unix":
            async with raw_unix(self.path) as connection:
                yield connection
        else:
            assert self.pki is not None
            async with raw_tls(self.host, self.port, self.pki.client()) as connection:
                yield connection

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        """A channel of a well-behaved client, with a connection of its own."""
        if self.kind == "unix":
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"unix:{self.path}", options) as channel:
                yield channel
        else:
            assert self.pki is not None
            async with self.pki.dialer(self.port, self.folder, host=self.host) as dialer:
                yield dialer.channel

    async def neighbour(self) -> None:
        """A well-behaved client on a connection of its own is served."""
        async with self.channel() as channel:
            assert await call(channel, ECHO, b"hello") == b"hello"

    async def settled(self) -> None:
        """Connections, names, streams, descriptors and tasks are no more than at the start."""
        assert self.start is not None
        await eventually(lambda: self.door.connections == 0 and self.echo.held == 0)
        start = self.start
        await eventually(lambda: Traces.now().within(start), lambda: (Traces.now(), start))


@dataclass(frozen=True)
class Traces:
    """What a leak would show in."""

    descriptors: int
    tasks: int
    names: int

    @classmethod
    def now(cls) -> "Traces":
        """As it is at this moment."""
        tasks = [one for one in asyncio.all_tasks() if not one.done()]
        return cls(len(os.listdir("/proc/self/fd")), len(tasks), len(REGISTRY))

    def within(self, other: "Traces") -> bool:
        """Whether nothing is more than in *other*."""
        return all(a <= b for a, b in zip(astuple(self), astuple(other), strict=True))


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on uvloop, as the daemons do, and on asyncio, as the demo does."""
    return _on(("uvloop", "asyncio"), test)


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on uvloop, as the daemons do."""
    return _on(("uvloop",), test)


def _on(
    loops: tuple[str, ...], test: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[..., None]:
    @functools.wraps(test)
    def run(loop: str, **arguments: Any) -> None:
        factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test(**arguments))

    own = list(inspect.signature(test).parameters.values())
    loop = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = inspect.Signature([*own, loop])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", loops)(run)


@asynccontextmanager
async def a_door(kind: str = "unix", **changes: Any) -> AsyncIterator[Door]:
    """A door of *kind*, ``unix`` or ``tls``; *changes* are `FrontDoor`'s arguments."""
    echo = Echo()
    listen = changes.pop("listen", {})
    arguments = {"interceptors": [ErrorInterceptor()], **changes}
    with a_folder() as folder:
        async with FrontDoor(echo.register, runtime_dir=folder / "i", **arguments) as door:
            made = Door(kind, door, echo, folder, folder / "s")
            if kind == "unix":
                await door.listen_unix(made.path, **{"mode": 0o600, **listen})
            else:
                made.pki, made.host = Pki(), listen.get("host", made.host)
                made.port = await door.listen_tls(
                    made.host,
                    0,
                    context=lambda: made.pki.server(),
                    identify=lambda chain: made.pki.identify(chain),
                )
            await made.neighbour()  # grpcio opens descriptors of its own at the first call
            await eventually(lambda: door.connections == 0)
            await settled_traces()
            made.start = Traces.now()
            yield made


async def call(channel: Any, method: str, request: bytes = b"", **options: Any) -> bytes:
    """One unary call."""
    return await channel.unary_unary(method)(request, **{"timeout": PATIENCE, **options})


async def eventually(
    condition: Callable[[], bool], what: Callable[[], object] = lambda: ""
) -> None:
    """Wait until *condition* holds; the kernel and grpcio tell nobody when they are done."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"did not happen in {PATIENCE} s: {what()}") from None


async def settled_traces() -> None:
    """Wait until nothing changes any more: grpcio closes what it had in its own time."""
    last, since = Traces.now(), 0
    while since < 6:
        await asyncio.sleep(0.005)
        now = Traces.now()
        last, since = now, since + 1 if now == last else 0


def wall_clock() -> datetime:
    """The real time: OpenSSL knows no other."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass
class Pki:
    """A CA, a server under it and what its clients hold; a test changes one thing."""

    ca: FakeCa = field(default_factory=lambda: current_ca())
    server_path: str = "/spire/server"
    server_ca: FakeCa | None = None
    server_changes: dict[str, Any] = field(default_factory=dict)

    def server(self) -> ssl.SSLContext:
        """The server's context, made anew as rotation would."""
        signer = self.server_ca or self.ca
        leaf = current(signer.leaf(self.server_path)).but(**self.server_changes)
        return server_context(signer.chain(leaf), workload_key(), [self.ca.root.cert.der])

    def identify(self, chain: tuple[bytes, ...]) -> X509Svid:
        """As the server does: against its own trust domain's bundle, now."""
        return verify_x509_svid(chain, self.ca.bundles, at=wall_clock())

    def client(self, chain: tuple[bytes, ...] = ()) -> ssl.SSLContext:
        """A client's context, with *chain* as its certificate."""
        return client_context([self.ca.root.cert.der], chain, workload_key() if chain else b"")

    def agent(self, signer: FakeCa | None = None, **changes: Any) -> tuple[bytes, ...]:
        """The chain of an agent; *changes* spoil its leaf."""
        signer = signer or self.ca
        return signer.chain(current(signer.leaf("/spire/agent/x/1")).but(**changes))

    def check(self, chain: tuple[bytes, ...]) -> None:
        """As the agent does: the server's chain and ID."""
        bundles = BundleSet.of([self.ca.bundle])
        svid = verify_x509_svid(chain, bundles, at=wall_clock())
        exactly(self.ca.trust_domain.server_id)(svid.spiffe_id)

    def dialer(
        self, port: int, folder: Path, chain: tuple[bytes, ...] = (), host: str = "127.0.0.1"
    ) -> Dialer:
        """An agent's way to the server on *port*."""
        return Dialer(
            host,
            port,
            context=lambda: self.client(chain),
            check=self.check,
            runtime_dir=folder / "d",
        )


def current_ca(trust_domain: str = "example.org", **changes: Any) -> FakeCa:
    """A CA that is valid by the real clock."""
    now = wall_clock()
    times = {"not_before": now - timedelta(days=1), "not_after": now + timedelta(days=1)}
    return FakeCa(trust_domain, **{**times, **changes})


def current(leaf: Cert) -> Cert:
    """*leaf*, valid by the real clock."""
    now = wall_clock()
    return leaf.but(not_before=now - timedelta(minutes=1), not_after=now + timedelta(hours=1))


def workload_key() -> bytes:
    """The key of every leaf that a `FakeCa` makes, PKCS#8 DER."""
    key = a_key("p256", "workload")
    return bytes(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Leave this process not one more descriptor than it has, for the time of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(one) for one in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
