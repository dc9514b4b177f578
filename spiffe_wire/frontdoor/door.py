"""
The front door: accept, prove the peer, then splice to a private grpcio server.

Source: transport (decision and rules), SEC-17, SEC-31, SEC-80, SEC-81.  grpcio cannot say
who is at the other end of a Unix socket and cannot ask for an optional client certificate,
so it never sees the public socket: it listens on a Unix socket that only we can reach, and
knows each connection by a name of 128 random bits that maps to the proven `Peer`.
"""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shutil
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

import grpc

from spiffe_core.errors import InternalError, SpiffeError
from spiffe_core.x509svid import X509Svid
from spiffe_wire.frontdoor import kernel
from spiffe_wire.frontdoor.kernel import PeerPolicy
from spiffe_wire.frontdoor.peer import REGISTRY, Peer, PeerProof, TlsPeer, UnixPeer, peer_of
from spiffe_wire.frontdoor.splice import Leg, join
from spiffe_wire.frontdoor.tls import peer_chain
from spiffe_wire.logs import event
from spiffe_wire.unixsocket import SocketFile, bind_unix_socket

_log = logging.getLogger(__name__)

# An HTTP/2 client opens with 24 bytes of preface and a SETTINGS frame of at least 9.
_OPENING_BYTES: Final = 33
WATCH_INTERVAL: Final = timedelta(seconds=3)  # SEC-37: a removed socket is noticed in 5 s

Identify = Callable[[tuple[bytes, ...]], X509Svid]
"""Verifies a presented chain, or raises; called inside the handshake, before any RPC."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Limits that apply before anything is attested (SEC-81; table 1)."""

    connections: int = 4096
    per_uid: int = 1500
    per_pid: int = 20
    opening: timedelta = timedelta(seconds=5)
    handshakes: int = 64
    streams: int = 128


@dataclass(eq=False, slots=True)
class _Connection:
    name: str
    peer: Peer
    outer: Leg


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
        self._interceptors = interceptors
        self.limits = limits or DoorLimits()
        self._options = _options(self.limits, max_message_bytes, max_age)
        self._connections: dict[str, _Connection] = {}
        self._per_uid: Counter[int] = Counter()
        self._per_pid: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[socket.socket] = []
        self._files: list[SocketFile] = []
        self._handshakes = asyncio.Semaphore(self.limits.handshakes)
        self.proof = PeerProof.PIDFD

    async def __aenter__(self) -> Self:
        self._runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # 0700, and a short name: inner paths must fit sun_path.
        self._private = Path(tempfile.mkdtemp(prefix="d", dir=self._runtime_dir))
        self._server = grpc.aio.server(interceptors=self._interceptors, options=self._options)
        self._register(self._server)
        probe = _SelfCheck()
        probe.add_to(self._server)
        inner = self._private / "s"
        self._server.add_insecure_port(f"unix:{inner}")
        await self._server.start()
        # From here on the socket has no name: only this descriptor reaches it.
        self._inner = os.open(inner, os.O_PATH | os.O_CLOEXEC)
        inner.unlink()
        await self._check_itself(probe)
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

        async def admit(connection: socket.socket) -> None:
            peer = kernel.prove(connection, policy, old_kernel=old_kernel)
            if allowed_uids is not None and peer.uid not in allowed_uids:
                event(_log, logging.WARNING, "caller_refused", socket=path, uid=peer.uid)
                connection.close()
                return
            self._note_proof(peer.proof)
            await self._admit(connection, peer)

        listener = bind_unix_socket(path, mode)
        file = SocketFile(path)
        self._files.append(file)
        self._start(self._accept(listener, admit))
        self._start(self._watch(file, path, mode, admit))

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
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise InternalError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        listener.setblocking(False)

        async def admit(connection: socket.socket) -> None:
            await self._admit_tls(connection, context(), identify)

        self._start(self._accept(listener, admit))
        return int(listener.getsockname()[1])

    def disconnect(self, unwanted: Callable[[Peer], bool]) -> int:
        """Cut every connection whose peer is *unwanted*; return how many there were."""
        found = [one for one in self._connections.values() if unwanted(one.peer)]
        for connection in found:
            connection.outer.close()
        return len(found)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    async def close(self, grace: timedelta) -> None:
        """Stop accepting, give running calls *grace*, then end everything; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        for file in self._files:
            file.remove()
        self._listeners.clear()
        self._files.clear()
        await self._server.stop(grace.total_seconds())
        for connection in list(self._connections.values()):
            connection.outer.close()
        if self._inner >= 0:
            os.close(self._inner)
            self._inner = -1
        shutil.rmtree(self._private, ignore_errors=True)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _note_proof(self, proof: PeerProof) -> None:
        if proof is PeerProof.FALLBACK and self.proof is PeerProof.PIDFD:
            self.proof = proof
            event(_log, logging.WARNING, "peer_proof_weaker", reason="kernel before 6.5")

    async def _accept(self, listener: socket.socket, admit: Callable[..., Any]) -> None:
        loop = asyncio.get_running_loop()
        self._listeners.append(listener)
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno == errno.EBADF:
                    return
                # Out of descriptors or memory (SEC-84): wait instead of spinning.
                event(_log, logging.ERROR, "accept_failed", exc_info=error)
                await asyncio.sleep(0.1)
                continue
            if len(self._connections) >= self.limits.connections:
                connection.close()
                continue
            connection.setblocking(False)
            self._start(self._guard(connection, admit))

    async def _guard(self, connection: socket.socket, admit: Callable[..., Any]) -> None:
        try:
            await admit(connection)
        except (SpiffeError, OSError, ssl.SSLError, TimeoutError) as error:
            event(_log, logging.INFO, "connection_refused", exc_info=error)
            connection.close()
        except Exception as error:  # noqa: BLE001 see below
            # Whatever a peer's bytes provoked in a library ends that peer's connection alone.
            event(_log, logging.ERROR, "connection_failed", exc_info=error)
            connection.close()

    async def _admit(self, connection: socket.socket, peer: UnixPeer) -> None:
        if (
            self._per_uid[peer.uid] >= self.limits.per_uid
            or self._per_pid[peer.pid] >= self.limits.per_pid
        ):
            connection.close()
            return
        self._per_uid[peer.uid] += 1
        self._per_pid[peer.pid] += 1
        await self._relay(connection, peer)

    async def _relay(self, connection: socket.socket, peer: Peer) -> None:
        name, inner = await self._connect_inner(peer)
        outer = Leg(lambda: self._closed(name))
        self._connections[name] = _Connection(name, peer, outer)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: outer, connection)
        join(outer, inner)
        self._expect_opening(outer)

    async def _admit_tls(
        self, connection: socket.socket, context: ssl.SSLContext, identify: Identify
    ) -> None:
        loop = asyncio.get_running_loop()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = connection.getpeername()[0]
        name = ""
        outer = Leg(lambda: self._closed(name))
        async with self._handshakes:
            transport, _ = await loop.connect_accepted_socket(
                lambda: outer,
                connection,
                ssl=context,
                ssl_handshake_timeout=self.limits.opening.total_seconds(),
            )
        try:
            tls = transport.get_extra_info("ssl_object")
            chain = peer_chain(tls)
            peer = TlsPeer(identify(chain) if chain else None, address)
            if tls.selected_alpn_protocol() != "h2":
                outer.close()
                return
            name, inner = await self._connect_inner(peer)
        except (SpiffeError, OSError) as error:
            event(_log, logging.INFO, "connection_refused", address=address, exc_info=error)
            outer.close()
            return
        self._connections[name] = _Connection(name, peer, outer)
        join(outer, inner)
        self._expect_opening(outer)

    async def _connect_inner(self, peer: Peer) -> tuple[str, Leg]:
        """Connect to the private server under a fresh secret name that stands for *peer*."""
        loop = asyncio.get_running_loop()
        path = self._private / secrets.token_hex(16)
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        inner.setblocking(False)
        try:
            inner.bind(str(path))
            path.unlink()  # the name stays with the socket, and nobody can reach or squat it
            for pause in (0.0, 0.001, 0.005, 0.02, 0.1, 0.5):
                await asyncio.sleep(pause)
                with contextlib.suppress(BlockingIOError):  # EAGAIN: its backlog is full
                    inner.connect(f"/proc/self/fd/{self._inner}")
                    break
            else:
                raise InternalError("the server is overloaded")
        except OSError:
            inner.close()
            raise
        name = f"unix:{path}"
        leg = Leg()
        REGISTRY[name] = peer
        try:
            await loop.create_unix_connection(lambda: leg, sock=inner)
        except OSError:
            del REGISTRY[name]
            inner.close()
            raise
        return name, leg

    def _closed(self, name: str) -> None:
        # Before the inner socket closes, so that the name can never mean anybody else.
        peer = REGISTRY.pop(name, None)
        if peer is not None:
            peer.connection_closed()
        if self._connections.pop(name, None) is not None and isinstance(peer, UnixPeer):
            for counter, key in ((self._per_uid, peer.uid), (self._per_pid, peer.pid)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    def _expect_opening(self, outer: Leg) -> None:
        """Cut a connection that has not even opened HTTP/2 in time."""

        def check() -> None:
            if outer.received < _OPENING_BYTES:
                outer.close()

        asyncio.get_running_loop().call_later(self.limits.opening.total_seconds(), check)

    async def _watch(
        self, file: SocketFile, path: Path, mode: int, admit: Callable[..., Any]
    ) -> None:
        """Make the socket anew when its file was removed or replaced (SEC-37)."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL.total_seconds())
            if file.is_ours():
                continue
            event(_log, logging.WARNING, "socket_replaced", socket=path)
            try:
                listener = bind_unix_socket(path, mode)
            except SpiffeError as error:
                event(_log, logging.ERROR, "socket_not_restored", socket=path, exc_info=error)
                continue
            self._files.remove(file)
            file = SocketFile(path)
            self._files.append(file)
            self._start(self._accept(listener, admit))

    async def _check_itself(self, probe: "_SelfCheck") -> None:
        """See that grpcio still reports the inner name, or refuse to start (ADR 1)."""
        peer = TlsPeer(None, "self-check")
        path = self._private / "c"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen()

        async def admit(connection: socket.socket) -> None:
            await self._relay(connection, peer)

        accepting = asyncio.create_task(self._accept(listener, admit))
        try:
            found = await probe.call(path)
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            listener.close()
            self.disconnect(lambda one: one is peer)
        if found is not peer:
            await self.close(timedelta(0))
            raise InternalError(
                "this grpcio does not report the name of a connection: install the pinned one"
            )


class _SelfCheck:
    """A method with an unguessable name, called once at start over a real connection."""

    def __init__(self) -> None:
        self._service = f"selfcheck.{secrets.token_hex(16)}"
        self._seen: Peer | None = None

    def add_to(self, server: Any) -> None:
        async def check(_: bytes, context: Any) -> bytes:
            self._seen = peer_of(context)
            return b""

        handler = grpc.unary_unary_rpc_method_handler(check)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(self._service, {"Check": handler}),)
        )

    async def call(self, path: Path) -> Peer | None:
        """Call through the socket at *path* and return the peer that the server saw."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
            # The security header, in case this door demands it.
            await channel.unary_unary(f"/{self._service}/Check")(
                b"", timeout=5, metadata=(("workload.spiffe.io", "true"),)
            )
        return self._seen


def _options(
    limits: DoorLimits, max_message_bytes: int, max_age: timedelta | None
) -> list[tuple[str, int]]:
    options = [
        # The defaults cancel calls in a burst, and announce no limit on streams at all.
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", 4 * 1024 * 1024),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 16 * 1024),
        ("grpc.so_reuseport", 0),
    ]
    if max_age is not None:
        # grpcio adds its own jitter of 10 %; running streams may finish.
        options.append(("grpc.max_connection_age_ms", int(max_age.total_seconds() * 1000)))
    return options
