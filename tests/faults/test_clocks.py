"""Clocks that are wrong: F-11 to F-13 without root; SEC-111."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.faults.workloads import FreshClient, ids, saved
from tests.support.authorities import a_key, pkcs8_of
from tests.support.ca import FakeCa
from tests.support.forked import CLOCK_OFFSET, a_forked_server, forked
from tests.support.records import records
from tests.support.stack import AgentProcess, Stack, a_folder
from workload_api.storage import AgentStorage, NodeState

ME = f"unix:uid:{os.getuid()}"
HOURS = 7200
MINUTES = 290  # 5 min, less what the test itself may take


@asynccontextmanager
async def a_stack_with_an_svid(**changes: Any) -> AsyncIterator[Stack]:
    """A server whose authorities are a day old, and an agent that serves ``/w``."""
    with a_folder() as folder:
        server = a_forked_server(folder, **changes)
        agent = forked(AgentProcess(folder, server))
        stack = Stack(folder, server, agent)
        try:
            await server.start(**{CLOCK_OFFSET: str(-86400)})
            await again(stack)
            await agent.join()
            await server.add_entry("/w", agent.agent_id, ME)
            await agent.until_svids(1)
            await saved(agent, 1)
            yield stack
        finally:
            agent.process.close()
            server.process.close()


async def again(stack: Stack, offset: int = 0) -> None:
    """Start the server again, its clock ahead by *offset* seconds."""
    await asyncio.to_thread(stack.server.process.stop)
    await stack.server.start(**{CLOCK_OFFSET: str(offset)} if offset else {})


async def test_sec_111_a_server_whose_clock_is_stepped() -> None:
    """
    SEC-111, F-11: a server that comes back two hours ahead or behind makes nothing expire:
    the agent serves what it had and says what it cannot do, and is in step again, as who it
    was, when the clock is right.
    """
    async with a_stack_with_an_svid() as stack:
        agent = stack.agent

        async def says_so() -> bool:
            status = await agent.status()
            return status.ready and not status.connected and bool(status.problem)

        async with FreshClient(agent.endpoint) as client:
            before = await client.fetch_x509()
            for offset in (HOURS, -HOURS):
                await again(stack, offset)
                await agent.process.until(says_so)
                await asyncio.sleep(1)  # tries a few times
                assert (await client.fetch_x509()).identities == before.identities
                await again(stack)
                await agent.process.until(lambda: in_step(agent))
        await stack.server.add_entry("/v", agent.agent_id, ME)
        await agent.until_svids(2)
        found = records(stack.folder / "server")
        assert found.audited("agent.attest", agent.agent_id) == 1
        async with FreshClient(agent.endpoint) as client:
            assert ids(await client.fetch_x509()) == {"/v", "/w"}


async def in_step(agent: AgentProcess) -> bool:
    """True when the agent hears of changes."""
    return bool((await agent.status()).connected)


async def test_sec_111_a_clock_before_the_authority() -> None:
    """SEC-111: a server whose clock says that its own CA has not begun names the clock."""
    with a_folder() as folder:
        server = a_forked_server(folder)
        await server.start()
        assert server.process.stop() == 0
        server.process.log.unlink()
        server.process.start(**{CLOCK_OFFSET: str(-HOURS)})
        assert await server.process.wait() == 1
        assert "put the clock right" in server.process.log.read_text()
        await server.start()
        records(folder / "server").check()
        server.process.close()


async def test_sec_111_peers_minutes_apart() -> None:
    """SEC-111, SEC-16: backdating by 5 min, server and agent work together 5 min apart."""
    async with a_stack_with_an_svid(svids={"backdate": "5m"}) as stack:
        agent = stack.agent
        for number, offset in enumerate((MINUTES, -MINUTES), 2):
            await again(stack, offset)
            await stack.server.add_entry(f"/v{number}", agent.agent_id, ME)
            await agent.until_svids(number)
            async with FreshClient(agent.endpoint) as client:
                context = await client.fetch_x509()
                assert len(ids(context)) == number
                now = datetime.now(UTC)
                assert all(one.svid.validity.covers(now) for one in context.identities)
                assert len(await client.fetch_jwt(("somebody",))) == number


async def test_sec_111_an_agent_that_slept_through_its_own_life() -> None:
    """SEC-111, F-10: started after its SVID has ended, its token spent, it says what to do."""
    async with a_stack_with_an_svid() as stack:
        agent = stack.agent
        assert await asyncio.to_thread(agent.process.stop) == 0
        ca, ended = FakeCa(), datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        begun = ended - timedelta(hours=1)
        leaf = ca.leaf(agent.agent_id, not_before=begun, not_after=ended)
        storage = AgentStorage(stack.folder / "agent", stack.folder / "a")
        storage.save_node(NodeState(pkcs8_of(a_key("p256", "workload")), ca.chain(leaf)))
        agent.process.log.unlink()
        agent.process.start()
        assert await agent.process.wait() == 1
        text = agent.process.log.read_text()
        assert "SVID ended at" in text and "issuer token generate" in text
        assert "Traceback" not in text
        # And with a new token it joins.
        await agent.join()
