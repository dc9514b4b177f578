"""The server's tables of a cluster, and who is woken when something comes."""

import asyncio
from typing import Any

import pytest

from issuer.k8s.tables import Arrivals, MetaTable, PodTable, meta_topic, pod_topic, pods_topic
from spiffe_wire.k8s.objects import Meta, Pod


def a_pod(uid: str = "u1", **changes: Any) -> Pod:
    """A pod of node n1."""
    right: dict[str, Any] = {
        "uid": uid,
        "name": f"pod-{uid}",
        "namespace": "shop",
        "service_account": "web",
        "node_name": "n1",
        "host_ip": "10.0.0.1",
        "labels": {},
        "owners": (),
        "containers": (),
    }
    return Pod(**(right | changes))


def pods() -> tuple[PodTable, Arrivals]:
    """An empty table."""
    arrivals = Arrivals()
    return PodTable("prod", arrivals), arrivals


def uids(table: PodTable, node: str) -> set[str]:
    """The pods of a node."""
    return {one.uid for one in table.on_node(node)}


def test_pods_are_found_by_uid_and_by_node() -> None:
    """A pod is where the API server says it is, and nowhere once it is gone."""
    table, _ = pods()
    table.put(a_pod("u1"))
    table.put(a_pod("u2", node_name="n2"))
    table.put(a_pod("u3", node_name=""))
    assert (uids(table, "n1"), uids(table, "n2"), uids(table, "")) == ({"u1"}, {"u2"}, set())
    table.put(a_pod("u3", node_name="n1"))
    assert uids(table, "n1") == {"u1", "u3"}
    table.drop(a_pod("u1"))
    assert table.get("u1") is None and uids(table, "n1") == {"u3"}
    table.drop(a_pod("u1"))
    assert len(table) == 2


def test_a_new_list_replaces_all() -> None:
    """What a list does not name is gone; what it names as before has not changed."""
    table, _ = pods()
    table.replace([a_pod("u1"), a_pod("u2"), a_pod("u3")])
    kept, changed = table.get("u1"), table.get("u2")
    table.replace([a_pod("u1"), a_pod("u2", labels={"a": "b"})])
    assert table.get("u1") is kept
    assert table.get("u2") is not changed
    assert table.get("u3") is None and len(table) == 2


def test_a_pod_that_says_nothing_new_has_not_changed() -> None:
    """A heartbeat in a pod's status is no change of what is known of it."""
    table, arrivals = pods()
    table.put(a_pod("u1"))
    before = table.get("u1")
    with arrivals.listening() as listener:
        listener.add(pod_topic("prod", "u1"), 1)
        table.put(a_pod("u1"))
        assert table.get("u1") is before and len(arrivals) == 1


def test_a_static_pod_is_found_by_what_its_kubelet_calls_it() -> None:
    """Its hash will do for its UID, unless a second pod claims the same one."""
    table, _ = pods()
    digest = "0" * 32
    table.put(a_pod("u1", config_hash=digest))
    found = table.get(digest)
    assert found is not None and found.pod.uid == "u1"
    table.put(a_pod("u2", config_hash=digest))
    assert table.get(digest) is None
    table.drop(a_pod("u2"))
    found = table.get(digest)
    assert found is not None and found.pod.uid == "u1"


async def test_who_waits_is_woken_for_what_it_waits_for() -> None:
    """A listener hears which of its topics came, once, and of nothing else."""
    table, arrivals = pods()
    with arrivals.listening() as listener:
        for number, uid in enumerate(("u1", "u2", "u3")):
            listener.add(pod_topic("prod", uid), number)
        listener.add(pods_topic("prod", "n2"), 7)
        table.put(a_pod("other"))
        assert await listener.fired(0) == []
        table.put(a_pod("u2"))
        table.put(a_pod("u3", node_name="n2"))
        assert await listener.fired(5) == [1, 2, 7]
        table.put(a_pod("u2", labels={"a": "b"}))
        assert await listener.fired(0) == []
        table.drop(a_pod("u9"))
        assert len(arrivals) == 1
    assert len(arrivals) == 0


async def test_a_new_list_wakes_all_of_its_cluster() -> None:
    """Whoever waits for anything of a cluster looks again when all of it was read anew."""
    table, arrivals = pods()
    with arrivals.listening() as listener:
        listener.add(pod_topic("prod", "u1"), 1)
        listener.add(meta_topic("prod", "u1"), 2)
        listener.add(pod_topic("test", "u1"), 3)
        waiting = asyncio.create_task(listener.fired(5))
        await asyncio.sleep(0)
        table.replace([])
        assert await waiting == [1, 2]


def test_an_object_of_the_same_name_is_another() -> None:
    """A node that was made anew is found by its new UID and not by its old one."""
    table = MetaTable("prod", Arrivals())
    old, new = Meta("u1", "n1", "", {}), Meta("u2", "n1", "", {})
    table.replace([old])
    table.put(new)
    assert table.get("u1") is None
    assert table.get("u2") is table.named("n1") is new
    table.drop(old)
    assert table.named("n1") is new
    table.drop(new)
    assert table.get("u2") is table.named("n1") is None


@pytest.mark.parametrize("order", [("drop", "put"), ("put", "drop")], ids="-".join)
def test_accounts_are_told_apart_by_namespace(order: tuple[str, str]) -> None:
    """Two accounts of one name in two namespaces are two."""
    table = MetaTable("prod", Arrivals())
    here, there = Meta("u1", "web", "shop", {}), Meta("u2", "web", "test", {})
    table.put(here)
    for step in order:
        getattr(table, step)(there)
    assert table.named("web", "shop") is here
