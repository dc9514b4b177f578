"""``Agent``: list, get, ban, evict, status (SPIRE API 5.2)."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from issuer.store.store import Repositories
from spiffe_core.agent import AttestedAgent
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.types import agent_pb2 as types_pb2
from spiffe_wire.pb.spire.api.types import selector_pb2
from tests.support.callers import (
    Code,
    Running,
    a_running_server,
    an_id,
    below,
    id_message,
    mask,
    refused,
)
from tests.support.store import some

pytestmark = pytest.mark.asyncio(loop_scope="module")
Filter = agent_pb2.ListAgentsRequest.Filter
CountFilter = agent_pb2.CountAgentsRequest.Filter
Mask = types_pb2.AgentMask
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
BANNED = "/spire/agent/join_token/banned"


def some_agents() -> list[AttestedAgent]:
    """Agents of all sorts, as attestors that are not built yet would leave them."""
    return [
        AttestedAgent(
            an_id(f"/spire/agent/{kind}/n{number}"),
            kind,
            str(1000 + number),
            NOW + timedelta(hours=number),
            some(*selectors),
            can_reattest=number % 2 == 0,
        )
        for number, (kind, selectors) in enumerate(
            [
                ("x509pop", ["x509pop:a", "x509pop:b"]),
                ("x509pop", ["x509pop:a"]),
                ("join_token", []),
                ("k8s_psat", ["k8s_psat:cluster:c"]),
                ("k8s_psat", ["k8s_psat:cluster:c", "x509pop:b"]),
            ]
        )
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def listed() -> AsyncIterator[Running]:
    """A server with `some_agents`, and one that is banned."""
    async with a_running_server() as running:

        def work(repos: Repositories) -> None:
            for agent in some_agents():
                repos.agents.attested(agent)
            banned = AttestedAgent(an_id(BANNED), "join_token", "7", NOW)
            repos.agents.attested(banned)
            repos.agents.ban(banned.id)

        await running.server.store.write(work)
        await running.settled()
        yield running


async def names(running: Running, wanted: Any = None) -> list[str]:
    """The last path segment of each agent that a filter leaves, counted as well."""
    answer = await running.local.agent.ListAgents(agent_pb2.ListAgentsRequest(filter=wanted))
    same = None if wanted is None else CountFilter.FromString(wanted.SerializeToString())
    count = await running.local.agent.CountAgents(agent_pb2.CountAgentsRequest(filter=same))
    assert count.count == len(answer.agents)
    return [one.id.path.rpartition("/")[2] for one in answer.agents]


async def test_an_agent_is_shown_whole(listed: Running) -> None:
    """Every field of an agent is answered; a banned one has no serial."""
    answer = await listed.local.agent.GetAgent(
        agent_pb2.GetAgentRequest(id=id_message("/spire/agent/x509pop/n0"))
    )
    assert answer == types_pb2.Agent(
        id=id_message("/spire/agent/x509pop/n0"),
        attestation_type="x509pop",
        x509svid_serial_number="1000",
        x509svid_expires_at=int(NOW.timestamp()),
        selectors=[
            selector_pb2.Selector(type="x509pop", value="a"),
            selector_pb2.Selector(type="x509pop", value="b"),
        ],
        can_reattest=True,
    )
    answer = await listed.local.agent.GetAgent(agent_pb2.GetAgentRequest(id=id_message(BANNED)))
    assert (answer.banned, answer.x509svid_serial_number) == (True, "")


async def test_masks(listed: Running) -> None:
    """A mask yields its fields and the id; an empty one the id alone."""
    request = agent_pb2.GetAgentRequest(id=id_message("/spire/agent/x509pop/n0"))
    whole = await listed.local.agent.GetAgent(request)
    for field in Mask.DESCRIPTOR.fields:
        request.output_mask.CopyFrom(mask(Mask, field.name))
        found = await listed.local.agent.GetAgent(request)
        assert {one.name for one, _ in found.ListFields()} <= {"id", field.name}
        assert getattr(found, field.name) == getattr(whole, field.name)
    request.output_mask.CopyFrom(Mask())
    assert await listed.local.agent.GetAgent(request) == types_pb2.Agent(id=whole.id)
    # What `agent purge` asks for (SPIRE API 11).
    wanted = Filter()
    wanted.by_can_reattest.value = True
    answer = await listed.local.agent.ListAgents(
        agent_pb2.ListAgentsRequest(
            filter=wanted, output_mask=mask(Mask, "x509svid_expires_at")
        )
    )
    assert [
        (one.id.path[-2:], one.x509svid_expires_at, one.attestation_type)
        for one in answer.agents
    ] == [(f"n{n}", int((NOW + timedelta(hours=n)).timestamp()), "") for n in (0, 2, 4)]


def flag(name: str, value: bool) -> Any:
    """A filter by one flag."""
    made = Filter()
    getattr(made, name).value = value
    return made


def by_selectors(match: int, *values: str) -> Any:
    """A filter by selectors of type x509pop."""
    made = Filter()
    made.by_selector_match.match = match
    for value in values:
        made.by_selector_match.selectors.add(type="x509pop", value=value)
    return made


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Filter(), "n0 n1 n2 n3 n4 banned"),
        (Filter(by_attestation_type="x509pop"), "n0 n1"),
        (Filter(by_attestation_type="x509"), ""),
        (flag("by_banned", True), "banned"),
        (flag("by_banned", False), "n0 n1 n2 n3 n4"),
        (flag("by_can_reattest", True), "n0 n2 n4"),
        (flag("by_can_reattest", False), "n1 n3 banned"),
        (by_selectors(0, "a", "b"), "n0"),
        (by_selectors(1, "a", "b", "c"), "n0 n1"),
        (by_selectors(2, "b"), "n0 n4"),
        (by_selectors(3, "a", "z"), "n0 n1"),
        (Filter(by_expires_before="2026-06-01 14:00:00 +0000 +00"), "n0 n1 banned"),
        (Filter(by_expires_before="2026-06-01 14:00:01 +0000 +00"), "n0 n1 n2 banned"),
        (Filter(by_expires_before="2026-06-01 16:30:00 +0230 +02"), "n0 n1 banned"),
        # 12:00 UTC: what expires at that instant does not expire before it.
        (Filter(by_expires_before="2026-06-01 05:00:00 -0700 -07"), ""),
        (Filter(by_attestation_type="k8s_psat"), "n3 n4"),
    ],
)
async def test_filters(listed: Running, wanted: Any, found: str) -> None:
    """Each filter, and none, in a list and in a count."""
    assert await names(listed, wanted) == found.split()


async def test_filters_are_anded(listed: Running) -> None:
    """Everything given must hold."""
    wanted = by_selectors(3, "a", "b")
    wanted.by_can_reattest.value = True
    wanted.by_attestation_type = "k8s_psat"
    assert await names(listed, wanted) == ["n4"]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (by_selectors(0), "failed to parse selectors: empty selector set"),
        (by_selectors(0, ""), "failed to parse selectors"),
        (by_selectors(7, "a"), "no such match"),
        *[
            (Filter(by_expires_before=text), "by_expires_before")
            for text in (
                "tomorrow", "2026-06-01", "2026-06-01 14:00:00", "2026-06-01 14:00:00 +0000",
                "2026-06-01 14:00:00 +0000 +01", "2026-06-01T14:00:00 +0000 +00",
                "2026-06-01 14:00:00 +00:00 +00", "2026-06-01 14:00:00 UTC UTC",
                "2026-02-30 14:00:00 +0000 +00", "2026-06-01 14:00:00 +0000 +00\n",
                " 2026-06-01 14:00:00 +0000 +00", "2026-06-01 14:00:00 +9900 +99",
            )
        ],
    ],
)  # fmt: skip
async def test_sec_95_bad_filters_are_refused(listed: Running, wanted: Any, text: str) -> None:
    """SEC-95: a filter that cannot be read is refused, where SPIRE ignores it in silence."""
    async with refused(Code.INVALID_ARGUMENT, text):
        await names(listed, wanted)


async def test_pages(listed: Running) -> None:
    """Pages hold everything once, in order; a bad token is INVALID_ARGUMENT."""
    token, found = "", []
    while True:
        answer = await listed.local.agent.ListAgents(
            agent_pb2.ListAgentsRequest(page_size=4, page_token=token)
        )
        token = answer.next_page_token
        assert bool(token) == bool(answer.agents)
        if not token:
            break
        found.append([one.id.path.rpartition("/")[2] for one in answer.agents])
    assert found == [["n0", "n1", "n2", "n3"], ["n4", "banned"]]
    async with refused(Code.INVALID_ARGUMENT, "page token"):
        await listed.local.agent.ListAgents(
            agent_pb2.ListAgentsRequest(page_size=1, page_token="x")
        )


@pytest.mark.parametrize(
    "bad",
    [None, "/web", "/spire/server", "/spire/agent", "/spire/agentx/y", "", "/spire/agent/x/"],
)
async def test_ids_must_be_agents(running: Running, bad: str | None) -> None:
    """GetAgent, DeleteAgent and BanAgent want an agent's ID of this trust domain."""
    agent = running.local.agent
    given = None if bad is None else id_message(bad)
    async with refused(Code.INVALID_ARGUMENT, "invalid agent ID"):
        await agent.GetAgent(agent_pb2.GetAgentRequest(id=given))
    async with refused(Code.INVALID_ARGUMENT, "invalid agent ID"):
        await agent.DeleteAgent(agent_pb2.DeleteAgentRequest(id=given))
    async with refused(Code.INVALID_ARGUMENT, "invalid agent ID"):
        await agent.BanAgent(agent_pb2.BanAgentRequest(id=given))


async def test_foreign_and_unknown_agents(running: Running) -> None:
    """Another domain's agent is malformed, an unknown one not found."""
    agent = running.local.agent
    foreign = id_message("/spire/agent/x/y", "other.org")
    unknown = id_message("/spire/agent/x/nobody")
    for code, one in ((Code.INVALID_ARGUMENT, foreign), (Code.NOT_FOUND, unknown)):
        async with refused(code):
            await agent.GetAgent(agent_pb2.GetAgentRequest(id=one))
        async with refused(code):
            await agent.DeleteAgent(agent_pb2.DeleteAgentRequest(id=one))
        async with refused(code):
            await agent.BanAgent(agent_pb2.BanAgentRequest(id=one))


async def test_an_attested_agent_is_listed(running: Running) -> None:
    """What joins by a token shows type, serial and expiry of its SVID, and its version."""
    node = await running.node()
    await node.calls.agent.PostStatus(
        agent_pb2.PostStatusRequest(agent_version="1.2.3", current_bundle_serial=2**64 - 1)
    )
    await running.settled()
    found = await running.local.agent.GetAgent(
        agent_pb2.GetAgentRequest(id=id_message(node.id.path))
    )
    assert found == types_pb2.Agent(
        id=id_message(node.id.path),
        attestation_type="join_token",
        x509svid_serial_number=node.svid.serial,
        x509svid_expires_at=int(node.svid.validity.not_after.timestamp()),
        agent_version="1.2.3",
    )


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [("v" * 255, True), ("é" * 127, True), ("v" * 256, False), ("é" * 128, False),
     ("1.0\x1b[2J", False), ("1.0\n", False), ("", True)],
)  # fmt: skip
async def test_versions_have_a_limit(running: Running, version: str, is_taken: bool) -> None:
    """SPIRE API 5.2: 255 bytes; and nothing that moves an operator's cursor (SEC-91)."""
    node = await running.node()
    request = agent_pb2.PostStatusRequest(agent_version=version)
    if is_taken:
        assert await node.calls.agent.PostStatus(request) == agent_pb2.PostStatusResponse()
        return
    async with refused(Code.INVALID_ARGUMENT, "agent version"):
        await node.calls.agent.PostStatus(request)


async def test_evicting_takes_the_alias_along(running: Running) -> None:
    """SPIRE API 5.2: the entry that came with the token goes with its node, and no other."""
    token = await running.token(agent_id=id_message("/fleet"))
    node = await running.node(token)
    (kept,) = await running.add(below(node, "/kept", f"spiffe_id:{node.id}x"))
    await running.local.agent.DeleteAgent(
        agent_pb2.DeleteAgentRequest(id=id_message(node.id.path))
    )
    wanted = entry_pb2.ListEntriesRequest.Filter(by_parent_id=id_message(node.id.path))
    answer = await running.local.entry.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted))
    assert list(answer.entries) == [kept]
