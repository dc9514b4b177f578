"""
Two connections, one byte stream: what one leg receives the other sends.

Source: transport, rules for the splice.  Flow control is passed on, and both legs close
together: gRPC never half-closes, and half-open legs leak connections.
"""

import asyncio
from collections.abc import Callable
from typing import cast


class Leg(asyncio.Protocol):
    """One side of a splice; `join` makes two of them a pair."""

    def __init__(self, on_closed: Callable[[], None] = lambda: None) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self._other: Leg | None = None
        # uvloop ignores pause_reading() inside connection_made(): early bytes wait here.
        self._early: list[bytes] = []
        self._lost = False
        self.on_closed = on_closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; bytes wait until the legs are joined."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Pass on, or queue until there is somebody to pass on to."""
        self.received += len(data)
        if self._other is None or self._other.transport is None:
            self._early.append(data)
        else:
            self._other.transport.write(data)

    def eof_received(self) -> bool:
        """Close at once: neither side of a gRPC connection half-closes."""
        return False

    def pause_writing(self) -> None:
        """The peer of this leg reads slowly: stop reading at the other."""
        if self._other is not None and self._other.transport is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        transport = None if self._other is None else self._other.transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other leg too; what it still has to send is sent."""
        self._lost = True
        self.on_closed()
        if self._other is not None and self._other.transport is not None:
            self._other.transport.close()

    def close(self) -> None:
        """Cut this leg, and with it the other."""
        if self.transport is not None:
            self.transport.abort()


def join(one: Leg, two: Leg) -> None:
    """Make *one* and *two* a pair and pass on what came early."""
    one._other, two._other = two, one
    for leg, other in ((one, two), (two, one)):
        if leg._lost:
            other.close()
        elif other.transport is not None:
            for data in leg._early:
                other.transport.write(data)
            leg._early.clear()
