"""
gRPC reflection on the workload socket, over our private descriptor pool (WEP-25).

The library is loaded when somebody asks: few agents are ever asked, and each would hold half
a megabyte for it.
"""

from typing import Any, Final

import grpc

from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb._pool import POOL
from spiffe_wire.pb.spiffe_issuer.v1 import whoami_pb2_grpc

SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
_METHOD: Final = f"/{SERVICE}/ServerReflectionInfo"


def register(server: Any) -> None:
    """Add server reflection; the security header is demanded here as everywhere."""
    server.add_generic_rpc_handlers((_OnDemand(),))


class _OnDemand(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self._handler: Any = None

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != _METHOD:
            return None
        if self._handler is None:
            self._handler = _load()
        return self._handler


def _load() -> Any:
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    names = (
        workloadapi_pb2_grpc.SPIFFEWORKLOADAPI_SERVICE,
        whoami_pb2_grpc.WHOAMI_SERVICE,
        SERVICE,
    )
    return grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool=POOL).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
