"""
Pods are verified before anything is signed, through a real server (architecture A5).

Agents are nodes of a cluster whose API server is the stand-in of the tests; they speak gRPC.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from issuer.config import WithoutPod
from spiffe_core.jwtsvid import JwtSvid
from spiffe_wire.k8s.rbac import SERVER_RULES
from spiffe_wire.pb.spiffe_issuer.v1 import podsvid_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from tests.support.callers import (
    Code,
    Holder,
    a_running_server,
    below,
    codes,
    eventually,
    id_message,
    refused,
)
from tests.support.k8s.cluster import Pod
from tests.support.psat import SERVER_USER, a_cluster, agent_pod, join, settings_of
from tests.support.stack import a_folder
from tests.support.verifying import (
    Verified,
    a_place,
    ask,
    ask_as_spire,
    ask_jwt,
    ask_jwt_as_spire,
    parts_of,
    stub,
    svid_of,
)
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")
WEB = ("k8s:ns:shop", "k8s:sa:web")
UNKNOWN = "11111111-1111-1111-1111-111111111111"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Verified]:
    """A server for the module; tests keep to nodes and namespaces of their own."""
    async with a_place() as made:
        short(made, 1.0)
        yield made


async def an_entry(
    place: Verified, node: Holder, path: str, *selectors: str, **how: Any
) -> Any:
    """An entry below an agent."""
    (made,) = await place.running.add(below(node, path, *(selectors or WEB), **how))
    return made


async def a_pod(place: Verified, name: str, *where: str, **how: Any) -> Pod:
    """A pod that the server knows."""
    pod = place.cluster.pod(name, *where, **how)
    await place.knows(pod)
    return pod


# By name of the pod


async def test_sec_21_signed_for_a_pod_of_the_node(place: Verified) -> None:
    """SEC-21, SEC-24: X509- and JWT-SVID are the entry's, and the pod stands on record."""
    node = await place.agent("a1")
    pod = await a_pod(place, "a-web", node="a1")
    entry = await an_entry(place, node, "/a/web")
    before = place.metric("pod_checks", "prod", "verified")
    (result,) = await ask(node, (entry, pod))
    assert svid_of(result).spiffe_id.path == "/a/web"
    answer = await ask_jwt(node, entry, pod)
    assert JwtSvid.parse_unverified(answer.token).spiffe_id.path == "/a/web"
    assert answer.id == id_message("/a/web")
    rows = [row for row in await place.issued() if row[0] == entry.id]
    assert rows == [(entry.id, node.id.uri, pod.uid)] * 2
    assert place.metric("pod_checks", "prod", "verified") == before + 2


async def test_sec_21_a_batch_of_good_and_bad(place: Verified) -> None:
    """SEC-21: each item is decided for itself, in the order it was asked for."""
    node = await place.agent("b1")
    await place.agent("b2")
    here = await a_pod(place, "b-web", node="b1", labels={"app": "web"})
    there = await a_pod(place, "b-there", node="b2")
    other = await a_pod(place, "b-bill", "b-billing", "bill", "b1")
    web = await an_entry(place, node, "/b/web")
    bill = await an_entry(place, node, "/b/bill", "k8s:ns:b-billing", "k8s:sa:bill")
    plain = await an_entry(place, node, "/b/plain", "unix:uid:1000")
    elsewhere = await an_entry(place, node, "/b/else", *WEB, "k8s:cluster:else")
    results = await ask(
        node, (web, here), (web, there), (bill, other), (plain, ""), ("no-such", here),
        (elsewhere, here), ("", ""), (plain, here),
    )  # fmt: skip
    assert codes(results) == [0, 7, 0, 0, 5, 7, 3, 0]
    for number in (0, 2, 3, 7):
        svid_of(results[number])
    for number in (1, 4, 5, 6):
        assert not results[number].HasField("svid")
    rows = [row[::2] for row in await place.issued() if row[1] == node.id.uri]
    assert sorted(rows) == sorted(
        [(web.id, here.uid), (bill.id, other.uid), (plain.id, ""), (plain.id, "")]
    )


async def test_sec_80_the_service_has_the_limits_of_spires(place: Verified) -> None:
    """SEC-80: no parameters, too many, what is no UID, and no CSR are refused."""
    node = await place.agent("c1")
    call = stub(node)
    async with refused(Code.INVALID_ARGUMENT, "missing parameters"):
        await call.BatchNewX509SVID(podsvid_pb2.BatchNewX509SVIDRequest()).read()
    request = podsvid_pb2.BatchNewX509SVIDRequest()
    for _ in range(1001):
        request.params.add(entry_id="a")
    async with refused(Code.RESOURCE_EXHAUSTED, "at most 1000"):
        await call.BatchNewX509SVID(request).read()
    for uid in ("x" * 65, "a b", "a\n", "é", "../a"):
        request = podsvid_pb2.BatchNewX509SVIDRequest()
        request.params.add(entry_id="a", csr=make_csr(make_key()), pod_uid=uid)
        async with refused(Code.INVALID_ARGUMENT, "pod_uid"):
            await call.BatchNewX509SVID(request).read()
        async with refused(Code.INVALID_ARGUMENT, "pod_uid"):
            await call.NewJWTSVID(podsvid_pb2.NewJWTSVIDRequest(entry_id="a", pod_uid=uid))
    entry = await an_entry(place, node, "/c/web")
    request = podsvid_pb2.BatchNewX509SVIDRequest()
    request.params.add(entry_id=entry.id, pod_uid=UNKNOWN)
    (result,) = (await call.BatchNewX509SVID(request).read()).results
    assert (result.status.code, result.status.message) == (3, "missing CSR")


async def test_only_agents_may_call(place: Verified) -> None:
    """Without an agent's certificate the service is not there for anybody."""
    (entry,) = await place.running.add(below("spiffe://example.org/x", "/d", *WEB))
    for caller in (place.running.anonymous, await place.running.holder("/somebody")):
        async with refused(Code.PERMISSION_DENIED):
            await ask(caller, (entry, UNKNOWN))
        async with refused(Code.PERMISSION_DENIED):
            await ask_jwt(caller, entry, UNKNOWN)


# Lag


async def test_a_pod_that_is_known_a_moment_later_is_waited_for(place: Verified) -> None:
    """A watch that is behind by 300 ms costs 300 ms, and no error; what is known waits not."""
    node = await place.agent("e1")
    known = await a_pod(place, "e-known", node="e1")
    entry = await an_entry(place, node, "/e/web")
    place.cluster.hold_watches()
    late = place.cluster.pod("e-late", node="e1")
    relabelled = (*WEB, "k8s:pod-label:app:web")
    labelled = await an_entry(place, node, "/e/labelled", *relabelled)
    place.cluster.relabel(known, {"app": "web"})
    asked_at = time.monotonic()
    parts = []
    async for part in parts_of(
        node, (entry, late), (entry, known), (labelled, known), (entry, UNKNOWN)
    ):
        if not parts:
            assert time.monotonic() - asked_at < 0.25
            asyncio.get_running_loop().call_later(0.3, place.cluster.release_watches)
        parts.append({one.number: one.status.code for one in part})
    assert parts[0] == {1: 0}
    assert {number: code for part in parts[1:] for number, code in part.items()} == {
        0: 0, 2: 0, 3: 14,
    }  # fmt: skip
    assert parts[-1] == {3: 14} and time.monotonic() - asked_at < 4
    assert len(place.pods.arrivals) == 0


async def test_a_jwt_waits_for_its_pod_too(place: Verified) -> None:
    """A JWT-SVID for a pod that is known a moment later is not refused, by either service."""
    node = await place.agent("f1")
    entry = await an_entry(place, node, "/f/web", "k8s:ns:f", "k8s:sa:web")
    place.cluster.hold_watches()
    pod = place.cluster.pod("f-late", "f", "web", "f1")
    asked = [
        asyncio.create_task(ask_jwt(node, entry, pod)),
        asyncio.create_task(ask_jwt_as_spire(node, entry)),
    ]
    await eventually(lambda: len(place.pods.arrivals) == 2)
    place.cluster.release_watches()
    for answer in await asyncio.gather(*asked):
        assert answer.id == id_message("/f/web")


async def test_what_stays_unknown_is_refused_in_time() -> None:
    """After its patience the server says UNAVAILABLE, and an agent tries again."""
    async with a_place() as place:
        short(place, 0.1)
        node = await place.agent("n1")
        entry = await an_entry(place, node, "/web")
        (result,) = await ask(node, (entry, UNKNOWN))
        assert result.status.code == 14 and "not known to the server yet" in (
            result.status.message
        )
        assert place.metric("pod_refusals", "prod", "pod-unknown") == 1
        async with refused(Code.UNAVAILABLE, "not known to the server yet"):
            await ask_jwt(node, entry, UNKNOWN)
        assert place.metric("pod_refusals", "prod", "pod-unknown") > 1  # gRPC tries again
        assert await place.issued() == []
        assert len(place.pods.arrivals) == 0


async def test_one_who_hangs_up_is_waited_for_no_longer(place: Verified) -> None:
    """A call that is cancelled while a pod is waited for leaves nothing behind."""
    node = await place.agent("g1")
    entry = await an_entry(place, node, "/g/web")
    request = podsvid_pb2.BatchNewX509SVIDRequest()
    request.params.add(entry_id=entry.id, csr=make_csr(make_key()), pod_uid=UNKNOWN)
    call = stub(node).BatchNewX509SVID(request)
    assert not (await call.read()).results
    await eventually(lambda: len(place.pods.arrivals) == 1)
    call.cancel()
    await eventually(lambda: len(place.pods.arrivals) == 0)


async def test_sec_52_a_ban_ends_the_waiting() -> None:
    """SEC-52: an agent that is banned while its pod is waited for gets nothing."""
    async with a_place() as place:
        node = await place.agent("n1")
        entry = await an_entry(place, node, "/web")
        place.cluster.hold_watches()
        pod = place.cluster.pod()
        asked = [
            asyncio.create_task(ask(node, (entry, pod))),
            asyncio.create_task(ask_jwt(node, entry, pod)),
        ]
        await eventually(lambda: len(place.pods.arrivals) == 1)
        await asyncio.sleep(0.05)
        await place.running.local.agent.BanAgent(
            agent_pb2.BanAgentRequest(id=id_message(node.id.path))
        )
        place.cluster.release_watches()
        for one in asked:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await one
            assert caught.value.code() is Code.PERMISSION_DENIED
        assert await place.issued() == []


async def test_sec_21_signed_by_what_is_true_at_signing(place: Verified) -> None:
    """SEC-21: an entry that changes while a pod is waited for is signed as it is then."""
    node = await place.agent("h1")
    entry = await an_entry(place, node, "/h/before")
    gone = await an_entry(place, node, "/h/gone")
    moved = await an_entry(place, node, "/h/moved")
    place.cluster.hold_watches()
    pod = place.cluster.pod("h-late", node="h1")
    asked = asyncio.create_task(ask(node, (entry, pod), (gone, pod), (moved, pod)))
    await eventually(lambda: len(place.pods.arrivals) == 1)
    entry.spiffe_id.path = "/h/after"
    moved.ClearField("selectors")
    moved.selectors.add(type="k8s", value="ns:h-other")
    await place.running.local.entry.BatchUpdateEntry(
        entry_pb2.BatchUpdateEntryRequest(entries=[entry, moved])
    )
    await place.running.local.entry.BatchDeleteEntry(
        entry_pb2.BatchDeleteEntryRequest(ids=[gone.id])
    )
    await place.running.settled()
    place.cluster.release_watches()
    first, second, third = await asked
    assert svid_of(first).spiffe_id.path == "/h/after"
    assert (second.status.code, third.status.code) == (5, 7)


async def test_a_pod_relabelled_before_signing_is_refused(place: Verified) -> None:
    """What the agent saw a moment ago does not count: the pod is judged as it is now."""
    node = await place.agent("i1")
    pod = await a_pod(place, "i-web", node="i1", labels={"app": "web"})
    entry = await an_entry(place, node, "/i/web", *WEB, "k8s:pod-label:app:web")
    svid_of((await ask(node, (entry, pod)))[0])
    place.cluster.relabel(pod, {"app": "db"})
    await place.knows(pod)
    events = await place.running.audited(lambda: denied(node, entry, pod))
    assert events == []  # its watch was behind: no attack


async def denied(node: Holder, entry: Any, pod: Pod | str) -> None:
    """Asked for, and refused."""
    (result,) = await ask(node, (entry, pod))
    assert result.status.code == 7, result.status.message


# Agents that name no pod


@pytest.mark.parametrize("setting", list(WithoutPod), ids=lambda one: one.value)
async def test_an_agent_of_spires(setting: WithoutPod) -> None:
    """An agent that names no pod gets what the cluster's setting says, by both services."""
    async with a_place(agents_without_pod=setting) as place:
        short(place, 0.1)
        node = await place.agent("n1")
        pods = [place.cluster.pod(), place.cluster.pod("web-2", "elsewhere", node="n2")]
        await place.knows(*pods)
        here = await an_entry(place, node, "/here")
        there = await an_entry(place, node, "/there", "k8s:ns:elsewhere")
        plain = await an_entry(place, node, "/plain", "unix:uid:1000")
        wanted = {
            WithoutPod.ANY_POD_OF_NODE: [0, 7, 0],
            WithoutPod.REFUSE: [7, 7, 0],
            WithoutPod.ALLOW: [0, 0, 0],
        }[setting]
        assert codes(await ask_as_spire(node, here, there, plain)) == wanted
        assert codes(await ask(node, (here, ""), (there, ""), (plain, ""))) == wanted
        for entry, code in zip((here, there, plain), wanted, strict=True):
            for call in (ask_jwt_as_spire(node, entry), ask_jwt(node, entry, "")):
                if code:
                    async with refused(Code.PERMISSION_DENIED):
                        await call
                else:
                    assert (await call).id == entry.spiffe_id
        assert {row[2] for row in await place.issued()} == {""}
        # One that names a pod is judged by it, whatever the setting.
        assert codes(await ask(node, (here, pods[0]), (there, pods[1]))) == [0, 7]


async def test_any_pod_of_the_node_is_not_waited_for(place: Verified) -> None:
    """SPIRE's agents sign ahead for pods of all nodes: their refusals cost no time."""
    node = await place.agent("j1")
    entries = [await an_entry(place, node, f"/j/{n}", "k8s:ns:j-none") for n in range(3)]
    asked_at = time.monotonic()
    results = await ask_as_spire(node, *entries)
    assert codes(results) == [7, 7, 7] and time.monotonic() - asked_at < 1
    assert "no pod of this agent's node" in results[0].status.message


# Other agents, other clusters


async def test_only_agents_of_the_cluster_speak_for_its_pods(place: Verified) -> None:
    """An agent that joined by token is refused what names the cluster, and no more."""
    node = await place.running.node()
    pod = await a_pod(place, "k-web", node="k1")
    named = await an_entry(place, node, "/k/named", *WEB, "k8s:cluster:prod")
    other = await an_entry(place, node, "/k/other", *WEB, "k8s:cluster:unknown")
    open_ = await an_entry(place, node, "/k/open")
    assert codes(await ask(node, (named, pod), (other, pod), (open_, pod))) == [7, 0, 0]
    assert codes(await ask_as_spire(node, named, other, open_)) == [7, 0, 0]


async def test_two_clusters_of_equal_names_are_kept_apart() -> None:
    """Equal nodes, namespaces and accounts in two clusters: each agent has its own pods."""
    async with a_place("prod", "test") as place:
        short(place, 0.1)
        nodes, pods, entries = {}, {}, {}
        for name, cluster in place.clusters.items():
            nodes[name] = await place.agent("n1", cluster)
            pods[name] = cluster.pod()
        await place.knows(*pods.values())
        for name, node in nodes.items():
            entries[name] = await an_entry(place, node, f"/{name}", *WEB, f"k8s:cluster:{name}")
            both = await an_entry(place, node, f"/{name}/both")
            other = pods["test" if name == "prod" else "prod"]
            assert codes(await ask(node, (entries[name], pods[name]), (both, other))) == [0, 14]


async def test_a_cluster_that_is_not_verified() -> None:
    """With verify_pods off nothing is watched or checked, and this is counted."""
    async with a_place(verify_pods=False) as place:
        node = await place.agent("n1")
        entry = await an_entry(place, node, "/web")
        assert codes(await ask(node, (entry, UNKNOWN))) == [0]
        assert codes(await ask_as_spire(node, entry)) == [0]
        assert place.metric("pod_checks", "prod", "unchecked") == 2
        assert place.cluster.watching == 0
        assert {row[2] for row in await place.issued()} == {""}


# The API server


async def test_sec_114_an_api_server_that_is_away() -> None:
    """SEC-114: the server stays ready and says which cluster is away; known pods go on."""
    async with a_place() as place:
        short(place, 0.1)
        server, node = place.running.server, await place.agent("n1")
        pod, entry = place.cluster.pod(), await an_entry(place, node, "/web")
        await place.knows(pod)
        assert server.cluster_problems() == {}
        await place.cluster.stop()
        await eventually(server.cluster_problems)
        code, said = await page(server.status_port, "/ready")
        # Why is another text at each try.
        assert (code, said["ready"], said["problems"]) == (200, True, [])
        assert list(said["clusters"]) == ["prod"] and said["clusters"]["prod"]
        _, metrics = await page(server.status_port, "/metrics")
        assert 'issuer_cluster_in_step{cluster="prod"} 0' in metrics
        assert 'issuer_cluster_pods{cluster="prod"} 2' in metrics
        svid_of((await ask(node, (entry, pod)))[0])  # known from before
        later = place.cluster.pod("later")
        (result,) = await ask(node, (entry, later))
        assert result.status.code == 14 and "is away" in result.status.message
        await place.cluster.start()
        await eventually(lambda: not server.cluster_problems(), 15)
        svid_of((await ask(node, (entry, later)))[0])
        _, metrics = await page(server.status_port, "/metrics")
        assert 'issuer_cluster_in_step{cluster="prod"} 1' in metrics
        assert 'issuer_cluster_away_seconds{cluster="prod"} 0' in metrics


async def page(port: int, path: str) -> tuple[int, Any]:
    """A page of the status port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), json.loads(body) if path == "/ready" else body


async def test_a_server_starts_without_its_clusters() -> None:
    """An API server that is away keeps no server from starting: it is picked up later."""
    with a_folder() as folder:
        async with contextlib.AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(a_cluster())
            settings = settings_of(cluster, folder, verify_pods=True)
            await cluster.stop()
            running = await stack.enter_async_context(a_running_server(clusters=(settings,)))
            assert running.server.is_ready()
            await eventually(running.server.cluster_problems)
            await cluster.start()
            place = Verified(running, {"prod": cluster})
            await eventually(lambda: not running.server.cluster_problems(), 15)
            node = await place.agent("n1")
            pod = await a_pod(place, "web-1")
            svid_of((await ask(node, (await an_entry(place, node, "/web"), pod)))[0])


async def test_nothing_is_asked_that_the_manifests_do_not_grant(place: Verified) -> None:
    """The server's account uses the verbs of `SERVER_RULES` and no others."""
    granted = {
        (group, resource, verb) for group, resource, verbs in SERVER_RULES for verb in verbs
    }
    used = {
        (one.group, one.plural, one.verb)
        for one in place.cluster.calls.made
        if one.user == SERVER_USER
    }
    assert used and used <= granted
    assert {one.status for one in place.cluster.calls.made if one.user == SERVER_USER} <= {
        200, 201,
    }  # fmt: skip


async def test_sec_21_an_agent_of_a_replaced_node_is_refused(place: Verified) -> None:
    """SEC-21: when a node was made anew under its name, its old agent speaks for nobody."""
    pod = place.cluster.pod("m-web", node="m1")
    before = await join(place.running, place.cluster, agent_pod(place.cluster, "m1"))
    entry = await an_entry(place, before, "/m/web")
    await place.knows(pod)
    svid_of((await ask(before, (entry, pod)))[0])
    new = place.cluster.recreate("nodes", "m1")["metadata"]["uid"]
    nodes = place.pods.clusters["prod"].nodes
    await eventually(lambda: nodes.get(new))
    (result,) = await ask(before, (entry, pod))
    assert result.status.code == 7 and "attest again" in result.status.message
    after = await join(
        place.running, place.cluster, agent_pod(place.cluster, "m1", name="agent-m1-again")
    )
    (mine,) = await place.running.add(below(after, "/m/again", *WEB))
    svid_of((await ask(after, (mine, pod)))[0])


def short(place: Verified, seconds: float) -> None:
    """What does not come is waited for this long."""
    object.__setattr__(place.pods, "patience", seconds)
