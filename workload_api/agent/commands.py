"""What the commands of an agent's operator do."""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from spiffe_core.errors import PreconditionError
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import (
    DONE,
    REFUSED,
    USAGE,
    CommandError,
    completion_script,
    explained,
    message,
    relative,
    say,
    show,
)
from spiffe_wire.commandline import spiffe_id as id_text
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.grpc.health.v1 import health_pb2, health_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from workload_api.agent.asking import with_admin
from workload_api.agent.grammar import parser


def run(arguments: argparse.Namespace) -> int:
    """Serve workloads until told to stop."""
    import uvloop

    from spiffe_core import crashpoints
    from spiffe_wire import descriptors, logs
    from workload_api.agent.app import serve
    from workload_api.agent.config import NodeAttestor

    settings = _settings(arguments.config)
    logs.set_up(settings.log_style.value, settings.log_level)
    descriptors.raise_limit()
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""), lambda: os._exit(137))
    if arguments.join_token_file and settings.node_attestor is not NodeAttestor.JOIN_TOKEN:
        raise CommandError(
            f"--join-token-file: node_attestor in {arguments.config} is "
            f"{settings.node_attestor.value}, which needs none",
            USAGE,
        )
    token_file = arguments.join_token_file or settings.join_token_file
    token = ""
    if token_file:
        # A token that was used already may be gone; the identity on disk then serves.
        try:
            token = Path(token_file).read_text().strip()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise PreconditionError(
                    f"cannot read {token_file}: {error.strerror}"
                ) from error

    async def serve_until_told() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop.set)
        async with serve(settings, token) as agent:
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({stopping, agent.ended}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if agent.ended.done():
                agent.ended.result()

    uvloop.run(serve_until_told())
    return DONE


def healthcheck(arguments: argparse.Namespace) -> int:
    """Ask whether the agent serves."""

    async def ask(channel: Any) -> Any:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    healthy = with_admin(arguments, ask).status == 1
    show({"healthy": healthy}, arguments.output, "Agent is healthy." if healthy else "")
    if not healthy:
        say("Agent is not healthy: `issuer-agent status` says why")
    return DONE if healthy else REFUSED


def renew(arguments: argparse.Namespace) -> int:
    """Sign anew."""
    request = agentadmin_pb2.RenewSvidsRequest()
    if arguments.spiffe_id:
        with explained("--spiffe-id"):
            request.spiffe_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))

    async def ask(channel: Any) -> Any:
        return await agentadmin_pb2_grpc.AgentAdminStub(channel).RenewSvids(request)

    renewed = with_admin(arguments, ask).renewed
    show({"renewed": renewed}, arguments.output, f"{renewed} renewed")
    return DONE


def status(arguments: argparse.Namespace) -> int:
    """Say how the agent is."""

    async def ask(channel: Any) -> Any:
        stub = agentadmin_pb2_grpc.AgentAdminStub(channel)
        return await stub.GetStatus(agentadmin_pb2.GetStatusRequest())

    answer = with_admin(arguments, ask)
    facts = message(answer)
    lines = {
        **facts,
        "agent_id": id_text(answer.agent_id) if answer.HasField("agent_id") else "none yet",
        "last_sync_at": relative(answer.last_sync_at),
        "svid_expires_at": relative(answer.svid_expires_at),
        "problem": answer.problem or "none",
    }
    text = "\n".join(f"{name.replace('_', ' '):<16}{one}" for name, one in lines.items())
    show(facts, arguments.output, text)
    return DONE


def config(arguments: argparse.Namespace) -> int:
    """Print or validate settings."""
    from spiffe_wire.settings import example, json_schema
    from workload_api.agent.config import AgentSettings

    if arguments.what == "example":
        print(example(AgentSettings, {"trust_domain": "example.org"}), end="")
    elif arguments.what == "schema":
        print(json.dumps(json_schema(AgentSettings), indent=2))
    else:
        _settings(arguments.config)
        value = {"file": arguments.config, "valid": True}
        show(value, arguments.output, f"{arguments.config} is valid")
    return DONE


def completion(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    sys.stdout.write(completion_script(parser(), arguments.shell))
    return DONE


def _settings(path: str) -> Any:
    from spiffe_wire.settings import load
    from workload_api.agent.config import ROLE, AgentSettings

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CommandError(
            f"cannot read {path}: {why}; `issuer-agent config example` prints one to start from"
        ) from error
    return load(AgentSettings, text, os.environ, ROLE)
