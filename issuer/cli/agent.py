"""``issuer agent`` and ``issuer token``."""

import argparse
from typing import Any

from issuer.cli.calls import DONE, call, explained
from issuer.cli.output import message, relative, spiffe_id, table
from issuer.cli.output import show as print_value
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc

PAGE = 1000


def token(arguments: argparse.Namespace) -> int:
    """Make a join token."""
    request = agent_pb2.CreateJoinTokenRequest(ttl=arguments.ttl)
    if arguments.spiffe_id:
        with explained("--spiffe-id"):
            request.agent_id.CopyFrom(id_to_wire(SpiffeId.parse(arguments.spiffe_id)))

    async def ask(channel: Any) -> Any:
        return await agent_pb2_grpc.AgentStub(channel).CreateJoinToken(request)

    answer = call(arguments.socket, ask)
    # The one place where the secret is shown: to whoever asked for it.
    print_value(message(answer), arguments.output, f"Token: {answer.value}")
    return DONE


def show_all(arguments: argparse.Namespace) -> int:
    """List agents."""

    async def ask(channel: Any) -> list[Any]:
        found: list[Any] = []
        page = ""
        while True:
            request = agent_pb2.ListAgentsRequest(page_size=PAGE, page_token=page)
            answer = await agent_pb2_grpc.AgentStub(channel).ListAgents(request)
            found += answer.agents
            page = answer.next_page_token
            if not page:
                return found

    found = call(arguments.socket, ask)
    if arguments.output != "text":
        print_value({"agents": [message(one) for one in found]}, arguments.output)
    elif not found:
        print("no agent has attested yet: `issuer token generate` makes a token for one")
    else:
        table(
            ("SPIFFE ID", "TYPE", "SVID EXPIRES", "STATE", "VERSION"),
            [_row(one) for one in found],
        )
    return DONE


def count(arguments: argparse.Namespace) -> int:
    """Count agents."""

    async def ask(channel: Any) -> Any:
        request = agent_pb2.CountAgentsRequest()
        return await agent_pb2_grpc.AgentStub(channel).CountAgents(request)

    answer = call(arguments.socket, ask)
    print_value(message(answer), arguments.output, f"{answer.count} agents")
    return DONE


def show(arguments: argparse.Namespace) -> int:
    """Show one agent."""
    answer = _one(arguments, "GetAgent", agent_pb2.GetAgentRequest)
    if arguments.output != "text":
        print_value(message(answer), arguments.output)
    else:
        table(("SPIFFE ID", "TYPE", "SVID EXPIRES", "STATE", "VERSION"), [_row(answer)])
    return DONE


def ban(arguments: argparse.Namespace) -> int:
    """Ban an agent."""
    _one(arguments, "BanAgent", agent_pb2.BanAgentRequest)
    print_value(
        {"banned": arguments.spiffe_id}, arguments.output, f"banned {arguments.spiffe_id}"
    )
    return DONE


def evict(arguments: argparse.Namespace) -> int:
    """Evict an agent."""
    _one(arguments, "DeleteAgent", agent_pb2.DeleteAgentRequest)
    print_value(
        {"evicted": arguments.spiffe_id}, arguments.output, f"evicted {arguments.spiffe_id}"
    )
    return DONE


def _one(arguments: argparse.Namespace, method: str, request: Any) -> Any:
    with explained("--spiffe-id"):
        wanted = id_to_wire(SpiffeId.parse(arguments.spiffe_id))

    async def ask(channel: Any) -> Any:
        return await getattr(agent_pb2_grpc.AgentStub(channel), method)(request(id=wanted))

    return call(arguments.socket, ask)


def _row(one: Any) -> tuple[str, ...]:
    state = "banned" if one.banned else "attested"
    return (
        spiffe_id(one.id), one.attestation_type, relative(one.x509svid_expires_at), state,
        one.agent_version,
    )  # fmt: skip
