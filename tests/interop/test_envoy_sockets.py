"""A real Envoy on the workload socket, as configurations that come from SPIRE have it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import yaml

from tests.support.envoy import Envoy, Mesh, a_mesh, needs_envoy
from tests.support.envoyconfig import plain_cluster, tls_listener

pytestmark = [needs_envoy, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]
SOON = {"base_interval": "0.1s", "max_interval": "1s"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    """An agent that serves SDS on the workload socket, and nowhere else."""
    async with a_mesh(sds={"socket": "", "on_workload_socket": True}) as made:
        made.socket = made.stack.agent.workload_socket
        assert not made.stack.agent.sds_socket.exists()
        yield made


async def an_envoy(mesh: Mesh, name: str, header: str = "") -> Envoy:
    """One with an entry, started, that sends this header."""
    envoy = mesh.envoy(name)
    await mesh.entry(envoy)
    listener = tls_listener("in", "service", envoy.access_log, header=header, retry=SOON)
    return await mesh.start(envoy, [listener], [plain_cluster("service", mesh.service)])


async def test_sec_38_the_header_by_initial_metadata(mesh: Mesh) -> None:
    """SEC-38, SDS-02: an Envoy that sends the header as initial metadata is served there."""
    envoy = await an_envoy(mesh, "polite", header="true")
    await envoy.ready()
    assert len(await envoy.serials()) == 1


async def test_sec_38_no_header(mesh: Mesh) -> None:
    """SEC-38: without it an Envoy is refused there, until the setting marked unsafe is on."""
    agent = mesh.stack.agent
    envoy = await an_envoy(mesh, "silent")
    # The first two can be Envoy's own, before its cluster is up.
    await envoy.until_stat("sds.default.update_failure", 4)
    assert "workload.spiffe.io" in envoy.process.log.read_text()
    assert await envoy.serials() == set()

    settings = yaml.safe_load(agent.config.read_text())
    settings["sds"]["unsafe_without_header"] = True
    agent.config.write_text(yaml.safe_dump(settings))
    agent.process.stop()
    await agent.start()
    await envoy.ready()
    assert len(await envoy.serials()) == 1
