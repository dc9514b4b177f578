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
SHORT_SECONDS = 8
TOKEN_SECONDS = 16
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


async def test_sec_106_workloads_outlive_the_server(server: ServerProcess) -> None:
    """
    SEC-106, SEC-47, F-09: while the server is away open streams stay open, new callers get
    X509-SVIDs, and JWT-SVIDs that were fetched already are handed out until shortly before
    they end and not after; when it is back, what was added meanwhile arrives by itself.
    """
    async with an_agent(server, "a") as agent, FreshClient(agent.endpoint) as client:
        await server.add_entry("/w", agent.agent_id, ME, jwt_svid_ttl=TOKEN_SECONDS)
        await agent.until_svids(1)
        await saved(agent, 1)
        updates: asyncio.Queue[X509Context] = asyncio.Queue()
        held = asyncio.create_task(follow(client, updates))
        before = await updates.get()
        (token,) = await client.fetch_jwt(("somebody",))
        server.process.kill()

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

        # A restart of the agent, too, finds its way without the server.
        assert await asyncio.to_thread(agent.process.stop) == 0
        assert not held.done() or isinstance(held.exception(), SpiffeError)
        await agent.start(connected=False)
        async with FreshClient(agent.endpoint) as other:
            assert (await other.fetch_x509()).identities == before.identities
            held = asyncio.create_task(follow(other, updates))
            assert (await updates.get()).identities == before.identities

            await server.start()
            back_at = time.monotonic()
            await server.add_entry("/v", agent.agent_id, ME)
            async with asyncio.timeout(30):
                while ids(await updates.get()) != {"/v", "/w"}:
                    pass
            assert time.monotonic() - back_at < 30, "SEC-106"
            assert (await other.fetch_jwt(("somebody",)))[0].token != token.token
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
        assert records(server.folder / "server").audited("agent.attest", agent.agent_id) == 1


async def test_sec_106_what_has_expired_is_not_handed_out(server: ServerProcess) -> None:
    """
    SEC-106, IOP-09: an X509-SVID that ends in the outage is not handed out any more; the
    caller is told UNAVAILABLE, never given an empty answer, an open stream stays open, and
    gets the next SVID when the server is back.
    """
    async with an_agent(server, "b") as agent, FreshClient(agent.endpoint) as client:
        await server.add_entry("/short", agent.agent_id, ME, x509_svid_ttl=SHORT_SECONDS)
        await agent.until_svids(1)
        updates: asyncio.Queue[X509Context] = asyncio.Queue()
        held = asyncio.create_task(follow(client, updates))
        last = await updates.get()
        last = await updates.get()  # SEC-106: renewed in time, while there is a server
        server.process.kill()
        ends = last.identities[0].svid.validity.not_after
        while datetime.now(UTC) < ends:
            assert await refusal_of(agent) is None or datetime.now(UTC) > ends
            await asyncio.sleep(0.3)
        assert await refusal_of(agent) is ErrorKind.NOT_READY
        assert not held.done() and updates.empty()

        await server.start()
        async with asyncio.timeout(30):
            renewed = (await updates.get()).identities[0].svid
        assert renewed.validity.not_after > ends
        assert await refusal_of(agent) is None
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
