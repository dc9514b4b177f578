"""
A small HTTP server for health and metrics, on loopback unless told otherwise (SEC-92).

It answers GET and HEAD on a handful of fixed paths and reads nothing but the request's first
line.  It runs in the event loop, so that a loop which is stuck does not pass for alive, and
without the standard library's server, which would cost every agent a megabyte.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Final, Self

from spiffe_core.errors import InternalError
from spiffe_wire.logs import event

_log = logging.getLogger(__name__)
MAX_REQUEST_BYTES: Final = 8 * 1024
MAX_CONNECTIONS: Final = 32
PATIENCE: Final = 10.0
"""Seconds in which a client has to say what it wants, and then to take it."""

Route = Callable[[], tuple[int, str, bytes]]
"""Returns status, content type and body; called in the event loop."""

_Answer = tuple[int, str, bytes]
_PHRASES: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class StatusServer:
    """Serves *routes* on *host*:*port* while entered; *port* 0 picks one."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._address = (host, port)
        self._routes = routes
        self._clients: set[asyncio.Task[None]] = set()
        self.port = port

    async def __aenter__(self) -> Self:
        host, port = self._address
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=MAX_REQUEST_BYTES
            )
        except OSError as error:
            raise InternalError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 a server's callback runs in one
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CONNECTIONS:
                return
            async with asyncio.timeout(PATIENCE):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(request))
                await writer.drain()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
            pass  # it went away, said nothing, or too much: there is nobody to tell
        finally:
            self._clients.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            status, kind, body = _plain(400)
        elif method not in (b"GET", b"HEAD"):
            status, kind, body = _plain(405)
        else:
            status, kind, body = self._page(path.partition(b"?")[0].decode("latin-1"))
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Allow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else body)

    def _page(self, path: str) -> _Answer:
        route = self._routes.get(path)
        if route is None:
            return _plain(404)
        try:
            return route()
        except Exception as error:  # noqa: BLE001 a page that fails must not end the server
            event(_log, logging.ERROR, "status_page_failed", page=path, exc_info=error)
            return _plain(500)


def _plain(status: int) -> _Answer:
    return status, "text/plain", f"{_PHRASES[status].lower()}\n".encode()
