"""
What every call of ours passes: errors become status codes here, and calls are counted.

Only `ErrorInterceptor` calls `status_of`; servicers raise.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, Final

import grpc

from spiffe_core.crashpoints import crash_point
from spiffe_wire.frontdoor.limits import STALL
from spiffe_wire.frontdoor.peer import REGISTRY
from spiffe_wire.logs import event
from spiffe_wire.status import DETAILS_KEY, Outcome, status_of

_log = logging.getLogger(__name__)

OnCall = Callable[[str, str, float], None]
"""Told of each finished call: full method, code name, seconds."""

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """
    Maps exceptions to status codes for all four shapes of call, and reports each call.

    A client whose window stays shut for *stall* while an answer waits is cut (SEC-83).
    """

    def __init__(self, on_call: OnCall = lambda *_: None, *, stall: timedelta = STALL) -> None:
        self._on_call = on_call
        self._stall = stall

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler of a known method; an unknown one stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        return wrap_handler(
            handler,
            lambda inner: self._unary(method, inner),
            lambda inner: self._stream(method, inner),
        )

    def _unary(self, method: str, inner: Handler) -> Handler:
        reply = _crash_point_of(method)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            started = time.monotonic()
            outcome = _OK
            answer = None
            try:
                answer = await inner(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 everything becomes a status
                outcome = self._failed(method, error)
            else:
                crash_point(reply)
            self._on_call(method, outcome.code.name, time.monotonic() - started)
            if outcome is not _OK:
                await _abort(context, outcome)
            return answer

        return call

    def _stream(self, method: str, inner: Handler) -> Handler:
        reply = _crash_point_of(method)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            started = time.monotonic()
            outcome = _OK
            try:
                # Closed here, so that a stream that was cut is not left to the collector.
                async with contextlib.aclosing(inner(request, context)) as answers:
                    async for answer in answers:
                        crash_point(reply)
                        with self._stalled(method, context):
                            yield answer
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 everything becomes a status
                outcome = self._failed(method, error)
            self._on_call(method, outcome.code.name, time.monotonic() - started)
            if outcome is not _OK:
                await _abort(context, outcome)

        return call

    @contextlib.contextmanager
    def _stalled(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Cut the connection if the client takes the answer that is yielded not in time."""

        def cut() -> None:
            peer = REGISTRY.get(context.peer())
            if peer is not None:
                event(_log, logging.WARNING, "slow_reader", method=method)
                peer.cut()

        seconds = self._stall.total_seconds()
        timer = asyncio.get_running_loop().call_later(seconds, cut)
        try:
            yield
        finally:
            timer.cancel()

    def _failed(self, method: str, error: Exception) -> Outcome:
        outcome = status_of(error)
        if outcome.code is grpc.StatusCode.INTERNAL:
            event(_log, logging.ERROR, "call_failed", method=method, exc_info=error)
        return outcome


async def _abort(context: grpc.aio.ServicerContext, outcome: Outcome) -> None:
    # Never inside `except`: grpcio keeps what is raised here, with its context, in a cycle,
    # and so would keep every frame of the error and the pidfd that one of them holds.
    if outcome.details is not None:
        context.set_trailing_metadata(((DETAILS_KEY, outcome.details),))
    await context.abort(outcome.code, outcome.text)


_OK: Final = Outcome(grpc.StatusCode.OK, "")


def _crash_point_of(method: str) -> str:
    """The one before a reply is sent, ``reply.AttestAgent``; a stream passes it each time."""
    return "reply." + method.rpartition("/")[2]


def wrap_handler(
    handler: Any, unary: Callable[[Handler], Handler], stream: Callable[[Handler], Handler]
) -> Any:
    """Return *handler* with its function passed through *unary* or *stream*, by its answer."""
    for shape, factory in _SHAPES.items():
        inner = getattr(handler, shape)
        if inner is not None:
            if not shape.endswith("_stream"):
                wrapped = unary(inner)
            elif inspect.isasyncgenfunction(inner):
                wrapped = stream(inner)
            else:
                wrapped = stream(_as_generator(inner))
            return factory(
                wrapped,
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
    return handler


def _as_generator(inner: Handler) -> Handler:
    """Return *inner* as one that yields; grpcio lets a handler write to its context instead."""

    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        answers = inner(request, context)
        if inspect.isawaitable(answers):
            await answers
            return
        async with contextlib.aclosing(answers):
            async for answer in answers:
                yield answer

    return call


_SHAPES: Final[dict[str, Callable[..., grpc.RpcMethodHandler]]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}
