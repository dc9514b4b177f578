"""
A call of a server to itself: does this grpcio still say which connection a call came by?

Source: transport (decision), ADR 1.  The whole door rests on that one name.
"""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from spiffe_core.errors import InternalError
from spiffe_wire.frontdoor.peer import Peer, peer_of
from spiffe_wire.security_header import METADATA

_TIMEOUT_SECONDS = 5.0


class SelfCheck(grpc.aio.ServerInterceptor):
    """
    A method with an unguessable name, called once at start over a real connection.

    It answers in front of all interceptors but the gate: theirs may refuse who has no SVID.
    """

    def __init__(self) -> None:
        self._method = f"/selfcheck.{secrets.token_hex(16)}/Check"
        self._seen: Peer | None = None

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Answer our own call, and let the others pass."""
        if handler_call_details.method != self._method:
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _: bytes, context: Any) -> bytes:
        self._seen = peer_of(context)
        return b""

    async def call(self, path: Path, expected: Peer) -> None:
        """
        Call through the socket at *path*, which is relayed as *expected*.

        Raises:
            InternalError: the server did not see that peer.
        """
        problem: grpc.aio.AioRpcError | None = None
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
            try:
                # The security header, in case this door demands it.
                await channel.unary_unary(self._method)(
                    b"", timeout=_TIMEOUT_SECONDS, metadata=METADATA
                )
            except grpc.aio.AioRpcError as error:
                problem = error
        if self._seen is not expected:
            raise InternalError(
                "this grpcio does not report the name of a connection: install the pinned one"
            ) from problem
