"""
A call of a server to itself: does this grpcio still say which connection a call came by?

Source: transport (decision), ADR 1.  The whole door rests on that one name.
"""

import secrets
from pathlib import Path
from typing import Any

import grpc

from spiffe_core.errors import InternalError
from spiffe_wire.frontdoor.peer import Peer, peer_of
from spiffe_wire.security_header import METADATA

_TIMEOUT_SECONDS = 5.0


class SelfCheck:
    """A method with an unguessable name, called once at start over a real connection."""

    def __init__(self) -> None:
        self._service = f"selfcheck.{secrets.token_hex(16)}"
        self._seen: Peer | None = None

    def add_to(self, server: Any) -> None:
        """Register the method."""

        async def check(_: bytes, context: Any) -> bytes:
            self._seen = peer_of(context)
            return b""

        handler = grpc.unary_unary_rpc_method_handler(check)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(self._service, {"Check": handler}),)
        )

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
                await channel.unary_unary(f"/{self._service}/Check")(
                    b"", timeout=_TIMEOUT_SECONDS, metadata=METADATA
                )
            except grpc.aio.AioRpcError as error:
                problem = error
        if self._seen is not expected:
            raise InternalError(
                "this grpcio does not report the name of a connection: install the pinned one"
            ) from problem
