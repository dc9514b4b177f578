"""
How a client behaves, by the headers of its HTTP/2 frames: it must begin in time and not flood.

Source: SEC-82, table 1 (resets 200 per 10 s, idle pings 20, preface and settings 5 s, first
request 10 s).  grpcio answers resets, pings, settings and endless header blocks for ever, so
they are counted here, in front of it; the payloads stay its business.  What is counted is
looked at by the clock only when a limit is reached: within 10 s of the last time it is abuse.
"""

import asyncio
import time
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

    def __init__(self) -> None:
        # Not an exception: with its traceback it would keep the connection, and its pidfd.
        self.begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True at the client's SETTINGS, False when they cannot come any more."""
        self.requested = False
        """Whether the headers of a request were there as a whole."""
        self._ends_headers = False
        self._preface = PREFACE
        self._counts = dict.fromkeys(_MOST, 0)
        self._since = time.monotonic()
        self._block = self._continuations = 0
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
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            self._client_frame(data[at + 3], data[at + 4], size)
            at += _HEAD + size
        self._client_head = data[at:]
        self._client_skip = max(at - end, 0)
        self.requested = self.requested or (self._ends_headers and at <= end)

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

    def _client_frame(self, kind: int, flags: int, size: int) -> None:
        if kind == _DATA:
            if size or flags & _END_STREAM:
                self._counts[_PING] = 0
            else:
                self._count(_OTHER)
        elif kind == _HEADERS and self.begun.done():
            self._counts[_PING] = 0
            self._block, self._continuations = size, 0
            self._check_block(flags)
        elif kind == _CONTINUATION and self.begun.done():
            self._block += size
            self._continuations += 1
            self._check_block(flags)
        elif not self.begun.done():
            if kind != _SETTINGS or flags & _ACK or size > _MAX_SETTINGS_BYTES:
                raise ConductError("the client's first frame is not SETTINGS")
            self.begun.set_result(True)
        elif flags & _ACK and kind in (_PING, _SETTINGS):
            self._count(_REPLY)
        else:
            self._count(kind if kind in _MOST else _OTHER)

    def _check_block(self, flags: int) -> None:
        self._ends_headers = bool(flags & _END_HEADERS)
        if self._block > _MAX_BLOCK_BYTES or self._continuations > _MAX_CONTINUATIONS:
            raise ConductError("the client sends headers without end", self._farewell())

    def _count(self, kind: int) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= _MOST[kind]:
            return
        now = time.monotonic()
        if now - self._since < _WINDOW_SECONDS:
            raise ConductError(f"the client sends too many {_WHAT[kind]}", self._farewell())
        self._counts = dict.fromkeys(_MOST, 0)
        self._since = now

    def _farewell(self) -> bytes:
        """GOAWAY, unless it would land in the middle of a frame of the server's."""
        return b"" if self._server_head or self._server_skip else _GOAWAY
