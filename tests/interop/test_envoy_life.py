"""
What two Envoys in mutual TLS notice of what goes on around them: nothing.

The agent and the server are killed, SVIDs end, and keys are of other kinds.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tests.support.envoy import Envoy, Load, Mesh, a_mesh, get, needs_envoy
from tests.support.envoyconfig import (
    plain_cluster,
    plain_listener,
    tls_cluster,
    tls_listener,
)

pytestmark = [needs_envoy, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]
SOON = {"base_interval": "0.1s", "max_interval": "1s"}


@dataclass(frozen=True)
class Pair:
    """Two Envoys that speak."""

    mesh: Mesh
    front: Envoy
    back: Envoy
    port: int

    @contextlib.asynccontextmanager
    async def traffic(self, pause: float = 0) -> AsyncIterator[Load]:
        """Requests from the first line to the last, each in a handshake; all are answered."""
        async with Load(self.port, pause=pause) as load:
            await load.more(20)
            yield load
            await load.more(20)
        assert load.failed == []

    async def serials(self) -> set[int]:
        """Of the certificates that both present."""
        return await self.front.serials() | await self.back.serials()

    async def renewed(self, before: set[int]) -> None:
        """Have both SVIDs signed anew, and wait until both Envoys present new ones."""
        assert await self.mesh.stack.agent.renew() >= 2

        async def both() -> bool:
            now = await self.serials()
            return len(now) == 2 and now.isdisjoint(before)

        await self.front.until(both)


@contextlib.asynccontextmanager
async def a_pair(
    server_changes: Mapping[str, Any] | None = None, **agent_changes: Any
) -> AsyncIterator[Pair]:
    """A front and a back, with an identity each, that try again soon when the agent is gone."""
    async with a_mesh(server_changes, **agent_changes) as mesh:
        back, front = mesh.envoy("back"), mesh.envoy("front")
        await mesh.entry(back)
        await mesh.entry(front)
        listener = tls_listener(
            "back", "service", back.access_log, peers=[front.id], retry=SOON
        )
        await mesh.start(back, [listener], [plain_cluster("service", mesh.service)])
        await back.ready()
        await mesh.start(
            front,
            [plain_listener("front", "back", front.access_log)],
            [tls_cluster("back", await back.port("back"), peers=[back.id], retry=SOON)],
        )
        await front.ready()
        yield Pair(mesh, front, back, await front.port("front"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    """One whose SVIDs live for an hour."""
    async with a_pair() as made:
        yield made


async def test_the_agent_is_killed(pair: Pair) -> None:
    """An agent killed and started again under traffic: no request fails, pushes go on."""
    agent = pair.mesh.stack.agent
    async with pair.traffic() as load:
        agent.process.kill()
        for envoy in (pair.front, pair.back):

            async def lost(envoy: Envoy = envoy) -> bool:
                stats = await envoy.stats("sds.default.control_plane.connected_state")
                return set(stats.values()) == {0}

            await envoy.until(lost)
        await load.more(50)
        before = await pair.serials()
        await agent.start()
        for envoy in (pair.front, pair.back):
            await envoy.until_stat("sds.default.control_plane.connected_state")
        await agent.until_svids(2)
        await pair.renewed(before)


async def test_the_agent_is_killed_in_a_push(pair: Pair) -> None:
    """F-33: an agent killed while it pushes leaves each Envoy with a pair that fits."""
    agent = pair.mesh.stack.agent
    async with pair.traffic() as load:
        for _ in range(4):
            await agent.until_svids(2)
            renewing = asyncio.create_task(agent.renew())
            await asyncio.sleep(random.uniform(0, 0.05))  # before, between or after the pushes
            agent.process.kill()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await renewing
            await load.more(20)
            await agent.start()
        await agent.until_svids(2)
        await pair.renewed(await pair.serials())
    for envoy in (pair.front, pair.back):
        rejected = await envoy.stats("update_rejected")
        assert rejected and set(rejected.values()) == {0}


async def test_the_server_is_killed(pair: Pair) -> None:
    """SEC-106: a server killed under traffic disturbs none, and renewals go on after it."""
    server, agent = pair.mesh.stack.server, pair.mesh.stack.agent
    async with pair.traffic() as load:
        before = await pair.serials()
        server.process.kill()
        await load.more(50)
        assert await pair.serials() == before
        await server.start()

        async def connected() -> bool:
            status = await agent.status()
            return status is not None and status.connected

        await agent.process.until(connected)
        await pair.renewed(before)


async def test_an_envoy_that_starts_again(pair: Pair) -> None:
    """F-34: an Envoy that starts while SVIDs are renewed gets the newest one first."""
    mesh, agent = pair.mesh, pair.mesh.stack.agent
    again = mesh.envoy("again")
    await mesh.entry(again)
    listener = tls_listener("in", "service", again.access_log)
    await mesh.start(again, [listener], [plain_cluster("service", mesh.service)])
    await again.ready()
    before = await again.serials()
    again.process.kill()
    assert await agent.renew() == 3
    await again.start_again()
    await again.ready()
    assert (await again.serials()).isdisjoint(before)
    taken = "sds.default.update_success"
    assert await again.stats(taken) == {taken: 1}


async def test_svids_of_seconds() -> None:
    """SDS-09: SVIDs that live for 4 s are renewed by themselves, and none is used too long."""
    seen: set[str] = set()
    async with a_pair({"svids": {"x509_ttl": "4s"}}) as pair, pair.traffic(pause=0.02) as load:
        while len(seen) < 4:  # the first has ended before the fourth comes
            seen |= {one.headers["x-client-serial"] for one in await load.more(5)}


@pytest.mark.parametrize(
    ("authority", "svid"), [("rsa-2048", "ec-p384"), ("ec-p384", "rsa-2048")]
)
async def test_kinds_of_keys(authority: str, svid: str) -> None:
    """SDS-05: whatever kind of key an operator sets, Envoy takes what we make of it."""
    server = {"authority": {"key_type": authority}}
    async with a_pair(server, workloads={"key_type": svid}) as pair:
        answer = await get(pair.port)
        assert (answer.status, answer.headers["x-client"]) == (200, pair.front.id)
