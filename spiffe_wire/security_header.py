"""
The Workload API's security header (WEP-07, WEP-08, WEP-09, SEC-38, T-03).

A browser or a proxy that was tricked into calling the socket cannot send it.  It is checked
for every method on the socket, known or not, before anything else.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Final

import grpc

KEY: Final = "workload.spiffe.io"
VALUE: Final = "true"
METADATA: Final = ((KEY, VALUE),)
_REFUSAL: Final = f"security header missing: send metadata {KEY}: {VALUE}"


def has_header(metadata: Any) -> bool:
    """True when the header is there exactly once, with exactly its value."""
    return [value for key, value in metadata or () if key == KEY] == [VALUE]


def is_silent(metadata: Any) -> bool:
    """True when the header is not there at all."""
    return all(key != KEY for key, _ in metadata or ())


class SecurityHeaderInterceptor(grpc.aio.ServerInterceptor):
    """
    Refuses every call without the header with INVALID_ARGUMENT; put it first.

    The methods *waived* (full names, such as ``/package.Service/Method``) may leave it out;
    sent twice or with another value it is refused there, too (SEC-38).
    """

    def __init__(self, waived: Collection[str] = ()) -> None:
        self._waived = frozenset(waived)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Let the call through, or answer it here."""
        metadata = handler_call_details.invocation_metadata
        if has_header(metadata):
            return await continuation(handler_call_details)
        if handler_call_details.method in self._waived and is_silent(metadata):
            return await continuation(handler_call_details)
        return _REFUSE


async def _refuse(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _REFUSAL)
    yield  # a stream of nothing, to those who wrap it


# Stream in, stream out fits every shape of call: grpcio reads no request before we answer.
_REFUSE = grpc.stream_stream_rpc_method_handler(_refuse)
