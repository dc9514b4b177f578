"""
Two connections, one byte stream: what one leg receives the other sends.

Source: transport, rules for the splice; SEC-83.  Flow control is passed on, and both legs
close together: gRPC never half-closes, and half-open legs leak connections.
"""

import asyncio
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, cast

from spiffe_wire.frontdoor.conduct import ConductError

LINGER_SECONDS: Final = 5.0
"""How long a closed leg may take to send what it still holds."""
_EARLY_BYTES: Final = 64 * 1024


def _nothing(*_: object) -> None:
    pass


class Leg(asyncio.Protocol):
    """
    One side of a splice; `join` makes two of them a pair.

    *inspect* sees every byte first and may object; *objected* is told.  *stall* cuts a peer
        that reads nothing for
    that long while something waits for it.
    """

    def __init__(
        self,
        on_closed: Callable[[], None] = _nothing,
        *,
        inspect: Callable[[bytes], None] | None = None,
        objected: Callable[[ConductError], None] = _nothing,
        stall: timedelta | None = None,
        linger: float = LINGER_SECONDS,
    ) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_closed = on_closed
        self._inspect = inspect
        self._objected = objected
        self._stall = stall
        self._linger = linger
        self._stalled: asyncio.TimerHandle | None = None
        self._other: Leg | None = None
        # uvloop ignores pause_reading() inside connection_made(): early bytes wait here.
        self._early = bytearray()
        self._cut = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; bytes wait until the legs are joined."""
        self.transport = cast(asyncio.Transport, transport)
        if self._cut:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass on, or queue until there is somebody to pass on to."""
        if self._inspect is not None:
            try:
                self._inspect(data)
            except ConductError as error:
                self._objected(error)
                return
        if self._other is not None and self._other.transport is not None:
            if not self._other.transport.is_closing():
                self._other.transport.write(data)
            return
        self._early += data
        if len(self._early) > _EARLY_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """Close at once: neither side of a gRPC connection half-closes."""
        self.finish()
        return False

    def pause_writing(self) -> None:
        """The peer of this leg reads slowly: stop reading at the other."""
        if self._other is not None and self._other.transport is not None:
            self._other.transport.pause_reading()
        if self._stall is not None and self.transport is not None:
            waiting = self.transport.get_write_buffer_size()
            self._watch_progress(self._stall.total_seconds(), waiting)

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_watching()
        transport = None if self._other is None else self._other.transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other leg too; what it still has to send is sent."""
        self._stop_watching()
        self._on_closed()
        if self._other is not None:
            self._other.finish()
        # They hold the connection and its peer, and we must not.
        self._on_closed, self._objected, self._inspect = _nothing, _nothing, None
        if not self.closed.done():
            self.closed.set_result(None)

    @property
    def socket(self) -> Any:
        """The socket below."""
        return None if self.transport is None else self.transport.get_extra_info("socket")

    @property
    def ssl_object(self) -> Any:
        """The TLS connection, once its handshake is done."""
        return None if self.transport is None else self.transport.get_extra_info("ssl_object")

    @property
    def other(self) -> "Leg | None":
        """The leg that this one is joined to."""
        return self._other

    def pair(self) -> "list[Leg]":
        """This leg, and the one it is joined to."""
        return [self] if self._other is None else [self, self._other]

    @property
    def is_open(self) -> bool:
        """Whether it has begun and not ended."""
        return self.transport is not None and not self.transport.is_closing()

    def release(self) -> None:
        """Pass on what came before there was another leg."""
        if self.transport is not None and self._other is not None:
            self.transport.resume_reading()
            if self._early and self._other.transport is not None:
                self._other.transport.write(bytes(self._early))
                self._early.clear()

    def finish(self, farewell: bytes = b"") -> None:
        """Close when everything is sent, and soon in any case: a peer may never read it."""
        # asyncio's own TLS transport breaks when it is asked a second time.
        if self.transport is None or self.transport.is_closing():
            return
        if farewell:
            self.transport.write(farewell)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._linger, self.transport.abort)
            self.closed.add_done_callback(lambda _: timer.cancel())

    def close(self) -> None:
        """Cut this leg, and with it the other; one that is not connected yet, once it is."""
        self._cut = True
        if self.transport is not None:
            self.transport.abort()

    def _watch_progress(self, seconds: float, waiting: int) -> None:
        """Come back later, and cut the peer if it has taken none of *waiting* bytes."""

        def look() -> None:
            left = self.transport.get_write_buffer_size() if self.transport else 0
            if left >= waiting:
                self.close()
            else:
                self._watch_progress(seconds, left)

        self._stop_watching()
        self._stalled = asyncio.get_running_loop().call_later(seconds, look)

    def _stop_watching(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def join(one: Leg, two: Leg) -> None:
    """Make *one* and *two* a pair and pass on what came early; if one is gone, both are."""
    one._other, two._other = two, one
    if not (one.is_open and two.is_open):
        one.finish()
        two.finish()
        return
    one.release()
    two.release()


def notice_dead_peer(connection: socket.socket) -> None:
    """Let the kernel end a TCP *connection* whose other machine is gone, in about 30 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 15),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 30_000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
