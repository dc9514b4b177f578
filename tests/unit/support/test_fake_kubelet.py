"""The stand-in for a kubelet answers as the real one was recorded to."""

import json
import ssl
from collections.abc import AsyncIterator

import httpcore
import pytest

from tests.support.clock import DrivenClock
from tests.support.k8s.cluster import FakeCluster
from tests.support.k8s.kubelet import FakeKubelet
from tests.support.k8s.pki import ClusterCa, Pair

USER = "system:serviceaccount:ops:client"
PROXY = {"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]}


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    """A cluster of two nodes with a pod each, and an account that may ask kubelets."""
    async with FakeCluster(clock=DrivenClock()) as made:
        made.pod("one", node="n1")
        made.pod("two", node="n2")
        made.grant(USER, PROXY)
        yield made


async def asked(
    kubelet: FakeKubelet,
    ca: ClusterCa,
    token: str = "",
    pair: Pair | None = None,
    path: str = "/pods",
) -> httpcore.Response:
    """One answer of a kubelet."""
    context = ssl.create_default_context(cadata=ca.pem.decode())
    if pair is not None:
        pair.load_into(context)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpcore.AsyncConnectionPool(ssl_context=context) as pool:
        return await pool.request("GET", kubelet.url + path, headers=headers)


async def test_the_pods_of_its_node(cluster: FakeCluster) -> None:
    """A kubelet lists the pods of its node, without their kind."""
    kubelet = await cluster.kubelet("n1")
    answer = await asked(kubelet, cluster.ca, cluster.account_token("ops", "client"))
    body = json.loads(answer.content)
    assert (answer.status, body["kind"]) == (200, "PodList")
    assert [one["metadata"]["name"] for one in body["items"]] == ["one"]
    assert "kind" not in body["items"][0]
    assert kubelet.calls.count(user=USER, status=200) == 1
    assert kubelet.calls.grants() == {("get", "", "nodes/proxy")}


async def test_nobody_and_a_token_for_others(cluster: FakeCluster) -> None:
    """Without a credential that holds: 401, in plain text."""
    kubelet = await cluster.kubelet("n1")
    other = cluster.account_token("ops", "client", "spire-server")
    for token in ("", "garbage", other):
        answer = await asked(kubelet, cluster.ca, token)
        assert (answer.status, answer.content) == (401, b"Unauthorized")


@pytest.mark.parametrize(
    ("version", "where"),
    [("v1.20.2", "subresource=proxy"), ("v1.32.4", "subresource(s)=[proxy]")],
)
async def test_no_permission(version: str, where: str) -> None:
    """Without permission: 403, in plain text that names what lacks."""
    async with FakeCluster(version=version) as cluster:
        kubelet = await cluster.kubelet("n1")
        answer = await asked(kubelet, cluster.ca, cluster.account_token("ops", "weak"))
    user = "system:serviceaccount:ops:weak"
    text = f"Forbidden (user={user}, verb=get, resource=nodes, {where})"
    assert (answer.status, answer.content.decode()) == (403, text)


async def test_permission_for_one_node(cluster: FakeCluster) -> None:
    """Permission may be for one node by its name."""
    user = "system:serviceaccount:ops:one"
    cluster.grant(user, PROXY | {"resourceNames": ["n2"]})
    token = cluster.account_token("ops", "one")
    for node, status in (("n1", 403), ("n2", 200)):
        answer = await asked(await cluster.kubelet(node), cluster.ca, token)
        assert answer.status == status


async def test_a_client_certificate(cluster: FakeCluster) -> None:
    """A client certificate of the cluster's CA is a credential too."""
    kubelet = await cluster.kubelet("n1")
    pair = cluster.client_certificate("admin", "system:masters")
    assert (await asked(kubelet, cluster.ca, pair=pair)).status == 200


async def test_its_own_certificate(cluster: FakeCluster) -> None:
    """A kubelet may show a certificate of another CA, or for another name."""
    own = ClusterCa("n1-ca@1700000000")
    kubelet = await cluster.kubelet("n1", ca=own)
    token = cluster.account_token("ops", "client")
    assert (await asked(kubelet, own, token)).status == 200
    with pytest.raises(httpcore.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await asked(kubelet, cluster.ca, token)
    kubelet.present(cluster.ca.serving(["n9"], "system:node:n9"))
    with pytest.raises(httpcore.ConnectError, match="IP address mismatch"):
        await asked(kubelet, cluster.ca, token)


async def test_the_port_is_known(cluster: FakeCluster) -> None:
    """The node object names its kubelet's port."""
    kubelet = await cluster.kubelet("n1")
    status = cluster.find("nodes", "n1")["status"]
    assert status["daemonEndpoints"]["kubeletEndpoint"]["Port"] == kubelet.port


async def test_the_list_lags(cluster: FakeCluster) -> None:
    """A frozen kubelet answers with what was, until it thaws."""
    kubelet = await cluster.kubelet("n1")
    token = cluster.account_token("ops", "client")
    kubelet.freeze()
    cluster.pod("late", node="n1")
    for expected in (["one"], ["late", "one"]):
        answer = await asked(kubelet, cluster.ca, token)
        items = json.loads(answer.content)["items"]
        assert [one["metadata"]["name"] for one in items] == expected
        kubelet.thaw()


async def test_a_static_pod(cluster: FakeCluster) -> None:
    """A static pod has another UID at its kubelet, and in cgroups, than at the API server."""
    kubelet = await cluster.kubelet("n1")
    pod = cluster.pod("etcd-n1", "kube-system", "default", "n1", static=True)
    answer = await asked(kubelet, cluster.ca, cluster.account_token("ops", "client"))
    shown = {
        one["metadata"]["name"]: one["metadata"] for one in json.loads(answer.content)["items"]
    }
    mirrored = pod.body["metadata"]["annotations"]["kubernetes.io/config.mirror"]
    assert shown["etcd-n1"]["uid"] == mirrored != pod.uid
    assert len(mirrored) == 32


async def test_stopped_and_faulty(cluster: FakeCluster) -> None:
    """A kubelet has faults of its own, stops, and comes back on its port."""
    kubelet = await cluster.kubelet("n1")
    token = cluster.account_token("ops", "client")
    with kubelet.faults.fail(500):
        assert (await asked(kubelet, cluster.ca, token)).status == 500
    with kubelet.faults.garbage():
        assert (await asked(kubelet, cluster.ca, token)).content[:1] == b"\0"
    await kubelet.stop()
    with pytest.raises(httpcore.ConnectError):
        await asked(kubelet, cluster.ca, token)
    await kubelet.start()
    assert (await asked(kubelet, cluster.ca, token)).status == 200
    assert (await asked(kubelet, cluster.ca, token, path="/nix")).status == 404
