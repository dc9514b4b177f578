"""Processes in containers, as the agent on the host sees them."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.contained import a_workload
from tests.support.containers import Engine
from tests.support.podstack import QUICK
from tests.support.stack import Stack, a_stack

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]

UID = 61_234


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A server and an agent on the host."""
    async with a_stack(agent_changes={"workloads": QUICK}) as made:
        await made.server.add_entry("/user", made.agent.agent_id, f"unix:uid:{UID}")
        await made.agent.until_svids(1)
        yield made


async def test_sec_31_a_process_in_a_container(engine: Engine, stack: Stack) -> None:
    """SEC-31: the kernel names a caller in other namespaces by its host's numbers."""
    sockets = stack.agent.workload_socket.parent
    async with a_workload(engine, sockets, user=UID) as workload:
        assert workload.player.seen[0]["pid"] == 1, "a PID namespace of its own"
        assert await workload.fetched() == {"/user"}
    async with a_workload(engine, sockets, user=UID + 1) as workload:
        assert await workload.fetched() == set()
