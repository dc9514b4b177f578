"""``issuer healthcheck``; light, because supervisors run it every few seconds."""

import argparse
from typing import Any

from issuer.cli.calls import call
from spiffe_wire.commandline import DONE, REFUSED, say, show
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc


def healthcheck(arguments: argparse.Namespace) -> int:
    """Ask the server whether it is healthy; SPIRE's words."""
    healthy = call(arguments.socket, serving)
    show({"healthy": healthy}, arguments.output, "Server is healthy." if healthy else "")
    if not healthy:
        say("Server is not healthy: its /ready page says why")
    return DONE if healthy else REFUSED


async def serving(channel: Any) -> bool:
    """Return what the health service behind *channel* says."""
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING"))
