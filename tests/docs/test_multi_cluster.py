"""The page about several clusters, played against two stand-ins for API servers."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.k8s.cluster import FakeCluster
from tests.support.pages import play
from tests.support.stack import ROOT, a_folder

MANIFESTS = ROOT / "deploy" / "kubernetes" / "base"
NAMESPACE = "spiffe-issuer"


def granted(cluster: FakeCluster, name: str) -> str:
    """A token of the server's or the agent's account, which may do what the manifests say."""
    text = (MANIFESTS / f"{name}-rbac.yaml").read_text()
    cluster.apply(*(one for one in yaml.safe_load_all(text) if one["kind"] != "ServiceAccount"))
    return cluster.account_token(NAMESPACE, f"spiffe-issuer-{name}")


@contextlib.asynccontextmanager
async def two_clusters(folder: Path) -> AsyncIterator[None]:
    """East and west, with everything that the page finds in its folder."""
    async with FakeCluster("east") as east, FakeCluster("west") as west:
        for cluster in (east, west):
            name = cluster.name
            cluster.pod("web-1", "shop", "web", "node-1")
            agent = cluster.pod("agent-1", NAMESPACE, "spiffe-issuer-agent", "node-1")
            (folder / f"{name}.token").write_text(cluster.projected_token(agent))
            for file, account in ((name, "server"), (f"{name}-agent", "agent")):
                cluster.kubeconfig(folder, token=granted(cluster, account), name=file)
        yield


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Serve both while entered, in a thread with a loop of its own."""
    started, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with two_clusters(folder):
            started.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(20)
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


@pytest.mark.timeout(120)
def test_several_clusters() -> None:
    """Two clusters with the same names, one server: what the page says happens."""
    with a_folder() as folder, beside(folder):
        play("docs/howto/multi-cluster.md", folder)
