"""A TLS server on one port for life: stopped and started again without losing the port."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Listener:
    """
    Serves *handler*; *context* None is plain HTTP.

    A second socket holds the port without listening: while this is stopped, connections are
    refused, and nobody else on the machine can take the port.
    """

    def __init__(self, handler: Handler, context: ssl.SSLContext | None, host: str) -> None:
        self._handler = handler
        self._context = context
        self.host = host
        self._holder = _bound(host, 0)
        self.port: int = self._holder.getsockname()[1]
        self._deaf: socket.socket | None = None
        self._runner: web.ServerRunner | None = None
        self._server: web.Server | None = None

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._runner is not None

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._server.connections) if self._server and self.is_up else 0

    async def start(self) -> None:
        """Listen."""
        if self._runner is not None:
            return
        self._hear_again()
        self._server = web.Server(
            self._handler,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=300,
            max_line_size=1 << 20,  # as Go's server: tokens and selectors may be long
            max_field_size=1 << 20,
        )
        self._runner = web.ServerRunner(self._server)
        await self._runner.setup()
        listening = _bound(self.host, self.port)
        site = web.SockSite(self._runner, listening, ssl_context=self._context, backlog=512)
        await site.start()

    async def stop(self) -> None:
        """Break all connections and refuse new ones."""
        self._hear_again()
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        for site in list(runner.sites):
            await site.stop()
        self.cut()
        await asyncio.sleep(0)
        await runner.shutdown()
        await runner.cleanup()

    async def deafen(self) -> None:
        """Break all connections; new ones come up, and nobody ever says a word on them."""
        await self.stop()
        self._deaf = _bound(self.host, self.port)
        self._deaf.listen(128)

    def _hear_again(self) -> None:
        if self._deaf is not None:
            self._deaf.close()
            self._deaf = None

    def cut(self) -> None:
        """Break all connections; new ones are welcome."""
        if self._server is not None:
            for connection in list(self._server.connections):
                if connection.transport is not None:
                    connection.transport.abort()

    def close(self) -> None:
        """Give the port back."""
        self._holder.close()


def _bound(host: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    made.setblocking(False)
    return made
