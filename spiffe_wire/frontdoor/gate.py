"""
The way to a door's servicers, which can be shut: nobody enters, and who is inside finishes.

Source: SEC-108, IOP-10.  grpcio's own stop would cancel calls that arrive while it waits for
the others, and tell their clients CANCELLED, which none of them tries again (seen with
grpcio 1.85: 8 of 10 clients).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc

from spiffe_wire.interceptors import wrap_handler

Handler = Callable[[Any, Any], Any]


class Gate(grpc.aio.ServerInterceptor):
    """Goes before every other interceptor."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_shut = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Let the call in, or have it tried elsewhere or later."""
        handler = await continuation(handler_call_details)
        return None if handler is None else wrap_handler(handler, self._unary, self._stream)

    async def shut(self, grace: timedelta) -> None:
        """Let nobody in any more, and return when the last one has left, or after *grace*."""
        self._is_shut = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace.total_seconds()):
                await self._is_empty.wait()

    def _unary(self, inner: Handler) -> Handler:
        async def call(request: Any, context: Any) -> Any:
            await self._enter(context)
            return await inner(request, context)

        return call

    def _stream(self, inner: Handler) -> Handler:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            await self._enter(context)
            async with contextlib.aclosing(inner(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return call

    async def _enter(self, context: Any) -> None:
        if self._is_shut:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "stopping; try again")
        self._inside += 1
        self._is_empty.clear()
        # Not when the servicer is done, but when the answer has been sent.
        context.add_done_callback(self._left)

    def _left(self, _: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._is_empty.set()
