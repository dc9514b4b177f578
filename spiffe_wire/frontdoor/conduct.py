"""
How a client behaves, by the headers of its HTTP/2 frames: it must begin in time and not flood.

Source: SEC-82, table 1 (resets 200 per 10 s, idle pings 20, preface and settings 5 s, first
request 10 s).  grpcio answers resets, pings, settings and endless header blocks for ever, and
does not measure what an indexed header field stands for: 16 KiB of references to one field
unpack to 64 MB.  So frames and fields are counted here, in front of it; what they mean stays
its business.  The clock is looked at only when a limit is reached: within 10 s of the last
time, that is abuse.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from spiffe_core.errors import MalformedError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD: Final = 9
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = (
    0, 1, 3, 4, 6, 8, 9,
)  # fmt: skip
_END_STREAM = _ACK = 0x1
_END_HEADERS: Final = 0x4
_MAX_SETTINGS_BYTES: Final = 6 * 64  # there are seven settings; grease may come on top
_MAX_BLOCK_BYTES: Final = 64 * 1024  # compressed; the list itself may hold 16 KiB
_MAX_CONTINUATIONS: Final = 32
_MAX_FIELDS: Final = 128  # of a request, each at most what a table holds: 4 KiB
_PADDED, _PRIORITY = 0x8, 0x20
_WINDOW_SECONDS: Final = 10.0
_OTHER: Final = 10
_REPLY: Final = 11
_WHAT: Final = {
    _RST_STREAM: "resets",
    _SETTINGS: "settings",
    _PING: "pings",
    _WINDOW_UPDATE: "window updates",
    _OTHER: "frames that carry nothing",
    _REPLY: "acknowledgements",
}
_MOST: Final = {
    _RST_STREAM: 200,  # in both directions: a client can also make the server reset
    _SETTINGS: 100,
    _PING: 20,  # with no request or answer between them
    _WINDOW_UPDATE: 2000,  # with no answer between them
    _OTHER: 200,
    _REPLY: 2000,
}
# Last stream 0, ENHANCE_YOUR_CALM (RFC 9113 7).
_GOAWAY: Final = bytes((0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11))


class ConductError(MalformedError):
    """A client does not speak HTTP/2, or floods; *farewell* is what to send it at the end."""

    def __init__(self, text: str, farewell: bytes = b"") -> None:
        super().__init__(text)
        self.farewell = farewell


class Conduct:
    """Follows one connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Not an exception: with its traceback it would keep the connection, and its pidfd.
        self.begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True at the client's SETTINGS, False when they cannot come any more."""
        self.requested = False
        """Whether the headers of a request were there as a whole."""
        self._preface = PREFACE
        self._counts = dict.fromkeys(_MOST, 0)
        self._since = clock()
        self._block = b""
        self._counted = b""  # most requests of a connection repeat the one before
        self._continuations = 0
        # For each direction: what was seen of a frame's header, or how much of its payload
        # is still to come.
        self._client_head = self._server_head = b""
        self._client_skip = self._server_skip = 0

    def from_client(self, data: bytes) -> None:
        """
        Look at bytes of the client, which the caller passes on itself.

        Raises:
            ConductError: they must not be passed on.
        """
        if self._preface:
            seen, data = data[: len(self._preface)], data[len(self._preface) :]
            if not self._preface.startswith(seen):
                raise ConductError("the client does not speak HTTP/2")
            self._preface = self._preface[len(seen) :]
        if self._client_head:
            data = self._client_head + data
        at, end = self._client_skip, len(data)
        while at + _HEAD <= end:
            kind, flags = data[at + 3], data[at + 4]
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if kind in (_HEADERS, _CONTINUATION) and self.begun.done():
                self._check_block(len(self._block) + size)
                if at + _HEAD + size > end:
                    break  # looked at again when it is there as a whole
                self._header_frame(kind, flags, data[at + _HEAD : at + _HEAD + size])
            else:
                self._other_frame(kind, flags, size)
            at += _HEAD + size
        self._client_head = data[at:]
        self._client_skip = max(at - end, 0)

    def from_server(self, data: bytes) -> None:
        """
        Look at bytes of the server.

        Raises:
            ConductError: the client has made it reset too many streams.
        """
        if self._server_head:
            data = self._server_head + data
        at, end = self._server_skip, len(data)
        while at + _HEAD <= end:
            kind = data[at + 3]
            if kind <= _HEADERS:
                self._counts[_PING] = self._counts[_WINDOW_UPDATE] = 0
            elif kind == _RST_STREAM and any(data[at + _HEAD : at + _HEAD + 4]):
                self._count(_RST_STREAM)
            at += _HEAD + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
        self._server_head = data[at:]
        self._server_skip = max(at - end, 0)

    def abandon(self) -> None:
        """It will not begin any more."""
        if not self.begun.done():
            self.begun.set_result(False)

    def _header_frame(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _HEADERS:
            self._counts[_PING] = 0
            self._continuations = 0
            at = (1 if flags & _PADDED else 0) + (5 if flags & _PRIORITY else 0)
            self._block = payload[at:]
        else:
            self._continuations += 1
            self._block += payload
        if flags & _END_HEADERS:
            if self._block != self._counted and _fields_of(self._block) > _MAX_FIELDS:
                raise ConductError("the client sends too many headers", self._farewell())
            self._counted, self._block = self._block, b""
            self.requested = True

    def _other_frame(self, kind: int, flags: int, size: int) -> None:
        if not self.begun.done():
            if kind != _SETTINGS or flags & _ACK or size > _MAX_SETTINGS_BYTES:
                raise ConductError("the client's first frame is not SETTINGS")
            self.begun.set_result(True)
        elif kind == _DATA:
            if size or flags & _END_STREAM:
                self._counts[_PING] = 0
            else:
                self._count(_OTHER)
        elif flags & _ACK and kind in (_PING, _SETTINGS):
            self._count(_REPLY)
        else:
            self._count(kind if kind in _MOST else _OTHER)

    def _check_block(self, size: int) -> None:
        if size > _MAX_BLOCK_BYTES or self._continuations > _MAX_CONTINUATIONS:
            raise ConductError("the client sends headers without end", self._farewell())

    def _count(self, kind: int) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= _MOST[kind]:
            return
        now = self._clock()
        if now - self._since < _WINDOW_SECONDS:
            raise ConductError(f"the client sends too many {_WHAT[kind]}", self._farewell())
        self._counts = dict.fromkeys(_MOST, 0)
        self._since = now

    def _farewell(self) -> bytes:
        """GOAWAY, unless it would land in the middle of a frame of the server's."""
        return b"" if self._server_head or self._server_skip else _GOAWAY


def _fields_of(block: bytes) -> int:
    """How many fields a header block holds (RFC 7541 6); what is cut off counts as one."""
    at, end, found = 0, len(block), 0
    while at < end and found <= _MAX_FIELDS:
        found += 1
        first = block[at]
        if first & 0x80:  # indexed
            _, at = _integer(block, at, 0x7F)
        elif first & 0xE0 == 0x20:  # a new size of the table
            _, at = _integer(block, at, 0x1F)
        else:  # literal: a name or the index of one, then a value
            index, at = _integer(block, at, 0x3F if first & 0x40 else 0x0F)
            for _ in range(1 if index else 2):
                length, at = _integer(block, at, 0x7F)
                at += length
    return found


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Read an integer (RFC 7541 5.1) and return it with the place behind it."""
    if at >= len(block):
        return 0, at
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in range(0, 35, 7):
        if at >= len(block):
            break
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, at
