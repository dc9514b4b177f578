"""
The front door: accept, prove the peer, then splice to a private grpcio server.

Source: transport (decision and rules), SEC-17, SEC-31, SEC-80, SEC-81.  grpcio cannot say
who is at the other end of a Unix socket and cannot ask for an optional client certificate,
so it never sees the public socket: it listens on a Unix socket that only we can reach, and
knows each connection by a name of 128 random bits that maps to the proven `Peer`.
"""

import asyncio
import logging
import os
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import grpc

from spiffe_core.errors import ForbiddenError, InternalError, NotReadyError, SpiffeError
from spiffe_core.x509svid import X509Svid
from spiffe_wire import privatefolder
from spiffe_wire.frontdoor import kernel
from spiffe_wire.frontdoor.acceptor import Acceptor
from spiffe_wire.frontdoor.conduct import Conduct, ConductError
from spiffe_wire.frontdoor.gate import Gate
from spiffe_wire.frontdoor.kernel import PeerPolicy
from spiffe_wire.frontdoor.limits import DoorLimits, Places, Refusals, Turns, address_key
from spiffe_wire.frontdoor.peer import REGISTRY, Peer, PeerProof, TlsPeer
from spiffe_wire.frontdoor.selfcheck import SelfCheck
from spiffe_wire.frontdoor.splice import LINGER_SECONDS, Leg, join, notice_dead_peer
from spiffe_wire.frontdoor.tls import peer_chain
from spiffe_wire.logs import event
from spiffe_wire.unixsocket import SocketFile, bind_unix_socket

__all__ = ["DoorLimits", "FrontDoor", "Identify"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

WATCH_INTERVAL: Final = timedelta(seconds=3)  # SEC-37: a removed socket is noticed in 5 s
_BACKLOG: Final = 1024
_LAST_WORDS: Final = timedelta(milliseconds=50)
"""For answers that were given to get through the splice, before it is cut."""

Identify = Callable[[tuple[bytes, ...]], X509Svid]
"""Verifies a presented chain, or raises; called before the peer's first byte is passed on."""


@dataclass(eq=False, slots=True)
class _Connection:
    """From accept to close; `FrontDoor._end` runs once for each, whatever happened."""

    socket: socket.socket
    accepted_at: float
    conduct: Conduct = field(default_factory=Conduct)
    places: ExitStack = field(default_factory=ExitStack)
    """What it takes up until it is closed."""
    silent_places: ExitStack = field(default_factory=ExitStack)
    """What it takes up until HTTP/2 has begun."""
    peer: Peer | None = None
    name: str = ""
    outer: Leg | None = None


_Admit = Callable[[_Connection], Awaitable[None]]


class FrontDoor:
    """
    One private grpcio server and the public sockets in front of it; an async context manager.

    *register* adds the servicers.  *max_age* ends TCP connections gracefully (SEC-17); None
    for Unix sockets, whose callers are checked at every call.
    """

    def __init__(
        self,
        register: Callable[[Any], None],
        *,
        runtime_dir: Path,
        interceptors: Sequence[Any] = (),
        limits: DoorLimits | None = None,
        max_message_bytes: int = 4 * 1024 * 1024,
        max_age: timedelta | None = None,
    ) -> None:
        self._register = register
        self._runtime_dir = runtime_dir
        self._gate = Gate()
        self._check = SelfCheck()
        self._interceptors = [self._gate, self._check, *interceptors]
        self.limits = limits or DoorLimits()
        self._options = _options(self.limits, max_message_bytes, max_age)
        self._open: set[_Connection] = set()
        self._per_uid = Places("connections of this user", self.limits.per_uid)
        self._per_pid = Places("connections of this process", self.limits.per_pid)
        self._unopened = Places("silent connections of this user", self.limits.unopened_per_uid)
        self._unproven = Places(
            "anonymous connections from there", self.limits.unproven_per_address
        )
        self._handshakes = Turns(self.limits.handshakes)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._acceptors: set[Acceptor] = set()
        self.refusals = Refusals()
        self.proof = PeerProof.PIDFD

    async def __aenter__(self) -> Self:
        # Reached by descriptor: its names fit sun_path wherever it lies.
        self._private = privatefolder.make(self._runtime_dir, "d")
        self._folder = os.open(self._private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inner = -1
        self._server = grpc.aio.server(interceptors=self._interceptors, options=self._options)
        try:
            self._register(self._server)
            inner = self._fresh_path()
            self._server.add_insecure_port(f"unix:{inner}")
            await self._server.start()
            # From here on the socket has no name: only this descriptor reaches it.
            self._inner = os.open(inner, os.O_PATH | os.O_CLOEXEC)
            inner.unlink()
            await self._check_itself()
        except BaseException:
            await self.close(timedelta(0))
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(timedelta(0))

    async def listen_unix(
        self,
        path: Path,
        *,
        mode: int,
        allowed_uids: frozenset[int] | None = None,
        policy: PeerPolicy = PeerPolicy.ALLOW_FALLBACK,
        old_kernel: bool = False,
    ) -> None:
        """
        Serve on a Unix socket at *path*; *allowed_uids* None admits every user.

        Raises:
            SocketPathError: the socket cannot safely be made there.
        """

        async def admit(connection: _Connection) -> None:
            peer = kernel.prove(connection.socket, policy, old_kernel=old_kernel)
            if allowed_uids is not None and peer.uid not in allowed_uids:
                raise ForbiddenError(f"uid {peer.uid} may not use {path}")
            connection.places.callback(self._per_uid.take(peer.uid))
            connection.places.callback(self._per_pid.take(peer.pid))
            connection.silent_places.callback(self._unopened.take(peer.uid))
            self._note_proof(peer.proof)
            await self._splice(connection, await self._take(connection), peer)

        def listen() -> Acceptor:
            return self._listen(bind_unix_socket(path, mode), admit, SocketFile(path))

        self._start(self._watch(listen(), listen, path))

    async def listen_tls(
        self, host: str, port: int, *, context: Callable[[], ssl.SSLContext], identify: Identify
    ) -> int:
        """
        Serve TLS on *host*:*port* (0 picks one) and return the port.

        *context* is asked for each connection, so that rotation is one assignment.

        Raises:
            InternalError: the address cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise InternalError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        listener.setblocking(False)

        async def admit(connection: _Connection) -> None:
            await self._admit_tls(connection, context(), identify)

        self._listen(listener, admit)
        return int(listener.getsockname()[1])

    def disconnect(self, unwanted: Callable[[Peer], bool]) -> int:
        """Cut every connection whose peer is *unwanted*; return how many there were."""
        found = [one for one in self._open if one.peer is not None and unwanted(one.peer)]
        for connection in found:
            self._cut(connection)
        return len(found)

    @property
    def connections(self) -> int:
        """How many connections are open, those being admitted included."""
        return len(self._open)

    async def close(self, grace: timedelta) -> None:
        """Stop accepting, give running calls *grace*, then end everything; idempotent."""
        for task in self._tasks:
            task.cancel()
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._gate.shut(grace)
        if self._open:
            await asyncio.sleep(_LAST_WORDS.total_seconds())
        # Before grpcio stops: what arrived at it meanwhile would be told CANCELLED.
        await self._cut_all(list(self._open))
        await self._server.stop(0)
        for descriptor in (self._inner, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._inner = self._folder = -1
        privatefolder.remove(self._private)

    def _fresh_path(self) -> Path:
        return Path(f"/proc/self/fd/{self._folder}/{secrets.token_hex(16)}")

    def _start(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _note_proof(self, proof: PeerProof) -> None:
        if proof is PeerProof.FALLBACK and self.proof is PeerProof.PIDFD:
            self.proof = proof
            event(_log, logging.WARNING, "peer_proof_weaker", reason="kernel before 6.5")

    def _listen(
        self, listener: socket.socket, admit: _Admit, file: SocketFile | None = None
    ) -> Acceptor:
        def accepted(connection: socket.socket) -> None:
            self._accepted(connection, admit)

        def failed(error: OSError) -> None:
            self.refusals.note("accept_failed", error)

        acceptor = Acceptor(listener, accepted, failed, file)
        self._acceptors.add(acceptor)
        return acceptor

    def _accepted(self, accepted: socket.socket, admit: _Admit) -> None:
        if len(self._open) >= self.limits.connections:
            accepted.close()
            self.refusals.note("too_many")
            return
        connection = _Connection(accepted, asyncio.get_running_loop().time())
        self._open.add(connection)
        task = self._start(self._guard(connection, admit))

        def settle(task: "asyncio.Task[bool]") -> None:
            if task.cancelled() or not task.result():
                self._cut(connection)

        task.add_done_callback(settle)  # also when it never took its first step

    async def _guard(self, connection: _Connection, admit: _Admit) -> bool:
        """Admit, and say whether that went well."""
        try:
            until = connection.accepted_at + self.limits.opening.total_seconds()
            async with asyncio.timeout_at(until):
                await admit(connection)
        except TimeoutError:
            self.refusals.note("silent")
        except (SpiffeError, OSError) as error:
            self.refusals.note(type(error).__name__, error)
        except Exception as error:  # noqa: BLE001 see below
            # Whatever a peer's bytes provoked in a library ends that peer's connection alone.
            event(_log, logging.ERROR, "connection_failed", exc_info=error)
        else:
            return True
        return False

    async def _admit_tls(
        self, connection: _Connection, context: ssl.SSLContext, identify: Identify
    ) -> None:
        address = connection.socket.getpeername()[0]
        unproven = ExitStack()
        unproven.callback(self._unproven.take(address_key(address)))
        connection.places.callback(unproven.close)
        notice_dead_peer(connection.socket)
        async with self._handshakes.turn(address_key(address)):
            outer = await self._take(
                connection,
                ssl=context,
                ssl_handshake_timeout=self.limits.opening.total_seconds(),
                ssl_shutdown_timeout=LINGER_SECONDS,
            )
        tls = outer.ssl_object
        if tls.selected_alpn_protocol() != "h2":
            raise ForbiddenError("the client does not offer HTTP/2")
        if tls.session_reused:
            # TLS 1.2 may remember sessions on our side, and no option of `ssl` forbids it.
            raise ForbiddenError("the client resumed a session (SEC-17)")
        chain = peer_chain(tls)
        peer = TlsPeer(identify(chain) if chain else None, address)
        if peer.svid is not None:
            unproven.close()
        await self._splice(connection, outer, peer)

    async def _take(self, connection: _Connection, **tls: Any) -> Leg:
        """Hand the socket to the loop; with TLS, this is the handshake."""
        connection.outer = outer = Leg(
            lambda: self._end(connection),
            inspect=connection.conduct.from_client,
            objected=lambda error: self._object(connection, error),
            stall=self.limits.stall,
        )
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: outer, connection.socket, **tls)
        except BaseException:
            # uvloop closes a transport that was not waited for, and tells nobody.
            outer.transport = None
            raise
        return outer

    async def _splice(self, connection: _Connection, outer: Leg, peer: Peer) -> None:
        """Once HTTP/2 has begun, join *outer* to a connection of its own to the server."""
        connection.peer = peer
        peer.cut = lambda: self._cut(connection)
        if not await connection.conduct.begun:
            raise ConnectionAbortedError("the client has left, or does not speak HTTP/2")
        connection.silent_places.close()
        join(outer, await self._connect_inner(connection, peer))
        loop = asyncio.get_running_loop()
        until = connection.accepted_at + self.limits.first_request.total_seconds()
        timer = loop.call_at(until, self._expect_request, connection)
        connection.places.callback(timer.cancel)

    def _expect_request(self, connection: _Connection) -> None:
        if connection in self._open and not connection.conduct.requested:
            self.refusals.note("no_request")
            self._cut(connection)

    async def _connect_inner(self, connection: _Connection, peer: Peer) -> Leg:
        """Connect to the private server under a fresh secret name that stands for *peer*."""
        path = self._fresh_path()
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        inner.setblocking(False)
        leg = Leg(
            lambda: self._forget(connection),
            inspect=connection.conduct.from_server,
            objected=lambda error: self._object(connection, error),
        )
        try:
            inner.bind(str(path))
            path.unlink()  # the name stays with the socket, and nobody can reach or squat it
            await self._reach(inner)
            if connection not in self._open:
                raise ConnectionAbortedError("the client has left")
            connection.name = f"unix:{path}"
            REGISTRY[connection.name] = peer
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: leg, sock=inner)
        except BaseException:
            if leg.transport is None:
                inner.close()
            raise
        return leg

    async def _reach(self, inner: socket.socket) -> None:
        for pause in (0.001, 0.005, 0.02, 0.1, 0.5, 0.0):
            try:
                inner.connect(f"/proc/self/fd/{self._inner}")
            except BlockingIOError:  # EAGAIN: its backlog is full
                await asyncio.sleep(pause)
            else:
                return
        raise NotReadyError("the server is overloaded")

    def _object(self, connection: _Connection, error: ConductError) -> None:
        """Send off a client that floods; one that has not begun is the guard's."""
        if not connection.conduct.begun.done():
            connection.conduct.abandon()
        elif connection.outer is not None:
            self.refusals.note("flood", error)
            connection.outer.finish(error.farewell)

    def _cut(self, connection: _Connection) -> None:
        """End *connection* now, in whatever state it is."""
        if connection.outer is not None and connection.outer.transport is not None:
            connection.outer.close()
        else:
            connection.socket.close()
            self._end(connection)

    async def _cut_all(self, connections: list[_Connection]) -> None:
        """Cut them and see their sockets closed."""
        legs = [leg.closed for one in connections if one.outer for leg in one.outer.pair()]
        for connection in connections:
            self._cut(connection)
        if legs:
            await asyncio.wait(legs, timeout=LINGER_SECONDS + 1)

    def _forget(self, connection: _Connection) -> None:
        # Before its socket closes, so that the name can never mean anybody else.
        REGISTRY.pop(connection.name, None)

    def _end(self, connection: _Connection) -> None:
        if connection not in self._open:
            return
        self._open.discard(connection)
        self._forget(connection)
        connection.conduct.abandon()
        connection.silent_places.close()
        connection.places.close()
        if connection.peer is not None:
            connection.peer.connection_closed()
        # No cycle may keep them: a pidfd closes with the last reference to its peer.
        connection.peer = connection.outer = None

    async def _watch(
        self, acceptor: Acceptor, listen: Callable[[], Acceptor], path: Path
    ) -> None:
        """Make the socket anew when its file was removed or replaced (SEC-37)."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL.total_seconds())
            if acceptor.file is None or acceptor.file.is_ours():
                continue
            event(_log, logging.WARNING, "socket_replaced", socket=path)
            try:
                fresh = listen()
            except SpiffeError as error:
                event(_log, logging.ERROR, "socket_not_restored", socket=path, exc_info=error)
                continue
            self._acceptors.discard(acceptor)
            acceptor.close()
            acceptor = fresh

    async def _check_itself(self) -> None:
        peer = TlsPeer(None, "self-check")
        path = self._fresh_path()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen()

        async def admit(connection: _Connection) -> None:
            await self._splice(connection, await self._take(connection), peer)

        acceptor = self._listen(listener, admit)
        try:
            await self._check.call(path, peer)
        finally:
            self._acceptors.discard(acceptor)
            acceptor.close()
            path.unlink()
            await self._cut_all([one for one in self._open if one.peer is peer])


def _options(
    limits: DoorLimits, max_message_bytes: int, max_age: timedelta | None
) -> list[tuple[str, int]]:
    options = [
        # The defaults cancel calls in a burst, and announce no limit on streams at all.
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max(4 * 1024 * 1024, max_message_bytes)),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 16 * 1024),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.max_ping_strikes", 0),  # none of its own: `Conduct` counts them
    ]
    if max_age is not None:
        # grpcio adds its own jitter of 10 %; running streams may finish.
        options.append(("grpc.max_connection_age_ms", int(max_age.total_seconds() * 1000)))
    return options
