"""
A small HTTP server for health and metrics, on loopback unless told otherwise (SEC-92).

It runs in a thread of its own on the standard library, so that an agent needs no HTTP
framework; it answers GET and HEAD on a handful of fixed paths and reads nothing else.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from spiffe_core.errors import InternalError

Route = Callable[[], tuple[int, str, bytes]]
"""Returns status, content type and body."""


class StatusServer:
    """Serves *routes* on *host*:*port* while entered; *port* 0 picks one."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._address = (host, port)
        self._routes = routes

    def __enter__(self) -> Self:
        routes = self._routes

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # a client that says nothing holds one thread this long

            def do_GET(self) -> None:
                route = routes.get(self.path.partition("?")[0])
                status, kind, body = (
                    route() if route else (404, "text/plain", b"no such page\n")
                )
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 the base class's name

            def log_message(self, *_: object) -> None:
                """Health is asked every second; nobody wants the lines."""

        try:
            self._server = ThreadingHTTPServer(self._address, Handler)
        except OSError as error:
            host, port = self._address
            raise InternalError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="status", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # It looks whether it shall end when somebody knocks, or twice a second.
        ending = threading.Thread(target=self._server.shutdown)
        ending.start()
        with contextlib.suppress(OSError):
            socket.create_connection((self._address[0], self.port), timeout=1).close()
        ending.join()
        self._server.server_close()
