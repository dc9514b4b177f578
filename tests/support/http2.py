"""
HTTP/2 by hand: just enough to say wrong things to a server that a real client never says.

Frames are built as bytes and read as bytes (RFC 9113 4.1); header fields are sent as
literals without indexing (RFC 7541 6.2.2), so no table has to be kept.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 7, 8, 11
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
PATIENCE = 10.0


@dataclass(frozen=True)
class Frame:
    """One frame that the server sent."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        at = 4 if self.kind == GOAWAY else 0
        return int.from_bytes(self.payload[at : at + 4])

    @property
    def grpc_status(self) -> int | None:
        """The status in the trailers, sent as a literal on a fresh connection."""
        found = re.search(rb"grpc-status[\x01\x02]([0-9]{1,2})", self.payload)
        return None if self.kind != HEADERS or found is None else int(found[1])

    @property
    def settings(self) -> dict[int, int]:
        """The pairs in a SETTINGS frame."""
        pairs = (self.payload[at : at + 6] for at in range(0, len(self.payload), 6))
        return {int.from_bytes(one[:2]): int.from_bytes(one[2:]) for one in pairs}


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    return b"".join(
        (len(payload).to_bytes(3), bytes((kind, flags)), stream.to_bytes(4), payload)
    )


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, payload=b"".join(k.to_bytes(2) + v.to_bytes(4) for k, v in pairs))


OPENING = PREFACE + settings()


def field(name: bytes, value: bytes) -> bytes:
    """One header field, literal and never indexed."""
    return b"\x10" + _string(name) + _string(value)


def stored(name: bytes, value: bytes) -> bytes:
    """One header field that the server is to remember; `LAST_STORED` then means it."""
    return b"\x40" + _string(name) + _string(value)


LAST_STORED = b"\xbe"


def block(path: str, extra: Iterable[tuple[str, str]] = ()) -> bytes:
    """The header block of a gRPC request."""
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
        ("content-type", "application/grpc"), ("te", "trailers"), *extra,
    ]  # fmt: skip
    return b"".join(field(name.encode(), value.encode()) for name, value in fields)


def headers(
    stream: int,
    path: str,
    extra: Iterable[tuple[str, str]] = (),
    *,
    flags: int = END_HEADERS,
    more: bytes = b"",
) -> bytes:
    """The HEADERS of a request, whose stream stays open; *more* ends the block."""
    return frame(HEADERS, flags, stream, block(path, extra) + more)


def request(
    stream: int, path: str, message: bytes = b"", extra: Iterable[tuple[str, str]] = ()
) -> bytes:
    """A whole unary request: HEADERS, then DATA that ends the stream."""
    body = b"\x00" + len(message).to_bytes(4) + message
    return headers(stream, path, extra) + frame(DATA, END_STREAM, stream, body)


class Raw:
    """A connection to a server, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.polite = True
        """Whether settings and pings of the server are answered."""

    async def send(self, *parts: bytes) -> None:
        """Send, waiting for room."""
        for part in parts:
            if self._writer.transport.is_closing():
                raise ConnectionResetError("the server has closed")
            self._writer.write(part)
            await self._writer.drain()

    async def next(self) -> Frame | None:
        """The next frame; None once the server has closed."""
        try:
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3]))
            found = Frame(head[3], head[4], int.from_bytes(head[5:]), payload)
            if self.polite and found.kind in (SETTINGS, PING) and not found.flags & ACK:
                # Without these grpcio takes no more than 128 streams, even one by one.
                await self.send(
                    frame(found.kind, ACK, 0, payload if found.kind == PING else b"")
                )
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            return None
        return found

    async def until(self, kind: int, stream: int | None = None) -> Frame | None:
        """The next frame of *kind*; None if the server closes first."""
        async with asyncio.timeout(PATIENCE):
            while (found := await self.next()) is not None:
                if found.kind == kind and stream in (None, found.stream):
                    return found
        return None

    async def everything(self) -> list[Frame]:
        """Every frame until the server closes."""
        found = []
        async with asyncio.timeout(PATIENCE):
            while (one := await self.next()) is not None:
                found.append(one)
        return found

    async def half_close(self) -> None:
        """Send EOF and keep reading."""
        self._writer.write_eof()

    @property
    def raw_socket(self) -> "asyncio.trsock.TransportSocket":
        """The socket below."""
        return self._writer.get_extra_info("socket")

    def stop_reading(self) -> None:
        """Take nothing more from the kernel."""
        self._writer.transport.pause_reading()

    async def close(self) -> None:
        """Cut."""
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self._writer.wait_closed()


@asynccontextmanager
async def raw_unix(path: Path) -> AsyncIterator[Raw]:
    """Connect to a Unix socket."""
    made = Raw(*await asyncio.open_unix_connection(str(path)))
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def raw_tls(host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[Raw]:
    """Connect over TLS."""
    made = Raw(*await asyncio.open_connection(host, port, ssl=context, server_hostname="x"))
    try:
        yield made
    finally:
        await made.close()


def _string(data: bytes) -> bytes:
    """A string literal, not Huffman-coded (RFC 7541 5.2)."""
    return _integer(len(data), 7) + data


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    made = bytearray((most,))
    value -= most
    while value >= 128:
        made.append(value % 128 + 128)
        value //= 128
    made.append(value)
    return bytes(made)
