"""gRPC reflection on the workload socket, over our private descriptor pool (WEP-25)."""

from typing import Any

from grpc_reflection.v1alpha import reflection

from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb._pool import POOL
from spiffe_wire.pb.spiffe_issuer.v1 import whoami_pb2_grpc


def register(server: Any) -> None:
    """Add server reflection; the security header is demanded here as everywhere."""
    names = (
        workloadapi_pb2_grpc.SPIFFEWORKLOADAPI_SERVICE,
        whoami_pb2_grpc.WHOAMI_SERVICE,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server, pool=POOL)
