"""
Our client against an API server: the stand-in always, a real one when KUBECONFIG names it.

What the stand-in says is recorded in `test_kubernetes_facts`; here is what we make of it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from issuer.attestation.k8s_psat import ClusterAccess, K8sPsatAttestor
from issuer.attestation.protocol import AttestedNode
from issuer.config import Cluster
from spiffe_core.errors import ForbiddenError
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.strictjson import dumps
from spiffe_wire.k8s.client import Client, ClusterError, MissingError
from spiffe_wire.k8s.credentials import Source
from spiffe_wire.k8s.objects import Pod, meta_of, pod_of
from spiffe_wire.k8s.watch import Kind, Watch
from tests.support.anycluster import ACCOUNT, MERGE, AnyCluster, any_cluster
from tests.support.k8s.cluster import FakeCluster
from tests.support.k8s.pki import ClusterCa

PATIENCE = 20
SILENCE = timedelta(seconds=PATIENCE)


@pytest.fixture(params=["stand-in", "real"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyCluster]:
    """One of the two, with a namespace for this test."""
    if request.param == "real":
        if not os.environ.get("KUBECONFIG"):
            pytest.skip("KUBECONFIG is not set: no real cluster to compare with")
        async with any_cluster(Path(os.environ["KUBECONFIG"])) as made:
            yield made
        return
    async with FakeCluster() as fake:
        fake.node("n1")
        async with any_cluster(fake.kubeconfig(tmp_path)) as made:
            yield made


@asynccontextmanager
async def using(client: Client) -> AsyncIterator[Client]:
    """Close it at the end."""
    try:
        yield client
    finally:
        await client.close()


@dataclass
class Seen:
    """A sink that keeps one namespace's pods, and lets a test wait for what it wants to see."""

    namespace: str
    pods: dict[str, Pod] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def replace(self, objects: Iterable[Pod]) -> None:
        """See `Sink`."""
        self.pods = {one.name: one for one in objects if one.namespace == self.namespace}
        self.news.set()

    def put(self, found: Pod) -> None:
        """See `Sink`."""
        if found.namespace == self.namespace:
            self.pods[found.name] = found
            self.news.set()

    def drop(self, found: Pod) -> None:
        """See `Sink`."""
        if found.namespace == self.namespace:
            self.dropped.append(found.uid)
            if self.pods[found.name].uid == found.uid:
                del self.pods[found.name]
            self.news.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(PATIENCE):
            while not is_so():
                self.news.clear()
                await self.news.wait()


async def test_a_watch_brings_what_happens(cluster: AnyCluster) -> None:
    """What is there is listed; what is made, relabelled, deleted and made anew is brought."""
    first = await cluster.make_pod("first", app="web")
    seen = Seen(cluster.namespace)
    kind = Kind("/api/v1/pods", pod_of, f"spec.nodeName={cluster.node}")
    async with using(cluster.client()) as client:
        watch = Watch(client, kind, seen, cluster="main")
        running = asyncio.create_task(watch.run())
        try:
            await seen.until(lambda: "first" in seen.pods)
            found = seen.pods["first"]
            assert found.uid == first["metadata"]["uid"]
            assert (found.service_account, found.node_name) == (ACCOUNT, cluster.node)
            assert dict(found.labels) == {"app": "web"}

            await cluster.make_pod("second", app="db")
            await seen.until(lambda: "second" in seen.pods)
            await cluster.relabel("first", app=None, tier="edge")
            await seen.until(lambda: dict(seen.pods["first"].labels) == {"tier": "edge"})
            await cluster.delete_pod("first")
            await seen.until(lambda: found.uid in seen.dropped)
            again = await cluster.make_pod("first")
            await seen.until(lambda: "first" in seen.pods)
            assert seen.pods["first"].uid == again["metadata"]["uid"] != found.uid
            assert watch.problem == "" and watch.away_since is None
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_metadata_alone_is_sent_when_that_is_asked_for(cluster: AnyCluster) -> None:
    """Lists, objects and watches of namespaces and accounts come without spec and status."""
    async with using(cluster.client()) as client:
        page = await client.page("/api/v1/namespaces", metadata_only=True)
        assert page["kind"] == "PartialObjectMetadataList"
        assert not any({"spec", "status"} & set(one) for one in page["items"])
        assert cluster.namespace in [meta_of(one).name for one in page["items"]]
        one = await client.get(f"/api/v1/nodes/{cluster.node}", metadata_only=True)
        assert one["kind"] == "PartialObjectMetadata"
        assert meta_of(one).name == cluster.node
        path = cluster.path("serviceaccounts")
        version = (await client.page(path))["metadata"]["resourceVersion"]
        params = {"watch": "1", "resourceVersion": version, "timeoutSeconds": "20"}
        async with client.watch(path, params, silence=SILENCE, metadata_only=True) as events:
            labels = {"metadata": {"labels": {"a": "b"}}}
            await cluster.call("PATCH", f"{path}/{ACCOUNT}", labels, MERGE)
            async with asyncio.timeout(PATIENCE):
                async for event in events:
                    found = meta_of(event["object"])
                    if (found.name, found.labels.get("a")) == (ACCOUNT, "b"):
                        break
        assert event["object"]["kind"] == "PartialObjectMetadata"


async def test_a_list_comes_in_pages(cluster: AnyCluster) -> None:
    """A page names where the next begins, and together they hold every object once."""
    names = {(await cluster.make_pod(f"p{number}"))["metadata"]["name"] for number in range(5)}
    async with using(cluster.client()) as client:
        found: list[str] = []
        params = {"limit": "2"}
        while True:
            page = await client.page(cluster.path("pods"), params)
            assert len(page["items"]) <= 2
            found += [pod_of(one).name for one in page["items"]]
            if not page["metadata"].get("continue"):
                break
            params["continue"] = page["metadata"]["continue"]
    assert sorted(found) == sorted(names)


async def test_a_page_that_nobody_promised_is_an_error(cluster: AnyCluster) -> None:
    """A continue token that the server has not made gets no page, and no first page either."""
    async with using(cluster.client()) as client:
        with pytest.raises(ClusterError):
            await client.page("/api/v1/pods", {"limit": "1", "continue": "no token"})


async def test_errors_say_what_to_do(cluster: AnyCluster) -> None:
    """401, 403 and 404 are told apart, and name the token, RBAC and the object."""
    async with using(cluster.client("no.such.token")) as client:
        with pytest.raises(ClusterError, match="is the token good") as caught:
            await client.page("/api/v1/pods")
        assert caught.value.status == 401
    async with using(cluster.client(await cluster.token())) as client:
        with pytest.raises(ClusterError, match=r'"system:serviceaccount:.*RBAC') as caught:
            await client.page("/api/v1/nodes")
        assert caught.value.status == 403
    async with using(cluster.client()) as client:
        with pytest.raises(MissingError, match='pods "nobody" not found'):
            await client.get(cluster.path("pods", "nobody"))


async def test_sec_34_an_api_server_is_known_by_its_ca(cluster: AnyCluster) -> None:
    """SEC-34: with another CA, or under another name, nothing is said to it."""
    other = Source(data=ClusterCa("other").pem)
    for access in (
        replace(cluster.access, authorities=other),
        replace(cluster.access, server_name="another.example"),
    ):
        async with using(Client(access)) as client:
            with pytest.raises(ClusterError, match="is not who it should be"):
                await client.get("/version")


def attestor(cluster: AnyCluster, client: Client, **changes: Any) -> K8sPsatAttestor:
    """An attestor that lets the test's account in."""
    given = {
        "name": "main",
        "service_account_allow_list": (f"{cluster.namespace}:{ACCOUNT}",),
    } | changes
    access = ClusterAccess(Cluster(**given), client)
    return K8sPsatAttestor(TrustDomain("example.org"), {"main": access})


async def attested(attestor: K8sPsatAttestor, token: str) -> AttestedNode:
    """What a server finds when an agent sends *token*."""

    async def no_challenge(challenge: bytes) -> bytes:
        raise AssertionError("a token is not challenged")

    payload = dumps({"cluster": "main", "token": token})
    return await attestor.attest(payload, public_key=b"", challenge=no_challenge)


async def test_sec_53_a_projected_token_proves_its_node(cluster: AnyCluster) -> None:
    """SEC-53: the token of a pod yields its node's UID, and its pod's facts as selectors."""
    pod = await cluster.make_pod("agent")
    token = await cluster.token("spire-server", pod)
    async with using(cluster.client()) as client:
        node = meta_of(await client.get(f"/api/v1/nodes/{cluster.node}"))
        found = await attested(attestor(cluster, client), token)
    assert str(found.agent_id) == f"spiffe://example.org/spire/agent/k8s_psat/main/{node.uid}"
    values = {one.value for one in found.selectors}
    assert {
        "cluster:main",
        f"agent_ns:{cluster.namespace}",
        f"agent_sa:{ACCOUNT}",
        "agent_pod_name:agent",
        f"agent_pod_uid:{pod['metadata']['uid']}",
        f"agent_node_name:{node.name}",
        f"agent_node_uid:{node.uid}",
    } <= values


async def test_sec_53_tokens_that_prove_nothing_are_refused(cluster: AnyCluster) -> None:
    """SEC-53: for another audience, for no pod, by an account not allowed, or tampered with."""
    pod = await cluster.make_pod("agent")
    good = await cluster.token("spire-server", pod)
    head, body, signature = good.split(".")
    async with using(cluster.client()) as client:
        ours = attestor(cluster, client)
        for token in (
            await cluster.token("", pod),
            await cluster.token("elsewhere", pod),
            f"{head}.{body}.{signature[:-8]}AAAAAAAA",
        ):
            with pytest.raises(ForbiddenError, match="token not authenticated"):
                await attested(ours, token)
        with pytest.raises(Exception, match="the token is for no pod"):
            await attested(ours, await cluster.token("spire-server"))
        nobody = attestor(cluster, client, service_account_allow_list=())
        with pytest.raises(ForbiddenError, match="not an allowed service account"):
            await attested(nobody, good)
        assert await attested(ours, good)


async def test_sec_53_a_deleted_pod_proves_nothing_at_once(cluster: AnyCluster) -> None:
    """SEC-53: a review that remembers a token for ten seconds does not let a dead pod in."""
    pod = await cluster.make_pod("agent")
    token = await cluster.token("spire-server", pod)
    async with using(cluster.client()) as client:
        ours = attestor(cluster, client)
        assert await attested(ours, token)
        await cluster.delete_pod("agent")
        with pytest.raises(ForbiddenError, match="gone"):
            await attested(ours, token)
        await cluster.make_pod("agent")
        with pytest.raises(ForbiddenError, match="replaced"):
            await attested(ours, token)
