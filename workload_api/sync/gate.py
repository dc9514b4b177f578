"""Holds calls back while our own certificate is exchanged for another (SPIRE API 9 (8))."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CallGate:
    """
    Lets calls through side by side, and one exchange alone; for one event loop.

    A server that has attested a node again forgets its old serial before we know of the new
    one.  A call that comes in between is refused, and looks like a thief's (SEC-54).
    """

    def __init__(self) -> None:
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self._calls = 0
        self._exchange = asyncio.Lock()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """A call is under way while entered; waits while an exchange is."""
        while not self._open.is_set():
            await self._open.wait()
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """No call is under way while entered: those that were have ended, new ones wait."""
        async with self._exchange:
            self._open.clear()
            try:
                await self._idle.wait()
                yield
            finally:
                self._open.set()
