"""``issuer agent`` and ``issuer token``."""

import argparse
from typing import Any

from issuer.cli.calls import call
from issuer.cli.entry import selector_match
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.commandline import (
    DONE,
    explained,
    message,
    relative,
    show,
    spiffe_id,
    table,
)
from spiffe_wire.convert.entry import id_to_wire
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2, agent_pb2_grpc

PAGE = 1000
_TITLES = ("SPIFFE ID", "TYPE", "SVID EXPIRES", "STATE", "VERSION")


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
    show(message(answer), arguments.output, f"Token: {answer.value}")
    return DONE


def show_all(arguments: argparse.Namespace) -> int:
    """List agents."""
    wanted = agent_pb2.ListAgentsRequest.Filter()
    _fill(wanted, arguments)

    async def ask(channel: Any) -> list[Any]:
        found: list[Any] = []
        page = ""
        while True:
            request = agent_pb2.ListAgentsRequest(
                filter=wanted, page_size=PAGE, page_token=page
            )
            answer = await agent_pb2_grpc.AgentStub(channel).ListAgents(request)
            found += answer.agents
            page = answer.next_page_token
            if not page:
                return found

    found = call(arguments.socket, ask)
    if arguments.quiet:
        show(None, "text", "\n".join(spiffe_id(one.id) for one in found))
    elif arguments.output != "text":
        show({"agents": [message(one) for one in found]}, arguments.output)
    elif not found:
        show(None, "text", "no agent found: `issuer token generate` makes a token for one")
    else:
        table(_TITLES, [_row(one) for one in found])
    return DONE


def count(arguments: argparse.Namespace) -> int:
    """Count agents."""
    request = agent_pb2.CountAgentsRequest()
    _fill(request.filter, arguments)

    async def ask(channel: Any) -> Any:
        return await agent_pb2_grpc.AgentStub(channel).CountAgents(request)

    answer = call(arguments.socket, ask)
    show(message(answer), arguments.output, f"{answer.count} agents")
    return DONE


def show_one(arguments: argparse.Namespace) -> int:
    """Show one agent."""
    answer = _one(arguments, "GetAgent", agent_pb2.GetAgentRequest)
    if arguments.output != "text":
        show(message(answer), arguments.output)
    else:
        table(_TITLES, [_row(answer)])
    return DONE


def ban(arguments: argparse.Namespace) -> int:
    """Ban an agent."""
    _one(arguments, "BanAgent", agent_pb2.BanAgentRequest)
    one = arguments.spiffe_id
    show({"banned": one}, arguments.output, f"banned {one}; `issuer agent evict` lifts it")
    return DONE


def evict(arguments: argparse.Namespace) -> int:
    """Evict an agent."""
    _one(arguments, "DeleteAgent", agent_pb2.DeleteAgentRequest)
    one = arguments.spiffe_id
    show(
        {"evicted": one}, arguments.output,
        f"evicted {one}; to come back it needs a new token: `issuer token generate`",
    )  # fmt: skip
    return DONE


def _fill(wanted: Any, arguments: argparse.Namespace) -> None:
    wanted.by_attestation_type = arguments.type
    if arguments.banned:
        wanted.by_banned.value = arguments.banned == "true"
    if arguments.selector:
        selector_match(wanted.by_selector_match, arguments)


def _one(arguments: argparse.Namespace, method: str, request: Any) -> Any:
    with explained("--spiffe-id"):
        wanted = id_to_wire(SpiffeId.parse(arguments.spiffe_id))

    async def ask(channel: Any) -> Any:
        return await getattr(agent_pb2_grpc.AgentStub(channel), method)(request(id=wanted))

    return call(arguments.socket, ask, if_missing=": `issuer agent list` shows who is there")


def _row(one: Any) -> tuple[str, ...]:
    state = "banned" if one.banned else "attested"
    return (
        spiffe_id(one.id), one.attestation_type, relative(one.x509svid_expires_at), state,
        one.agent_version,
    )  # fmt: skip
