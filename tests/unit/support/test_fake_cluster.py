"""
The stand-in for a Kubernetes API server: its switches do what they say.

Over 500 lines: the tables of one subject stay together.
"""

import asyncio
import json
import os
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpcore
import jwt
import pytest
import yaml

from tests.support.clock import DrivenClock
from tests.support.k8s.cluster import Container, FakeCluster, Owner
from tests.support.k8s.facts import take
from tests.support.k8s.files import project
from tests.support.k8s.pki import ClusterCa, Pair
from tests.support.k8s.resources import Resource

PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
USER = "system:serviceaccount:ops:client"


@dataclass
class Client:
    """A client of one service account, which may read pods."""

    cluster: FakeCluster
    pool: httpcore.AsyncConnectionPool
    headers: dict[str, str]

    async def get(self, path: str, **headers: str) -> httpcore.Response:
        """One answer."""
        url = path if "://" in path else self.cluster.url + path
        return await self.pool.request("GET", url, headers=self.headers | headers)

    async def status(self, path: str = "/api/v1/pods") -> int:
        """Only how it ended."""
        return (await self.get(path)).status

    @asynccontextmanager
    async def watch(self, query: str = "") -> AsyncIterator[AsyncIterator[Any]]:
        """The events of a watch of all pods."""
        url = f"{self.cluster.url}/api/v1/pods?watch=1{query}"
        async with self.pool.stream("GET", url, headers=self.headers) as answer:
            assert answer.status == 200

            async def events() -> AsyncIterator[Any]:
                held = b""
                async for chunk in answer.aiter_stream():
                    held += chunk
                    while b"\n" in held:
                        line, held = held.split(b"\n", 1)
                        yield json.loads(line)

            yield events()


@asynccontextmanager
async def a_client(cluster: FakeCluster, pair: Pair | None = None) -> AsyncIterator[Client]:
    """A client with a bearer token, or with a certificate."""
    context = ssl.create_default_context(cadata=cluster.ca.pem.decode())
    headers = {}
    if pair is None:
        headers["Authorization"] = f"Bearer {cluster.account_token('ops', 'client')}"
    else:
        pair.load_into(context)
    async with httpcore.AsyncConnectionPool(ssl_context=context) as pool:
        yield Client(cluster, pool, headers)


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    """A cluster with a driven clock, whose one client may read pods."""
    async with FakeCluster(clock=DrivenClock()) as made:
        made.grant(USER, PODS)
        yield made


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[Client]:
    """That client."""
    async with a_client(cluster) as made:
        yield made


# Faults.


@pytest.mark.parametrize("code", [500, 503, 504])
async def test_failure(cluster: FakeCluster, client: Client, code: int) -> None:
    """A failure is a Status of its code, as long as it is switched on."""
    with cluster.faults.fail(code):
        answer = await client.get("/api/v1/pods")
        assert (answer.status, json.loads(answer.content)["code"]) == (code, code)
    assert await client.status() == 200


async def test_too_many_requests(cluster: FakeCluster, client: Client) -> None:
    """429 is plain text with Retry-After, as priority and fairness says it."""
    cluster.faults.fail(429, times=1, retry_after=7)
    answer = await client.get("/api/v1/pods")
    assert (answer.status, dict(answer.headers)[b"Retry-After"]) == (429, b"7")
    assert answer.content == b"Too many requests, please try again later.\n"
    assert await client.status() == 200


async def test_faults_hit_what_they_match(cluster: FakeCluster, client: Client) -> None:
    """A fault of one verb and resource leaves others alone."""
    cluster.grant(USER, PODS | {"resources": ["nodes"]})
    cluster.faults.fail(500, verb="list", plural="pods")
    assert await client.status("/api/v1/nodes") == 200
    assert await client.status("/api/v1/pods") == 500
    cluster.faults.clear()
    assert await client.status("/api/v1/pods") == 200


async def test_a_hang_ends_with_its_fault(cluster: FakeCluster, client: Client) -> None:
    """Who hangs is answered rightly once the fault ends."""
    fault = cluster.faults.hang()
    asking = asyncio.create_task(client.status())
    await fault.hit.wait()
    assert not asking.done()
    fault.end()
    assert await asking == 200


async def test_a_delay(cluster: FakeCluster, client: Client) -> None:
    """A delayed answer comes late."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with cluster.faults.delay(0.1):
        assert await client.status() == 200
    assert loop.time() - begun >= 0.1


async def test_a_broken_answer(cluster: FakeCluster, client: Client) -> None:
    """The connection is reset before the answer, or ends within it."""
    cluster.faults.reset(times=1)
    with pytest.raises(httpcore.ReadError):
        await client.get("/api/v1/pods")
    cluster.faults.truncate(times=1)
    with pytest.raises(httpcore.RemoteProtocolError, match="without sending complete message"):
        await client.get("/api/v1/pods")
    assert await client.status() == 200


async def test_garbage(cluster: FakeCluster, client: Client) -> None:
    """Garbage is a 200 that is not JSON."""
    with cluster.faults.garbage(body=b"[" * 100):
        assert (await client.get("/api/v1/pods")).content == b"[" * 100
    with cluster.faults.garbage():
        answer = await client.get("/api/v1/pods")
    assert answer.status == 200
    with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)):
        json.loads(answer.content)


async def test_a_huge_answer(cluster: FakeCluster, client: Client) -> None:
    """A huge answer is as long as was asked for, and may be given up by the client."""
    with cluster.faults.huge(1 << 20):
        answer = await client.get("/api/v1/pods")
        assert len(answer.content) > 1 << 20
    with cluster.faults.huge(1 << 30):
        async with client.pool.stream(
            "GET", f"{cluster.url}/api/v1/pods", headers=client.headers
        ) as endless:
            await anext(endless.aiter_stream())
    assert await client.status() == 200


@pytest.mark.parametrize("kind", ["garbage", "truncate", "huge"])
async def test_a_broken_watch(cluster: FakeCluster, client: Client, kind: str) -> None:
    """A watch may begin with a line that is garbage, cut, or huge."""
    size = {"size": 1 << 20} if kind == "huge" else {}
    getattr(cluster.faults, kind)(verb="watch", times=1, **size)
    if kind == "truncate":
        with pytest.raises(httpcore.RemoteProtocolError):
            async with client.watch() as events:
                await anext(events)
        return
    async with client.watch() as events:
        if kind == "garbage":
            with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)):
                await anext(events)
        else:
            assert len((await anext(events))["object"]["metadata"]["name"]) == 1 << 20


async def test_stopped_and_started(cluster: FakeCluster, client: Client) -> None:
    """A stopped server refuses connections; it comes back on its port, with its objects."""
    pod = cluster.pod()
    assert await client.status() == 200
    before = cluster.url
    await cluster.stop()
    with pytest.raises(httpcore.ConnectError):
        await client.get("/api/v1/pods")
    cluster.relabel(pod, {"a": "b"})
    await cluster.start()
    assert cluster.url == before
    body = json.loads((await client.get("/api/v1/pods")).content)
    assert [one["metadata"]["labels"] for one in body["items"]] == [{"a": "b"}]


async def test_a_stop_does_not_wait(cluster: FakeCluster, client: Client) -> None:
    """A server that stops breaks off what hangs in it, at once."""
    fault = cluster.faults.hang()
    asking = asyncio.create_task(client.status())
    await fault.hit.wait()
    async with asyncio.timeout(5):
        await cluster.stop()
        with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadError)):
            await asking


async def test_a_deaf_server(cluster: FakeCluster, client: Client) -> None:
    """A deaf server takes connections and says nothing; it hears again when started."""
    await cluster.deafen()
    limits = {"timeout": {"connect": 0.1}}
    with pytest.raises(httpcore.ConnectTimeout):
        await client.pool.request("GET", cluster.url, extensions=limits)
    await cluster.start()
    assert await client.status() == 200


async def test_a_heartbeat(cluster: FakeCluster) -> None:
    """A node is renewed, and is the same node."""
    before = cluster.node("n1")
    cluster.heartbeat("n1")
    after = cluster.find("nodes", "n1")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]
    assert after["spec"] == before["spec"]


async def test_a_stop_breaks_watches(cluster: FakeCluster, client: Client) -> None:
    """A watch does not outlive the server."""
    with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadError)):
        async with client.watch() as events:
            await cluster.settled("pods")
            await cluster.stop()
            await anext(events)
    assert (cluster.watching, cluster.connections) == (0, 0)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("wrong-ca", "unable to get local issuer|self-signed|signature failure"),
        ("wrong-name", "IP address mismatch"),
        ("expired", "certificate has expired"),
    ],
)
async def test_a_wrong_certificate(cluster: FakeCluster, which: Any, message: str) -> None:
    """A certificate that no client should take is not taken; the right one comes back."""
    cluster.present(which)
    async with a_client(cluster) as client:
        with pytest.raises(httpcore.ConnectError, match=message):
            await client.get("/version")
        cluster.present("right")
        assert await client.status() == 200


# Watches.


async def test_watches_are_cut(cluster: FakeCluster, client: Client) -> None:
    """A watch breaks off in the midst, or ends well."""
    async with client.watch() as events:
        await cluster.settled("pods")
        assert cluster.cut_watches(broken=False) == 1
        assert [one async for one in events] == []
    with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadError)):
        async with client.watch() as events:
            await cluster.settled("pods")
            cluster.cut_watches()
            await anext(events)


async def test_held_watches(cluster: FakeCluster, client: Client) -> None:
    """A watch that lags tells all of it later, in order."""
    async with client.watch() as events:
        await cluster.settled("pods")
        cluster.hold_watches()
        pod = cluster.pod()
        cluster.delete_pod(pod)
        first = asyncio.create_task(take(events, 3))
        assert await client.status() == 200
        assert not first.done()
        cluster.release_watches()
        assert [one["type"] for one in await first] == ["ADDED", "MODIFIED", "DELETED"]


async def test_a_silent_watch(cluster: FakeCluster, client: Client) -> None:
    """A watch that died unnoticed misses what happens."""
    async with client.watch() as events:
        await cluster.settled("pods")
        cluster.silence()
        cluster.pod("missed")
        cluster.silence(False)
        cluster.pod("seen")
        [event] = await take(events, 1)
    assert event["object"]["metadata"]["name"] == "seen"


async def test_bookmarks_are_for_those_who_ask(cluster: FakeCluster, client: Client) -> None:
    """A bookmark comes at once when told to, and to who asked for bookmarks alone."""
    async with client.watch("&allowWatchBookmarks=true") as asked, client.watch() as other:
        await cluster.settled("pods", 2)
        cluster.bookmark()
        cluster.pod()
        assert (await anext(asked))["type"] == "BOOKMARK"
        assert (await anext(other))["type"] == "ADDED"


async def test_an_expired_watch(cluster: FakeCluster, client: Client) -> None:
    """An open watch may end with ERROR 410."""
    async with client.watch() as events:
        await cluster.settled("pods")
        cluster.expire_watches()
        [event] = [one async for one in events]
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


async def test_gone_as_status(cluster: FakeCluster, client: Client) -> None:
    """A watch of a compacted version may be refused outright, and a page of such a list is."""
    for name in ("a", "b"):
        cluster.pod(name)
    first = json.loads((await client.get("/api/v1/pods?limit=1")).content)
    cluster.compact()
    cluster.api.gone_as_status = True
    answer = await client.get("/api/v1/pods?watch=1&resourceVersion=1")
    assert answer.status == 410
    assert json.loads(answer.content)["reason"] == "Expired"
    more = first["metadata"]["continue"]
    answer = await client.get(f"/api/v1/pods?limit=1&continue={more}")
    assert answer.status == 410
    assert "continue parameter is too old" in json.loads(answer.content)["message"]


async def test_a_version_yet_to_come(cluster: FakeCluster, client: Client) -> None:
    """A list of a version that is not reached times out."""
    answer = await client.get("/api/v1/pods?resourceVersion=99999999")
    assert answer.status == 504
    assert "Too large resource version" in json.loads(answer.content)["message"]


async def test_an_old_version_exactly(cluster: FakeCluster, client: Client) -> None:
    """A list may be asked for as it was."""
    pod = cluster.pod(labels={"a": "1"})
    version = cluster.store.version
    cluster.relabel(pod, {"a": "2"})
    cluster.pod("web-2")
    query = f"resourceVersion={version}&resourceVersionMatch=Exact"
    body = json.loads((await client.get(f"/api/v1/pods?{query}")).content)
    assert [one["metadata"]["labels"] for one in body["items"]] == [{"a": "1"}]


async def test_long_lists_are_compressed(cluster: FakeCluster, client: Client) -> None:
    """A long list is compressed for who reads that, and for nobody else."""
    cluster.pod(annotations={"note": "x" * 200_000})
    plain = await client.get("/api/v1/pods")
    packed = await client.get("/api/v1/pods", **{"Accept-Encoding": "gzip"})
    assert b"Content-Encoding" not in dict(plain.headers)
    assert dict(packed.headers)[b"Content-Encoding"] == b"gzip"
    assert len(packed.content) < len(plain.content) / 10


# Who asks.


async def test_client_certificates(cluster: FakeCluster) -> None:
    """A certificate's common name is the user, its organisations are groups."""
    cluster.grant("group:readers", PODS)
    for user, groups, status in (
        ("jane", ["readers"], 200),
        ("jane", [], 403),
        ("root", ["system:masters"], 200),
    ):
        async with a_client(cluster, cluster.client_certificate(user, *groups)) as client:
            assert await client.status() == status
    assert cluster.calls.of(user="jane", status=403)[0].grant == ("list", "", "pods")


async def test_nobody(cluster: FakeCluster) -> None:
    """With anonymous requests allowed, who brings nothing sees the version, and no pods."""
    context = ssl.create_default_context(cadata=cluster.ca.pem.decode())
    async with httpcore.AsyncConnectionPool(ssl_context=context) as pool:
        client = Client(cluster, pool, {})
        assert await client.status("/version") == 401
        cluster.api.anonymous = True
        assert await client.status("/version") == 200
        answer = await client.get("/api/v1/pods")
    message = json.loads(answer.content)["message"]
    assert message.startswith('pods is forbidden: User "system:anonymous" cannot list')


async def test_a_strangers_certificate(cluster: FakeCluster) -> None:
    """A certificate of another CA opens nothing."""
    async with a_client(cluster, ClusterCa().client("root", ["system:masters"])) as client:
        with pytest.raises((httpcore.ReadError, httpcore.RemoteProtocolError, ssl.SSLError)):
            await client.get("/version")


async def test_a_person_without_audience(cluster: FakeCluster) -> None:
    """A person's token is valid for the API server, and so for no other audience."""
    token = cluster.static_token("jane", "readers")
    status = cluster.tokens.review(token, ())
    assert status["user"]["username"] == "jane"
    assert status["audiences"] == list(cluster.tokens.audiences)
    assert "authenticated" not in cluster.tokens.review(token, ("spire-server",))


async def test_missing_roles_are_named(cluster: FakeCluster, client: Client) -> None:
    """A binding to a role that is not there is named in the refusal."""
    ref = {"kind": "ClusterRole", "name": "nix"}
    subject = {"kind": "User", "name": USER}
    meta = {"name": "broken"}
    kind = "ClusterRoleBinding"
    cluster.apply({"kind": kind, "metadata": meta, "roleRef": ref, "subjects": [subject]})
    message = json.loads((await client.get("/api/v1/nodes")).content)["message"]
    assert message.endswith('RBAC: clusterrole.rbac.authorization.k8s.io "nix" not found')


# The record.


async def test_calls_are_on_record(cluster: FakeCluster, client: Client) -> None:
    """What was asked is on record: user, verb, resource, outcome; a watch as it begins."""
    cluster.calls.clear()
    await client.get("/api/v1/namespaces/shop/pods")
    await client.get("/api/v1/nodes/n1")
    async with client.watch():
        await cluster.settled("pods")
        assert cluster.calls.count(verb="watch", plural="pods", status=200) == 1
    assert cluster.calls.grants(USER) == {
        ("list", "", "pods"),
        ("get", "", "nodes"),
        ("watch", "", "pods"),
    }
    assert cluster.calls.of(verb="list")[0].namespace == "shop"
    assert cluster.calls.of(verb="get")[0].status == 403


async def test_a_call_without_an_answer(cluster: FakeCluster, client: Client) -> None:
    """Who gives up before the answer is on record too."""
    fault = cluster.faults.hang()
    asking = asyncio.create_task(client.status())
    await fault.hit.wait()
    cluster.calls.clear()
    asking.cancel()
    await asyncio.wait([asking])
    async with asyncio.timeout(5):
        while not cluster.calls.made:
            await asyncio.sleep(0.005)
    assert cluster.calls.made[0].status == 0


# Objects.


async def test_a_pod_is_as_a_kubelet_reports_it(cluster: FakeCluster) -> None:
    """A pod's containers run under their ids; those that have ended keep theirs."""
    first = Container("setup", "busybox", kind="initContainers")
    pod = cluster.pod(containers=[first, "app", Container("late", waits=True)])
    status = pod.body["status"]
    assert status["phase"] == "Running"
    app, late = status["containerStatuses"]
    assert app["containerID"] == f"containerd://{pod.container_id()}"
    assert len(pod.container_id()) == 64
    assert "containerID" not in late
    assert late["state"]["waiting"]["reason"] == "ContainerCreating"
    ended = pod.container_id("setup")
    cluster.stop_container(pod, "setup")
    [setup] = pod.body["status"]["initContainerStatuses"]
    assert setup["state"]["terminated"]["containerID"] == f"containerd://{ended}"
    assert setup["image"] == "docker.io/library/busybox:latest"
    assert pod.cgroup() == f"/kubepods/besteffort/pod{pod.uid}/{pod.container_id()}"


async def test_a_container_starts_again(cluster: FakeCluster) -> None:
    """A container that starts again has a new id, and remembers its last end."""
    pod = cluster.pod()
    before = pod.container_id()
    fresh = cluster.start_container(pod)
    [status] = pod.body["status"]["containerStatuses"]
    assert pod.container_id() == fresh != before
    assert status["restartCount"] == 1
    assert status["lastState"]["terminated"]["containerID"] == f"containerd://{before}"


async def test_a_pod_gets_its_node_later(cluster: FakeCluster) -> None:
    """A pod that waits for the scheduler enters its node's selector when it is placed."""
    async with a_client(cluster) as client:
        async with client.watch("&fieldSelector=spec.nodeName%3Dn7") as events:
            await cluster.settled("pods")
            pod = cluster.pod(node="")
            assert pod.body["status"]["phase"] == "Pending"
            cluster.node("n7")
            cluster.schedule(pod, "n7")
            identifier = cluster.start_container(pod)
            added, started = await take(events, 2)
    assert (added["type"], started["type"]) == ("ADDED", "MODIFIED")
    [status] = started["object"]["status"]["containerStatuses"]
    assert status["containerID"] == f"containerd://{identifier}"
    assert pod.node == "n7"


async def test_a_pod_leaves(cluster: FakeCluster, client: Client) -> None:
    """A pod that is deleted with grace is seen to be leaving before it is gone."""
    pod = cluster.pod()
    version = cluster.store.version
    async with client.watch(f"&resourceVersion={version}") as events:
        cluster.delete_pod(pod, graceful=True)
        found = await take(events, 4)
    seen = [
        (one["type"], one["object"]["metadata"]["deletionGracePeriodSeconds"]) for one in found
    ]
    assert seen == [("MODIFIED", 30), ("MODIFIED", 30), ("MODIFIED", 0), ("DELETED", 0)]
    [runs], [ended] = (one["object"]["status"]["containerStatuses"] for one in found[:2])
    assert "running" in runs["state"]
    assert ended["state"]["terminated"]["containerID"] == runs["containerID"]


async def test_a_pod_made_anew(cluster: FakeCluster) -> None:
    """A pod made anew has name, account, node, labels and owner of before: not UID nor ids."""
    pod = cluster.pod(labels={"a": "b"}, owner=Owner("StatefulSet", "web"))
    again = cluster.recreate_pod(pod)
    assert again.uid != pod.uid
    assert again.container_id() != pod.container_id()
    for field in ("labels", "ownerReferences", "name"):
        assert again.body["metadata"][field] == pod.body["metadata"][field]
    assert (again.node, again.account) == (pod.node, pod.account)
    with pytest.raises(KeyError, match="is gone"):
        cluster.relabel(pod, {})


async def test_an_ephemeral_container(cluster: FakeCluster) -> None:
    """A container may join a pod that runs."""
    pod = cluster.pod()
    debug = Container("debug", "busybox", kind="ephemeralContainers")
    identifier = cluster.add_container(pod, debug)
    [status] = pod.body["status"]["ephemeralContainerStatuses"]
    assert status["containerID"].endswith(identifier)


async def test_an_account_made_anew(cluster: FakeCluster) -> None:
    """An account, node or namespace made anew has another UID."""
    for plural, name, namespace in (("nodes", "n1", ""), ("serviceaccounts", "web", "shop")):
        cluster.pod(f"for-{name}")
        before = cluster.find(plural, name, namespace)["metadata"]["uid"]
        assert cluster.recreate(plural, name, namespace)["metadata"]["uid"] != before


async def test_one_more_kind(cluster: FakeCluster, client: Client) -> None:
    """A custom resource is served like the others."""
    kind = Resource("things", "Thing", group="x.example")
    cluster.serve(kind)
    cluster.grant(USER, {"apiGroups": ["x.example"], "resources": ["*"], "verbs": ["list"]})
    cluster.apply({"kind": "Thing", "metadata": {"name": "one", "namespace": "default"}})
    body = json.loads((await client.get("/apis/x.example/v1/things")).content)
    assert (body["kind"], body["apiVersion"]) == ("ThingList", "x.example/v1")
    assert len(body["items"]) == 1


# Tokens.


async def test_tokens_end(cluster: FakeCluster) -> None:
    """A token ends a minute after its time, when no success is remembered."""
    token = cluster.projected_token(cluster.pod(), lifetime=timedelta(minutes=10))
    assert isinstance(cluster.clock, DrivenClock)
    cluster.clock.advance(timedelta(minutes=10, seconds=50))
    assert cluster.tokens.review(token, ("spire-server",))["authenticated"]
    cluster.clock.advance(timedelta(seconds=11))
    status = cluster.tokens.review(token, ("spire-server",))
    assert status["error"] == "[invalid bearer token, Token has expired]"


async def test_tokens_of_later_versions() -> None:
    """From 1.30 a bound token names its node and itself, and its review does."""
    async with FakeCluster(version="v1.32.4", algorithm="ES256") as cluster:
        pod = cluster.pod()
        token = cluster.projected_token(pod)
        claims = jwt.decode(token, options={"verify_signature": False})
        node = cluster.find("nodes", "n1")["metadata"]
        assert claims["kubernetes.io"]["node"] == {"name": "n1", "uid": node["uid"]}
        extra = cluster.tokens.review(token, ("spire-server",))["user"]["extra"]
        assert extra == {
            "authentication.kubernetes.io/credential-id": [f"JTI={claims['jti']}"],
            "authentication.kubernetes.io/node-name": ["n1"],
            "authentication.kubernetes.io/node-uid": [node["uid"]],
            "authentication.kubernetes.io/pod-name": [pod.name],
            "authentication.kubernetes.io/pod-uid": [pod.uid],
        }


async def test_a_review_may_say_anything(cluster: FakeCluster) -> None:
    """A test may change what a review answers, such as leave the audiences out."""
    token = cluster.projected_token(cluster.pod())
    cluster.api.reviewing = lambda spec, status: {**status, "audiences": spec["audiences"][:0]}
    pair = cluster.client_certificate("root", "system:masters")
    spec = {"token": token, "audiences": ["spire-server"]}
    async with a_client(cluster, pair) as client:
        answer = await client.pool.request(
            "POST",
            f"{cluster.url}/apis/authentication.k8s.io/v1/tokenreviews",
            headers={"Content-Type": "application/json"},
            content=json.dumps({"spec": spec}).encode(),
        )
    status = json.loads(answer.content)["status"]
    assert (status["authenticated"], status["audiences"]) == (True, [])


async def test_a_body_that_is_too_large(cluster: FakeCluster) -> None:
    """A request that is too large is refused as such, and on record."""
    pair = cluster.client_certificate("root", "system:masters")
    async with a_client(cluster, pair) as client:
        answer = await client.pool.request(
            "POST",
            f"{cluster.url}/apis/authentication.k8s.io/v1/tokenreviews",
            headers={"Content-Type": "application/json"},
            content=b" " * (1 << 21),
        )
    assert answer.status == 413
    assert cluster.calls.count(verb="create", status=413) == 1


async def test_claims_may_be_wrong(cluster: FakeCluster) -> None:
    """A test may have any claims signed."""
    token = cluster.projected_token(cluster.pod(), sub="other")
    assert jwt.decode(token, options={"verify_signature": False})["sub"] == "other"


# Files.


async def test_kubeconfigs(cluster: FakeCluster, tmp_path: Path) -> None:
    """A kubeconfig is private, and whole or with its files beside it."""
    whole = yaml.safe_load(cluster.kubeconfig(tmp_path).read_text())
    assert whole["clusters"][0]["cluster"]["server"] == cluster.url
    assert "client-key-data" in whole["users"][0]["user"]
    path = cluster.kubeconfig(tmp_path, name="files", inline=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    user = yaml.safe_load(path.read_text())["users"][0]["user"]
    assert (path.parent / user["client-certificate"]).read_bytes().startswith(b"-----BEGIN")
    assert stat.S_IMODE((path.parent / user["client-key"]).stat().st_mode) == 0o600
    token = yaml.safe_load(cluster.kubeconfig(tmp_path, token="t").read_text())
    assert token["users"][0]["user"] == {"token": "t"}


async def test_what_a_pod_finds(cluster: FakeCluster, tmp_path: Path) -> None:
    """A pod finds token, CA and namespace in files, and the address in its environment."""
    environment = cluster.in_cluster(tmp_path / "sa", "the-token", "ops")
    assert (tmp_path / "sa/token").read_text() == "the-token"
    assert (tmp_path / "sa/namespace").read_text() == "ops"
    assert (tmp_path / "sa/ca.crt").read_bytes() == cluster.ca.pem
    host, port = environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"]
    assert cluster.url == f"https://{host}:{port}"


def test_projected_volumes(tmp_path: Path) -> None:
    """A projected volume changes in one step, through a link, and leaves nothing behind."""
    project(tmp_path, {"token": "one"})
    opened = (tmp_path / "token").open()
    project(tmp_path, {"token": "two"})
    assert (tmp_path / "token").read_text() == "two"
    assert os.readlink(tmp_path / "token") == "..data/token"
    assert opened.read() == "one"
    opened.close()
    assert len(list(tmp_path.iterdir())) == 3
