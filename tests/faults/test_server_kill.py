"""The server killed at random under load: F-01 of the fault runs, sampled."""

import asyncio
import contextlib
import os
import random
import time

from tests.faults.load import Load
from tests.support.forked import a_forked_stack
from tests.support.records import raw, records
from workload_api.client.client import WorkloadClient

KILLS = int(os.environ.get("SPIFFE_ISSUER_TEST_KILLS", "15"))
"""F-01 wants 1,000 in the full run."""
READY_SECONDS = 5.0


async def test_sec_100_sec_101_kill_9_under_write_load() -> None:
    """
    SEC-100, SEC-101: a server killed again and again under creates, updates, deletes,
    attestations and signing comes back within 5 s, has lost nothing it acknowledged, has
    nothing half done, and its agent goes on without attesting again (SEC-54, SEC-106).
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    async with a_forked_stack() as stack:
        await stack.server.add_entry("/w", stack.agent.agent_id, f"unix:uid:{os.getuid()}")
        await stack.agent.until_svids(1)
        data = stack.folder / "server"
        serial = records(data).agents[stack.agent.agent_id].serial
        load = Load(stack.server, stack.folder, await stack.server.bundle_pem())
        updates: asyncio.Queue[int] = asyncio.Queue()
        async with WorkloadClient(stack.agent.endpoint) as client:
            held = asyncio.create_task(_hold(client, updates))
            loading = asyncio.create_task(load.run())
            load.up.set()
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.02, 0.25))
                assert not loading.done() or loading.result()
                stack.server.process.kill()
                load.up.clear()
                started = time.monotonic()
                await stack.server.start()
                assert time.monotonic() - started < READY_SECONDS
                found = records(data)
                found.check()
                load.check(found)
                load.up.set()
            await asyncio.sleep(0.2)
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loading
            assert load.unanswered >= KILLS, "the kills hit calls"
            assert load.done > 2 * KILLS, "there was load"

            while not updates.empty():
                updates.get_nowait()
            await stack.server.add_entry("/v", stack.agent.agent_id, f"unix:uid:{os.getuid()}")
            async with asyncio.timeout(20):
                assert await updates.get() == 2, "the stream of before is fed again"
            assert not held.done(), "the workload's stream outlived every server"
            held.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await held
        found = records(data)
        assert found.audited("agent.attest", stack.agent.agent_id) == 1
        with raw(data) as connection:
            (signed,) = connection.execute(
                "SELECT count(*) FROM issued WHERE spiffe_id = 'spiffe://example.org/w'"
            ).fetchone()
        assert signed == 1, "it went on from where it was"
        assert found.agents[stack.agent.agent_id].serial == serial
        assert len(load.nodes) > 1


async def _hold(client: WorkloadClient, updates: "asyncio.Queue[int]") -> None:
    async for context in client.watch_x509():
        updates.put_nowait(len(context.identities))
