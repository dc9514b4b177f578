"""
Services of SPIRE that this release does not offer yet: each method says so, with a reason.

They are served, and so pass the table of who may call what, because a client that is told
UNIMPLEMENTED by name knows more than one whose method "is not found".
"""

from typing import Any, Final

from spiffe_core.errors import UnsupportedError
from spiffe_wire.pb.spire.api.server.localauthority.v1 import localauthority_pb2_grpc
from spiffe_wire.pb.spire.api.server.trustdomain.v1 import trustdomain_pb2_grpc

_LATER: Final = (
    (
        trustdomain_pb2_grpc.TrustDomainServicer,
        "federation relationships are not kept by this release: exchange bundles by hand with "
        "`issuer bundle set`",
    ),
    (
        localauthority_pb2_grpc.LocalAuthorityServicer,
        "authorities rotate by themselves; this release offers no hand on them",
    ),
)


def servicers() -> list[Any]:
    """Return one servicer for each such service."""
    return [_refusing(base, reason)() for base, reason in _LATER]


def _refusing(base: type[Any], reason: str) -> type[Any]:
    async def refuse(_: Any, request: Any, context: Any) -> Any:
        raise UnsupportedError(reason)

    methods = [name for name in vars(base) if not name.startswith("_")]
    return type(base.__name__, (base,), dict.fromkeys(methods, refuse))
