"""/live, /ready and /metrics tell the truth (SEC-114), asked over HTTP of real processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest_asyncio

from tests.faults.pages import Pages, a_free_port
from tests.faults.workloads import FreshClient, ids
from tests.support.forked import a_forked_server, forked
from tests.support.records import raw
from tests.support.stack import AgentProcess, ServerProcess, a_folder

ME = f"unix:uid:{os.getuid()}"


@dataclass
class Watched:
    """A server and an agent with their pages."""

    server: ServerProcess
    agent: AgentProcess
    of_server: Pages
    of_agent: Pages


@pytest_asyncio.fixture
async def watched() -> AsyncIterator[Watched]:
    """A server, and an agent that was not started yet."""
    with a_folder() as folder:
        ports = a_free_port(), a_free_port()
        server = a_forked_server(folder, status={"port": ports[0]})
        agent = forked(AgentProcess(folder, server, {"status": {"port": ports[1]}}))
        try:
            await server.start()
            await agent.configure()
            yield Watched(server, agent, Pages(ports[0]), Pages(ports[1]))
        finally:
            agent.process.close()
            server.process.close()


async def test_sec_114_an_agent_says_how_it_is(watched: Watched) -> None:
    """
    SEC-114: an agent that never heard from its server is alive and not ready, and says why;
    in step it is ready; in an outage it is ready on what it has, and says that too.
    """
    pages, agent = watched.of_agent, watched.agent
    watched.server.process.kill()
    await agent.start(connected=False)
    assert await pages.is_live()
    facts = await pages.until(lambda status, facts: bool(facts["server_problem"]))
    assert not facts["ready"] and facts["problems"] and not facts["connected"]
    assert str(watched.server.port) in facts["server_problem"]
    assert await pages.metric("agent_connected") == 0

    await watched.server.start()
    facts = await pages.until(lambda status, facts: status == 200)
    assert facts["ready"] and facts["connected"] and not facts["problems"]
    assert not facts["server_problem"]
    assert await pages.metric("agent_connected") == 1

    watched.server.process.kill()
    facts = await pages.until(lambda status, facts: not facts["connected"])
    assert facts["ready"] and facts["server_problem"] and await pages.is_live()
    assert await pages.metric("agent_connected") == 0


async def test_sec_114_a_delivery_is_counted(watched: Watched) -> None:
    """SEC-114, SEC-106: a change that reaches an open stream is in the delivery histogram."""
    pages, agent = watched.of_agent, watched.agent
    await agent.start()
    await watched.server.add_entry("/w", agent.agent_id, ME)
    await agent.until_svids(1)
    async with FreshClient(agent.endpoint) as client:
        contexts = client.watch_x509()
        await anext(contexts)
        assert await pages.metric("agent_streams") == 1
        counted = await pages.metric("agent_change_delivery_seconds_count")
        took = await pages.metric("agent_change_delivery_seconds_sum")
        await watched.server.add_entry("/v", agent.agent_id, ME)
        assert ids(await anext(contexts)) == {"/v", "/w"}
        assert await pages.metric("agent_change_delivery_seconds_count") == counted + 1
        assert 0 < await pages.metric("agent_change_delivery_seconds_sum") - took < 10
        await contexts.aclose()
    assert await pages.metric("agent_entries") == 2
    assert await pages.metric("agent_x509_svids") == 2
    assert await watched.of_server.metric("issuer_entries") == 2
    assert await watched.of_server.metric("issuer_agents") == 1
    assert await watched.of_server.metric("issuer_watch_streams") == 1
    assert await watched.of_server.metric('issuer_svids_issued_total{kind="x509"}') >= 4


async def test_sec_114_a_server_whose_database_is_held(watched: Watched) -> None:
    """
    SEC-114, SEC-102: while another process holds the database the server refuses changes
    with UNAVAILABLE, is alive, is not ready and says why, and is ready again by itself.
    """
    pages, server = watched.of_server, watched.server
    assert (await pages.ready())[0] == 200
    with raw(server.folder / "server") as connection:
        connection.execute("BEGIN IMMEDIATE")
        refused = await refusal(server, "/w")
        assert "held by another process" in refused
        status, facts = await pages.ready()
        assert status == 503 and "held by another process" in facts["problems"][0]
        assert await pages.is_live()
        connection.execute("ROLLBACK")
    await pages.until(lambda status, _: status == 200)
    assert await refusal(server, "/w") == ""


async def refusal(server: ServerProcess, path: str) -> str:
    """What a change is refused with, empty when it is not."""
    try:
        await server.add_entry(path, "/spire/agent/join_token/a", "unix:uid:1")
    except AssertionError as error:
        return str(error)
    return ""


async def test_sec_114_stopping_is_not_ready(watched: Watched) -> None:
    """
    SEC-114, SEC-108: while it waits for the calls that are under way, a process that was told
    to stop is alive, not ready, and says so; the calls end well.
    """
    agent, server = watched.agent, watched.server
    await agent.start()
    await server.add_entry("/w", agent.agent_id, ME)
    await agent.until_svids(1)
    with raw(server.folder / "server") as connection:
        connection.execute("BEGIN IMMEDIATE")  # so that what has to be on record waits
        async with FreshClient(agent.endpoint) as client:
            fetching = asyncio.create_task(client.fetch_jwt(("somebody",)))
            adding = asyncio.create_task(server.add_entry("/v", agent.agent_id, ME))
            await asyncio.sleep(0.2)
            for process, pages in (
                (agent.process, watched.of_agent),
                (server.process, watched.of_server),
            ):
                assert (await pages.ready())[0] == 200
                os.kill(process.pid, signal.SIGTERM)
                facts = await pages.until(lambda status, _: status == 503)
                assert any("stopping" in one for one in facts["problems"])
                assert await pages.is_live()
            connection.execute("ROLLBACK")
            assert await fetching
            assert await adding
    assert await agent.process.wait() == 0
    assert await server.process.wait() == 0
