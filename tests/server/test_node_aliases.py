"""
Node aliases: entries below all nodes of a sort (SPIRE API 5.1.1).

An alias is an entry whose parent is the server and whose selectors are a node's.  Its SPIFFE ID
is then a parent for every agent that has those selectors.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc
import pytest
import pytest_asyncio

from spiffe_wire.pb.spiffe_issuer.v1 import watch_pb2
from spiffe_wire.pb.spire.api.server.agent.v1 import agent_pb2
from spiffe_wire.pb.spire.api.server.entry.v1 import entry_pb2
from spiffe_wire.pb.spire.api.server.svid.v1 import svid_pb2
from tests.support.callers import (
    Code,
    Holder,
    Running,
    a_running_server,
    an_id,
    below,
    id_message,
    refused,
)
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.psat import a_cluster, agent_pod, join, settings_of
from tests.support.stack import a_folder
from workload_api.keys import make_csr, make_key

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVER = an_id("/spire/server")
_numbers = count(1)


@dataclass
class Place:
    """A server of two clusters, two agents of the first and one of the second."""

    running: Running
    prod: FakeCluster
    test: FakeCluster
    pods: tuple[Pod, Pod]
    first: Holder
    second: Holder
    foreign: Holder

    async def group(self, path: str, *selectors: str) -> Any:
        """An alias, and a workload's entry below it; returns the latter."""
        _, entry = await self.running.add(
            below(SERVER, path, *(selectors or ("k8s_psat:cluster:prod",))),
            below(an_id(path), f"{path}/web"),
        )
        return entry

    async def delete(self, *ids: str) -> None:
        """Delete entries."""
        request = entry_pb2.BatchDeleteEntryRequest(ids=ids)
        await self.running.local.entry.BatchDeleteEntry(request)
        await self.running.settled()

    async def id_of(self, path: str) -> str:
        """The entry for a SPIFFE ID."""
        answer = await self.running.local.entry.ListEntries(entry_pb2.ListEntriesRequest())
        (found,) = [one.id for one in answer.entries if one.spiffe_id.path == path]
        return str(found)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    """See `Place`."""
    async with a_cluster("prod") as prod, a_cluster("test") as test:
        with a_folder() as folder:
            clusters = (
                settings_of(prod, folder, allowed_pod_label_keys=("tier",)),
                settings_of(test, folder),
            )
            async with a_running_server(clusters=clusters) as running:
                pods = agent_pod(prod, "n1", labels={"tier": "a"}), agent_pod(prod, "n2")
                agents = [await join(running, prod, one) for one in pods]
                foreign = await join(running, test, agent_pod(test, "n1"))
                yield Place(running, prod, test, pods, *agents, foreign)


async def paths(node: Holder, prefix: str) -> list[str]:
    """The SPIFFE IDs that *node* may act for, of those below *prefix*."""
    answer = await node.calls.entry.GetAuthorizedEntries(
        entry_pb2.GetAuthorizedEntriesRequest()
    )
    found = [one.spiffe_id.path for one in answer.entries]
    return [one for one in found if one.startswith(prefix)]


async def signed(node: Holder, entry_id: str) -> int:
    """The code that signing for an entry ends with."""
    request = svid_pb2.BatchNewX509SVIDRequest(
        params=[svid_pb2.NewX509SVIDParams(entry_id=entry_id, csr=make_csr(make_key()))]
    )
    (result,) = (await node.calls.svid.BatchNewX509SVID(request)).results
    return int(result.status.code)


async def test_all_agents_of_a_cluster(place: Place) -> None:
    """SPIRE API 5.1.1: an alias by cluster gives its agents what is below it, and no others."""
    entry = await place.group("/cluster")
    for node in (place.first, place.second):
        assert await paths(node, "/cluster") == ["/cluster/web"]
        assert await signed(node, entry.id) == 0
    assert await paths(place.foreign, "/cluster") == []
    assert await signed(place.foreign, entry.id) == Code.NOT_FOUND.value[0]


async def test_the_alias_is_nobodys_identity(place: Place) -> None:
    """SPIRE API 5.1.1, SEC-21: an alias is not handed out, and no SVID is signed for it."""
    await place.group("/alias-alone")
    alias = await place.id_of("/alias-alone")
    assert await signed(place.first, alias) == Code.NOT_FOUND.value[0]
    async with refused(Code.NOT_FOUND):
        await place.first.calls.svid.NewJWTSVID(
            svid_pb2.NewJWTSVIDRequest(entry_id=alias, audience=["a"])
        )


@pytest.mark.parametrize(
    ("selectors", "who"),
    [
        (("k8s_psat:cluster:prod", "k8s_psat:agent_node_name:n1"), "first"),
        (("k8s_psat:cluster:prod", "k8s_psat:agent_pod_label:tier:a"), "first"),
        (("k8s_psat:agent_node_name:n1",), "first foreign"),
        (("k8s_psat:agent_ns:spiffe",), "first second foreign"),
        (("k8s_psat:cluster:prod", "k8s_psat:cluster:test"), ""),
        (("k8s_psat:cluster:PROD",), ""),
        (("k8s_psat:cluster:pro",), ""),
        (("k8s:cluster:prod",), ""),
        (("k8s_psat:cluster:prod", "unix:uid:0"), ""),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
async def test_every_selector_must_be_the_nodes(
    place: Place, selectors: tuple[str, ...], who: str
) -> None:
    """SPIRE API 5.1.1, SEC-03: a node is of the group when it has all of the selectors."""
    path = f"/group-{next(_numbers)}"
    await place.group(path, *selectors)
    found = [name for name in ("first", "second", "foreign")
             if await paths(getattr(place, name), path)]  # fmt: skip
    assert found == who.split()


async def test_groups_of_groups(place: Place) -> None:
    """SPIRE API 5.1.1: what is below what is below an alias counts as well."""
    await place.group("/deep")
    await place.running.add(below(an_id("/deep/web"), "/deep/web/child"))
    assert await paths(place.second, "/deep") == ["/deep/web", "/deep/web/child"]


async def change(stream: Any) -> tuple[list[str], list[str]]:
    """Paths of the entries that come, and IDs of those that go, in the next change."""
    message = await stream.read()
    assert message is not grpc.aio.EOF and not message.more
    return [one.spiffe_id.path for one in message.entries], list(message.removed_entry_ids)


async def test_a_changed_alias_is_pushed(place: Place) -> None:
    """SPIRE API 5.1.1: agents hear at once of an alias that comes, changes or goes."""
    first = place.first.calls.watch.Watch(watch_pb2.WatchRequest())
    second = place.second.calls.watch.Watch(watch_pb2.WatchRequest())
    await change(first), await change(second)
    (entry,) = await place.running.add(below(an_id("/pushed"), "/pushed/web"))
    alias = below(SERVER, "/pushed", "k8s_psat:cluster:prod")
    (made,) = await place.running.add(alias)
    for stream in (first, second):
        assert await change(stream) == (["/pushed/web"], [])
    made.selectors.add(type="k8s_psat", value="agent_node_name:n2")
    await place.running.local.entry.BatchUpdateEntry(
        entry_pb2.BatchUpdateEntryRequest(entries=[made])
    )
    assert await change(first) == ([], [entry.id])
    await place.delete(made.id)
    assert await change(second) == ([], [entry.id])
    first.cancel()
    second.cancel()


async def test_a_changed_node_is_told(place: Place) -> None:
    """SPIRE API 5.2: a node that attested again has the entries of what it is by now."""
    await place.group("/tier-b", "k8s_psat:agent_pod_label:tier:b")
    pod = agent_pod(place.prod, "n3", labels={"tier": "a"})
    before = await join(place.running, place.prod, pod)
    stream = before.calls.watch.Watch(watch_pb2.WatchRequest())
    cursor = (await stream.read()).cursor
    assert await paths(before, "/tier-b") == []
    place.prod.relabel(pod, {"tier": "b"})
    after = await join(place.running, place.prod, pod)
    stream = after.calls.watch.Watch(watch_pb2.WatchRequest(cursor=cursor))
    message = await stream.read()
    assert message.snapshot
    assert "/tier-b/web" in [one.spiffe_id.path for one in message.entries]
    stream.cancel()


async def test_an_evicted_node_is_of_no_group(place: Place) -> None:
    """SEC-52: a node that was evicted gets nothing through an alias until it is back."""
    await place.group("/evicted")
    pod = agent_pod(place.prod, "n4")
    node = await join(place.running, place.prod, pod)
    assert await paths(node, "/evicted") == ["/evicted/web"]
    request = agent_pb2.DeleteAgentRequest(id=id_message(node.id.path))
    await place.running.local.agent.DeleteAgent(request)
    async with refused(Code.PERMISSION_DENIED):
        await paths(node, "/evicted")
    back = await join(place.running, place.prod, pod)
    assert await paths(back, "/evicted") == ["/evicted/web"]
