"""Workloads through a server's outage: F-09, SEC-106, SEC-47."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest_asyncio

from spiffe_core.errors import ErrorKind, SpiffeError
from tests.faults.workloads import FreshClient, ids, saved
from tests.support.forked import a_forked_server, forked
from tests.support.records import records
from tests.support.stack import AgentProcess, ServerProcess, a_folder
from workload_api.client.client import WorkloadClient, X509Context

ME = f"unix:uid:{os.getuid()}"
SHORT_SECONDS = 3
TOKEN_SECONDS = 15
LAST_SECONDS = 10
"""A JWT-SVID is not handed out in its last ten seconds (IOP-13)."""


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ServerProcess]:
    """A running server."""
    with a_folder() as folder:
        made = a_forked_server(folder)
        try:
            yield await made.start()
        finally:
            made.process.close()


@contextlib.asynccontextmanager
async def an_agent(server: ServerProcess, name: str) -> AsyncIterator[AgentProcess]:
    """An agent of *server* in step with it."""
    folder = server.folder / name
    folder.mkdir(0o700)
    made = forked(AgentProcess(folder, server))
    try:
        yield await made.join()
    finally:
        made.process.close()


async def follow(client: WorkloadClient, updates: "asyncio.Queue[X509Context]") -> None:
    """Put every update of an open stream into *updates*."""
    async for context in client.watch_x509():
        updates.put_nowait(context)


async def refusal_of(agent: AgentProcess) -> ErrorKind | None:
    """How the agent refuses a workload that asks for its X509-SVIDs, None when it does not."""
    async with FreshClient(agent.endpoint) as client:
        try:
            context = await client.fetch_x509()
        except SpiffeError as error:
            return error.kind
    assert context.identities, "IOP-09: an answer is never empty"
    now = datetime.now(UTC)
    assert all(now <= one.svid.validity.not_after for one in context.identities)
    return None


class Outage:
    """Begins and ends when all stories that it is part of have come that far."""

    def __init__(self, server: ServerProcess, stories: int) -> None:
        self._server = server
        self._together = asyncio.Barrier(stories)

    async def begin(self) -> None:
        """Kill the server."""
        if await self._together.wait() == 0:
            self._server.process.kill()
        await self._together.wait()

    async def end(self) -> None:
        """Start it again."""
        if await self._together.wait() == 0:
            await self._server.start()
        await self._together.wait()


async def test_sec_106_an_outage(server: ServerProcess) -> None:
    """
    SEC-106, SEC-47, F-09: while the server is away open streams stay open, new callers get
    X509-SVIDs, and JWT-SVIDs that were fetched already are handed out until shortly before
    they end and not after.  IOP-09: of what has ended nobody gets anything, not an empty
    answer either, but UNAVAILABLE.  When it is back, what was added meanwhile arrives, and
    what had ended is replaced, by itself.
    """
    outage = Outage(server, 2)
    async with an_agent(server, "a") as long, an_agent(server, "b") as short:
        async with asyncio.TaskGroup() as stories:
            stories.create_task(what_is_good_is_served(server, long, outage))
            stories.create_task(what_has_ended_is_not(server, short, outage))
        found = records(server.folder / "server")
        for agent in (long, short):
            assert found.audited("agent.attest", agent.agent_id) == 1


async def what_is_good_is_served(
    server: ServerProcess, agent: AgentProcess, outage: Outage
) -> None:
    async with FreshClient(agent.endpoint) as client:
        await server.add_entry("/w", agent.agent_id, ME, jwt_svid_ttl=TOKEN_SECONDS)
        await agent.until_svids(1)
        await saved(agent, 1)
        updates: asyncio.Queue[X509Context] = asyncio.Queue()
        held = asyncio.create_task(follow(client, updates))
        before = await updates.get()
        (token,) = await client.fetch_jwt(("somebody",))
        await outage.begin()

        async with FreshClient(agent.endpoint) as other:
            assert (await other.fetch_x509()).identities == before.identities
        served = 0
        refused = None
        while refused is None:
            try:
                (again,) = await client.fetch_jwt(("somebody",))
            except SpiffeError as error:
                refused = error
            else:
                assert again == token and datetime.now(UTC) < again.expires_at
                served += 1
                await asyncio.sleep(0.2)
        assert served and refused.kind is ErrorKind.NOT_READY
        left = (token.expires_at - datetime.now(UTC)).total_seconds()
        assert LAST_SECONDS - 4 < left <= LAST_SECONDS, "kept for as long as it was good"
        assert (await client.validate_jwt(token.token, "somebody"))[0].path == "/w"

        assert not held.done() and updates.empty()
        await outage.end()
        back_at = time.monotonic()
        await server.add_entry("/v", agent.agent_id, ME)
        async with asyncio.timeout(30):
            while ids(await updates.get()) != {"/v", "/w"}:
                pass
        assert time.monotonic() - back_at < 30, "SEC-106"
        assert (await client.fetch_jwt(("somebody",)))[0].token != token.token
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)


async def what_has_ended_is_not(
    server: ServerProcess, agent: AgentProcess, outage: Outage
) -> None:
    async with FreshClient(agent.endpoint) as client:
        await server.add_entry("/short", agent.agent_id, ME, x509_svid_ttl=SHORT_SECONDS)
        await agent.until_svids(1)
        updates: asyncio.Queue[X509Context] = asyncio.Queue()
        held = asyncio.create_task(follow(client, updates))
        last = await updates.get()
        last = await updates.get()  # renewed in time, while there is a server
        await outage.begin()
        ends = last.identities[0].svid.validity.not_after
        assert await refusal_of(agent) is None
        await asyncio.sleep((ends - datetime.now(UTC)).total_seconds() + 0.01)
        assert await refusal_of(agent) is ErrorKind.NOT_READY
        assert not held.done() and updates.empty()

        await outage.end()
        async with asyncio.timeout(30):
            renewed = (await updates.get()).identities[0].svid
        assert renewed.validity.not_after > ends
        assert await refusal_of(agent) is None
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
