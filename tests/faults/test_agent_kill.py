"""The agent killed: at random under load, at each crash point, with no server (F-32)."""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import pytest_asyncio

from spiffe_core.crashpoints import VARIABLE
from spiffe_core.errors import ErrorKind, SpiffeError
from spiffe_core.x509svid import verify_x509_svid
from tests.faults import points
from tests.faults.workloads import FreshClient, Tally, ids, saved, until_end
from tests.support.forked import a_forked_server, a_forked_stack, forked
from tests.support.records import records
from tests.support.stack import AgentProcess, ServerProcess, a_folder

CRASHED = 137
KILLS = 8
ME = f"unix:uid:{os.getuid()}"
SHORT = {"svids": {"agent_ttl": "16s"}}
"""Renewed by the agent after some 6 s."""


@contextlib.asynccontextmanager
async def agents(server: ServerProcess, count: int) -> AsyncIterator[list[AgentProcess]]:
    """Agents of *server* with their settings, not started yet."""
    made = []
    try:
        for number in range(count):
            folder = server.folder / f"a{number}"
            folder.mkdir(0o700)
            made.append(await forked(AgentProcess(folder, server)).configure())
        yield made
    finally:
        for agent in made:
            agent.process.close()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ServerProcess]:
    """A server whose agents renew soon."""
    with a_folder() as folder:
        made = a_forked_server(folder, **SHORT)
        try:
            yield await made.start()
        finally:
            made.process.close()


async def each(
    points_: Sequence[str], agents_: list[AgentProcess], story: Callable[..., Awaitable[None]]
) -> None:
    """Tell one story for every point, all at once, each with an agent of its own."""
    async with asyncio.TaskGroup() as tasks:
        for agent, point in zip(agents_, points_, strict=True):
            tasks.create_task(story(agent, point), name=point)


async def cut(agent: AgentProcess, point: str) -> None:
    assert await agent.process.wait() == CRASHED, (point, agent.process.log.read_text()[-2000:])


async def test_sec_100_sec_50_cut_while_joining(server: ServerProcess) -> None:
    """
    SEC-100, SEC-50: an agent cut anywhere while it joins, its CSR sent or its SVID half kept,
    joins when it is started again, with the same token, as the same agent, once.
    """

    async def story(agent: AgentProcess, point: str) -> None:
        agent.process.start(**{VARIABLE: point})
        await cut(agent, point)
        await agent.start()

    async with agents(server, len(points.AGENT_JOIN)) as made:
        await each(points.AGENT_JOIN, made, story)
        found = records(server.folder / "server")
        assert set(found.agents) == {agent.agent_id for agent in made}
        for agent in made:
            assert found.audited("agent.attest", agent.agent_id) in (1, 2)
            left = {one.name for one in (agent.folder / "agent").iterdir()}
            assert left <= {"node.json", "cache.json"}, "no half file stays"


async def test_sec_54_cut_in_its_own_renewal(server: ServerProcess) -> None:
    """
    SEC-54, SEC-100, F-32: an agent cut anywhere in its own renewal, between the reply and the
    file too, goes on with the certificate that it has kept: both serials are good.
    """

    async def story(agent: AgentProcess, point: str) -> None:
        await agent.start()
        await saved(agent, 0)
        before = records(data).agents[agent.agent_id].serial
        agent.process.stop()
        count = ":2" if point in points.AGENT_FILE else ""  # the first one is the cache's
        await agent.start(**{VARIABLE: point + count})
        await cut(agent, point)
        kept = records(data).agents[agent.agent_id]
        assert kept.serial == before and kept.new_serial, "not in use yet"
        await agent.start()

    data = server.folder / "server"
    async with agents(server, len(points.AGENT_RENEW)) as made:
        await each(points.AGENT_RENEW, made, story)
        found = records(data)
        for agent in made:
            assert found.audited("agent.attest", agent.agent_id) == 1
            assert found.audited("agent.renew", agent.agent_id) >= 1


async def test_sec_100_cut_while_a_change_arrives(server: ServerProcess) -> None:
    """
    SEC-100, SEC-106: an agent cut anywhere between a change and the workload it concerns,
    the push itself included, delivers it after its restart, and serves what it had at once.
    """

    async def story(agent: AgentProcess, point: str) -> None:
        await agent.start()
        await server.add_entry("/first", agent.agent_id, ME)
        await agent.until_svids(1)
        await saved(agent, 1)
        agent.process.stop()
        # The first time is when it starts: it applies everything, and keeps its cache.
        again = point == "agent.applied" or point in points.AGENT_FILE
        await agent.start(**{VARIABLE: point + ":2" * again})
        async with FreshClient(agent.endpoint) as client:
            first = await client.fetch_x509()
            watching = asyncio.create_task(until_end(client))
            await asyncio.sleep(0)
            await server.add_entry("/second", agent.agent_id, ME)
            await cut(agent, point)
            assert (await watching).kind is ErrorKind.NOT_READY
        await agent.start(connected=False)
        async with FreshClient(agent.endpoint) as client:
            again = await client.fetch_x509()
            assert ids(first) <= ids(again)
            async with asyncio.timeout(15):
                async for context in client.watch_x509():
                    if ids(context) == {"/first", "/second"}:
                        break

    async with agents(server, len(points.AGENT_CHANGE)) as made:
        await each(points.AGENT_CHANGE, made, story)
        found = records(server.folder / "server")
        found.check()
        for agent in made:
            assert found.audited("agent.attest", agent.agent_id) == 1


async def test_sec_106_kill_9_of_the_agent_under_load() -> None:
    """
    SEC-106, SEC-100: an agent killed again and again under fetching workloads and arriving
    changes serves again at once, says nothing but UNAVAILABLE meanwhile, misses no change,
    and never attests a second time.
    """
    chance = random.Random(5)
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        await saved(stack.agent, 1)
        serial = records(stack.folder / "server").agents[stack.agent.agent_id].serial
        tally = Tally()
        working = [asyncio.create_task(one) for one in tally.clients(stack.agent.endpoint)]
        for number in range(KILLS):
            await stack.server.add_entry(f"/more/{number}", stack.agent.agent_id, ME)
            await asyncio.sleep(chance.uniform(0.02, 0.3))
            stack.agent.process.kill()
            await stack.agent.start(connected=False)
            async with FreshClient(stack.agent.endpoint) as client:
                assert "/w" in ids(await client.fetch_x509())
        async with FreshClient(stack.agent.endpoint) as client, asyncio.timeout(20):
            async for context in client.watch_x509():
                if len(ids(context)) == 1 + KILLS:
                    break
        for one in working:
            assert not one.done() or one.result()
            one.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        assert tally.served > KILLS and tally.unavailable >= KILLS
        found = records(stack.folder / "server")
        found.check()
        assert found.audited("agent.attest", stack.agent.agent_id) == 1
        assert found.agents[stack.agent.agent_id].serial == serial


async def test_sec_106_an_agent_that_starts_without_a_server() -> None:
    """
    SEC-106, SEC-46: killed and started while the server is down, an agent serves X509-SVIDs
    that verify, bundles and validation from its own files, and says that it has no server;
    when the server is back it is in step again with no operator's hand.
    """
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, ME)
        await stack.agent.until_svids(1)
        await saved(stack.agent, 1)
        async with FreshClient(stack.agent.endpoint) as client:
            before = await client.fetch_x509()
            (token,) = await client.fetch_jwt(("somebody",))
        stack.server.process.kill()
        stack.agent.process.kill()
        await stack.agent.start(connected=False)
        async with FreshClient(stack.agent.endpoint) as client:
            after = await client.fetch_x509()
            assert after.identities[0].svid == before.identities[0].svid
            svid = after.identities[0].svid
            verify_x509_svid(svid.chain, after.bundles, at=svid.validity.not_before)
            who, _ = await client.validate_jwt(token.token, "somebody")
            assert who.path == "/w"
            # A JWT-SVID lives for minutes, and only in memory: that one needs the server.
            with pytest.raises(SpiffeError) as refused:
                await client.fetch_jwt(("somebody",))
            assert refused.value.kind is ErrorKind.NOT_READY
        status = await stack.agent.status()
        assert (
            status.ready and not status.connected and str(stack.server.port) in status.problem
        )
        await stack.server.start()
        await stack.server.add_entry("/v", stack.agent.agent_id, ME)
        await stack.agent.until_svids(2)
        found = records(stack.folder / "server")
        assert found.audited("agent.attest", stack.agent.agent_id) == 1
        status = await stack.agent.status()
        assert status.connected and not status.problem
