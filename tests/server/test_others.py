"""Explanations, services of a later release, and what ends the process."""

import asyncio
from typing import Any

import pytest

from issuer.app import serve
from issuer.store.engine import StoreBrokenError
from spiffe_core.errors import InternalError
from spiffe_wire.pb.grpc.health.v1 import health_pb2
from spiffe_wire.pb.spiffe_issuer.v1 import explain_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.localauthority.v1 import (
    localauthority_pb2,
    localauthority_pb2_grpc,
)
from spiffe_wire.pb.spire.api.server.trustdomain.v1 import (
    trustdomain_pb2,
    trustdomain_pb2_grpc,
)
from tests.support.callers import (
    Calls,
    Code,
    Running,
    a_running_server,
    an_id,
    below,
    dialing,
    eventually,
    id_message,
    refused,
)
from tests.support.stack import a_folder, channel_to, server_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def explain(running: Running, *selectors: str, **fields: Any) -> Any:
    """What ExplainSelectors says."""
    request = explain_pb2.ExplainSelectorsRequest(**fields)
    for text in selectors:
        type_, _, value = text.partition(":")
        request.selectors.add(type=type_, value=value)
    return await running.local.explain.ExplainSelectors(request)


async def test_selectors_are_explained(running: Running) -> None:
    """What would match, what nearly did and why; for one agent, or over every entry."""
    node, other = await running.node(), await running.node()
    mine, theirs = await running.add(
        below(node, "/mine", "unix:uid:1", "unix:gid:2"), below(other, "/theirs", "unix:uid:1")
    )
    found = await explain(running, "unix:uid:1", "unix:gid:2")
    assert {one.id for one in found.matched} == {mine.id, theirs.id}
    found = await explain(
        running, "unix:uid:1", "unix:gid:3", agent_id=id_message(node.id.path)
    )
    assert (list(found.matched), found.considered, found.reason) == ([], 1, "no_match")
    (miss,) = found.near_misses
    assert miss.entry.id == mine.id
    assert "unix:gid:2" in miss.difference
    assert "unix:gid:3" in miss.difference
    async with refused(Code.INVALID_ARGUMENT, "at least one selector"):
        await explain(running)
    async with refused(Code.INVALID_ARGUMENT):
        await explain(running, "unix:")


async def test_node_aliases_are_nobodys_identity(running: Running) -> None:
    """An alias names a group of nodes: no process gets it, and no explanation says so."""
    (alias,) = await running.add(below(an_id("/spire/server"), "/fleet", "k8s:cluster:c"))
    found = await explain(running, "k8s:cluster:c")
    assert alias.id not in {one.id for one in found.matched}


async def test_services_of_later_say_why(running: Running) -> None:
    """Each method of services that are not built yet says UNIMPLEMENTED, and what to do."""
    channel = running.local.channel
    for stub, messages, service, text in (
        (trustdomain_pb2_grpc.TrustDomainStub, trustdomain_pb2, "TrustDomain", "bundle set"),
        (localauthority_pb2_grpc.LocalAuthorityStub, localauthority_pb2, "LocalAuthority",
         "rotate by themselves"),
    ):  # fmt: skip
        for method in messages.DESCRIPTOR.services_by_name[service].methods:
            request = getattr(messages, method.input_type.name)()
            async with refused(Code.UNIMPLEMENTED, text):
                await getattr(stub(channel), method.name)(request)


async def test_sec_101_a_server_that_no_longer_hears_changes_ends() -> None:
    """SEC-101, SEC-114: without the feed bans would not be heard of: unready, then gone."""
    ended: list[int] = []
    with a_folder() as folder:
        async with serve(server_settings(folder), die=ended.append) as server:
            async with channel_to(server.settings.admin_socket_path) as channel:
                local = Calls(channel)
                answer = await local.health.Check(health_pb2.HealthCheckRequest())
                assert answer.status == 1
                # As a failed fsync leaves the store.
                server.store._broken = StoreBrokenError("the database failed")
                server.store._wake()
                async with asyncio.timeout(10):
                    while not ended:
                        await asyncio.sleep(0.005)
                assert ended == [1]
                assert not server.is_ready()
                answer = await local.health.Check(health_pb2.HealthCheckRequest())
                assert answer.status == 2
                async with refused(Code.INTERNAL):
                    await local.agent.CreateJoinToken(agent_pb2.CreateJoinTokenRequest(ttl=60))


async def test_a_start_that_fails_leaves_nothing() -> None:
    """A server whose port is taken does not start, and lets go of all it had opened."""
    async with a_running_server() as running:
        with a_folder() as folder:
            before = asyncio.all_tasks()
            with pytest.raises(InternalError, match="cannot listen"):
                async with serve(server_settings(folder, bind_port=running.server.port)):
                    pass
            await eventually(lambda: asyncio.all_tasks() <= before)
            # The folders are free again, and nothing in them is in the way.
            async with serve(server_settings(folder)) as server:
                assert server.is_ready()
                async with dialing(server) as stranger:
                    async with refused(Code.PERMISSION_DENIED):
                        await stranger.calls.agent.CountAgents(agent_pb2.CountAgentsRequest())
