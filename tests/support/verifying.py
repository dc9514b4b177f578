"""
The server's own watch of a cluster, for tests of what is verified before signing.

`a_watch` runs one alone against the stand-in for an API server; `a_place` has it inside a
server, whose agents are the nodes of the clusters.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from issuer.k8s.cluster import ClusterWatch
from issuer.k8s.tables import Arrivals
from issuer.k8s.verify import PodVerifier
from spiffe_core.agent import AttestedAgent, agent_id
from spiffe_core.x509svid import X509Svid
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import access_of
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2, podsvid_pb2_grpc
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.callers import Holder, Running, a_running_server, eventually
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.psat import a_cluster, agent_pod, join, node_uid, settings_of
from tests.support.stack import a_folder
from tests.support.store import NOW, TD, some
from workload_api.keys import make_csr, make_key

WATCHES = 4
"""Of a server, for each cluster."""


@contextlib.asynccontextmanager
async def a_watch(
    cluster: FakeCluster, folder: Path, *, patience: float = 2.0, **changes: Any
) -> AsyncIterator[PodVerifier]:
    """A verifier of one cluster, that follows it; *changes* are to its settings."""
    settings = settings_of(cluster, folder, verify_pods=True, **changes)
    client = Client(access_of(settings.kubeconfig, "", {}))
    arrivals = Arrivals()
    watch = ClusterWatch(settings, client, arrivals)
    running = asyncio.create_task(watch.run())
    try:
        yield PodVerifier({watch.name: watch}, arrivals, patience=patience)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()


def an_agent_of(cluster: FakeCluster, node: str = "n1", /, **changes: Any) -> AttestedAgent:
    """The agent of a node, as k8s_psat attests it; *changes* to its selectors, by kind."""
    facts = {
        "cluster": cluster.name,
        "agent_ns": "spiffe",
        "agent_sa": "spiffe-agent",
        "agent_node_name": node,
        "agent_node_uid": node_uid(cluster, node),
        **changes,
    }
    made = AttestedAgent(
        agent_id(TD, "k8s_psat", cluster.name, node_uid(cluster, node)),
        "k8s_psat",
        "1001",
        NOW + timedelta(hours=1),
        some(*(f"k8s_psat:{kind}:{value}" for kind, value in facts.items() if value)),
    )
    return replace(made, can_reattest=True)


@dataclass
class Verified:
    """A server that verifies pods, its clusters, and the agents of their nodes."""

    running: Running
    clusters: Mapping[str, FakeCluster]

    @property
    def cluster(self) -> FakeCluster:
        """The first one."""
        return next(iter(self.clusters.values()))

    @property
    def pods(self) -> PodVerifier:
        """What the server verifies with."""
        return self.running.server.pods

    async def agent(self, node: str, cluster: FakeCluster | None = None) -> Holder:
        """The agent of a node."""
        cluster = cluster or self.cluster
        return await join(self.running, cluster, agent_pod(cluster, node))

    async def knows(self, *pods: Pod) -> None:
        """Return once the server knows *pods* as they are."""

        def known() -> bool:
            for pod in pods:
                found = self.pods.clusters[pod.cluster.name].pods.get(pod.uid)  # type: ignore[attr-defined]
                if found is None or dict(found.pod.labels) != pod.body["metadata"].get(
                    "labels", {}
                ):
                    return False
            return True

        await eventually(known)

    def metric(self, name: str, *labels: str) -> float:
        """The value of a counter."""
        return float(getattr(self.running.server.metrics, name).labels(*labels).value)

    async def issued(self) -> list[tuple[str, str, str]]:
        """Entry, caller and pod of each SVID on record that is of an entry."""
        rows = await self.running.server.store.read(lambda repos: repos.issued.page(0, 1000))
        return [(row.entry_id, row.caller, row.pod_uid) for _, row in rows if row.entry_id]


@contextlib.asynccontextmanager
async def a_place(*names: str, clock: Any = None, **changes: Any) -> AsyncIterator[Verified]:
    """A server in step with the clusters *names*, ``prod`` alone by default."""
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(a_folder())
        clusters = {}
        for name in names or ("prod",):
            clusters[name] = await stack.enter_async_context(a_cluster(name))
        known = tuple(
            settings_of(one, folder, **{"verify_pods": True, **changes})
            for one in clusters.values()
        )
        running = await stack.enter_async_context(a_running_server(clock, clusters=known))
        for one in known:
            if one.verify_pods:
                await clusters[one.name].settled(count=WATCHES)
        yield Verified(running, clusters)


def stub(node: Holder) -> Any:
    """Our own service of SVIDs, as *node* calls it."""
    return podsvid_pb2_grpc.PodSvidStub(node.calls.channel)


async def ask(node: Holder, *items: tuple[Any, Pod | str]) -> list[Any]:
    """The results of our BatchNewX509SVID for entries and pods, in the order of *items*."""
    found: dict[int, Any] = {}
    async for part in parts_of(node, *items):
        for result in part:
            assert result.number not in found
            found[result.number] = result
    return [found[number] for number in range(len(items))]


async def parts_of(node: Holder, *items: tuple[Any, Pod | str]) -> AsyncIterator[Sequence[Any]]:
    """The messages of the same, as they come."""
    request = podsvid_pb2.BatchNewX509SVIDRequest()
    for entry, pod in items:
        request.params.add(
            entry_id=entry if isinstance(entry, str) else entry.id,
            csr=make_csr(make_key()),
            pod_uid=pod if isinstance(pod, str) else pod.uid,
        )
    async for answer in stub(node).BatchNewX509SVID(request):
        yield list(answer.results)


async def ask_jwt(node: Holder, entry: Any, pod: Pod | str) -> Any:
    """The answer of our NewJWTSVID."""
    request = podsvid_pb2.NewJWTSVIDRequest(
        entry_id=entry.id, audience=["a"], pod_uid=pod if isinstance(pod, str) else pod.uid
    )
    return (await stub(node).NewJWTSVID(request)).svid


async def ask_as_spire(node: Holder, *entries: Any) -> list[Any]:
    """The results of SPIRE's BatchNewX509SVID, which knows no pods."""
    params = [
        svid_pb2.NewX509SVIDParams(entry_id=one.id, csr=make_csr(make_key())) for one in entries
    ]
    request = svid_pb2.BatchNewX509SVIDRequest(params=params)
    return list((await node.calls.svid.BatchNewX509SVID(request)).results)


async def ask_jwt_as_spire(node: Holder, entry: Any) -> Any:
    """The answer of SPIRE's NewJWTSVID."""
    request = svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=["a"])
    return (await node.calls.svid.NewJWTSVID(request)).svid


def svid_of(result: Any) -> X509Svid:
    """The SVID of a result that went well."""
    assert result.status.code == 0, result.status.message
    return X509Svid.from_chain(tuple(result.svid.cert_chain))
