"""
The first bytes of a client: HTTP/2 must begin, then ask for something, each in its time.

Source: table 1 (preface and settings 5 s, first request 10 s), SEC-80, SEC-82.  Only this
much of HTTP/2 is read here, and only until the first request: whoever speaks anything else,
or nothing, is cut before the server behind the door hears of it.
"""

import asyncio
from typing import Final

from spiffe_core.errors import MalformedError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER: Final = 9
_HEADERS, _SETTINGS = 1, 4
_ACK: Final = 1
_MAX_SETTINGS_BYTES: Final = 6 * 64  # there are seven settings; grease may come on top


class OpeningError(MalformedError):
    """A client's first bytes are not the beginning of HTTP/2."""


class Opening:
    """Reads a client's bytes up to its first request; *begun* is set at its SETTINGS."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requested = False
        self._preface = PREFACE
        self._header = b""
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes, which the caller passes on itself.

        Raises:
            OpeningError: this is not HTTP/2.
        """
        at = len(self._preface)
        if at:
            seen, data = data[:at], data[at:]
            if not self._preface.startswith(seen):
                raise OpeningError("the client does not speak HTTP/2")
            self._preface = self._preface[len(seen) :]
        while data and not self.requested:
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
                continue
            missing = _FRAME_HEADER - len(self._header)
            self._header += data[:missing]
            data = data[missing:]
            if len(self._header) == _FRAME_HEADER:
                self._frame(self._header)
                self._header = b""

    def _frame(self, header: bytes) -> None:
        size, kind, flags = int.from_bytes(header[:3]), header[3], header[4]
        stream = int.from_bytes(header[5:])
        self._skip = size
        if not self.begun.done():
            if kind != _SETTINGS or flags & _ACK or stream or size > _MAX_SETTINGS_BYTES:
                raise OpeningError("the client's first frame is not SETTINGS")
            self.begun.set_result(None)
        elif kind == _HEADERS:
            self.requested = True

    def abandon(self, error: Exception) -> None:
        """It will not begin any more; whoever waits for that is told why."""
        if not self.begun.done():
            self.begun.set_exception(error)
            self.begun.exception()  # seen: nobody may be waiting
