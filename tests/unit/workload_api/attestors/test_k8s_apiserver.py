"""Pods, namespaces and accounts by the API server's word, through any trouble it has."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.k8s import watch
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import access_of
from spiffe_wire.k8s.objects import meta_of, pod_of
from spiffe_wire.k8s.rbac import AGENT_RULES
from tests.support.k8s import resources
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.placed import AGENT, rules_of
from workload_api.attestors.apiserver import ApiServerPods
from workload_api.attestors.pods import PodError, PodTable

WANTED: Any = {
    "cluster": "demo",
    "namespaces": True,
    "namespace_labels": True,
    "accounts": True,
}


@asynccontextmanager
async def told(folder: Path) -> AsyncIterator[tuple[FakeCluster, PodTable, ApiServerPods]]:
    """A cluster, and a table of node n1 with all that surrounds its pods."""
    async with FakeCluster() as cluster:
        cluster.grant(AGENT, *rules_of(AGENT_RULES))
        token = cluster.account_token("spiffe", "spiffe-agent")
        client = Client(
            access_of(cluster.kubeconfig(folder, token=token), "", {}),
            timeout=timedelta(seconds=0.4),
        )
        table = PodTable(**WANTED)
        source = ApiServerPods(client, table, "n1", namespaces=True, accounts=True)
        running = asyncio.create_task(source.run())
        try:
            yield cluster, table, source
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await client.close()


def fresh(cluster: FakeCluster) -> PodTable:
    """A table that was told of everything as it is now, and of nothing before."""
    table, store = PodTable(**WANTED), cluster.api.store
    table.namespaces.replace([meta_of(one) for one in store.objects(resources.NAMESPACES)])
    table.accounts.replace([meta_of(one) for one in store.objects(resources.SERVICE_ACCOUNTS)])
    here = [one for one in store.objects(resources.PODS) if one["spec"].get("nodeName") == "n1"]
    table.replace([pod_of(one) for one in here])
    return table


def says(table: PodTable, uid: str, container_id: str) -> object:
    """What a table says of a container."""
    try:
        known = table.find(container_id, uid)
    except PodError as error:
        return "deleted" if "deleted" in str(error) else str(error)
    return known and (known.selectors, known.lacking)


async def agree(cluster: FakeCluster, table: PodTable, seen: set[tuple[str, str]]) -> None:
    """Return once *table* says of all that was ever seen what a fresh one does."""
    async with asyncio.timeout(8):
        while True:
            other = fresh(cluster)
            differ = [one for one in seen if not same(says(table, *one), says(other, *one))]
            if not differ and len(table) == len(other):
                return
            await asyncio.sleep(0.005)


def same(ours: object, fresh_one: object) -> bool:
    """Equal; a fresh table knows of no deletions."""
    return ours == fresh_one or (ours == "deleted" and fresh_one is None)


def happens(rng: random.Random, cluster: FakeCluster, pods: list[Pod]) -> None:
    """One thing that changes in a cluster."""
    what = rng.randrange(9)
    if what < 3 or not pods:
        number = rng.randrange(10_000)
        account = rng.choice(["web", "api"])
        place = rng.choice(["shop", "bank"])
        pods.append(cluster.pod(f"p-{number}", place, account, rng.choice(["n1", "n1", "n2"])))
        return
    pod = rng.choice(pods)
    if what == 3:
        cluster.delete_pod(pod)
        pods.remove(pod)
    elif what == 4:
        pods.remove(pod)
        pods.append(cluster.recreate_pod(pod))
    elif what == 5:
        cluster.relabel(pod, {"v": str(rng.randrange(5))})
    elif what == 6:
        cluster.start_container(pod)
    elif what == 7:
        cluster.recreate("serviceaccounts", pod.account, pod.namespace)
    else:
        cluster.terminate_pod(pod)


def trouble(rng: random.Random, cluster: FakeCluster) -> None:
    """One thing that goes wrong between a cluster and us."""
    faults = cluster.faults
    rng.choice(
        [
            lambda: cluster.cut_watches(broken=rng.random() < 0.5),
            cluster.compact,
            cluster.expire_watches,
            cluster.bookmark,
            lambda: cluster.write_on_watches(b"{nonsense\n"),
            lambda: faults.fail(rng.choice([429, 500, 503]), times=2),
            lambda: faults.garbage(times=1),
            lambda: faults.reset(times=2),
            lambda: faults.truncate(times=1),
            lambda: None,
        ]
    )()


@pytest.mark.parametrize("seed", range(5))
async def test_sec_35_the_table_is_right_after_any_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """SEC-35: however changes and failures fall together, a fresh list would say the same."""
    monkeypatch.setattr(watch, "FIRST_PAUSE", timedelta(seconds=0.01))
    monkeypatch.setattr(watch, "LONGEST_PAUSE", timedelta(seconds=0.05))
    rng = random.Random(seed)
    async with told(tmp_path) as (cluster, table, source):
        pods: list[Pod] = []
        seen: set[tuple[str, str]] = set()
        for _ in range(12):
            for _ in range(rng.randrange(1, 12)):
                happens(rng, cluster, pods)
                seen |= {(one.uid, one.container_id()) for one in pods}
                if rng.random() < 0.3:
                    trouble(rng, cluster)
                if rng.random() < 0.3:
                    await asyncio.sleep(0.002)
            cluster.faults.clear()
            await agree(cluster, table, seen)
        assert len(seen) > 20
        async with asyncio.timeout(8):
            while source.problems:
                await asyncio.sleep(0.005)
        assert source.away == timedelta(0)


async def test_who_waits_has_a_server_that_was_away_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is not known has the API server asked soon, when it was given up."""
    monkeypatch.setattr(watch, "FIRST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(watch, "LONGEST_PAUSE", timedelta(hours=1))
    monkeypatch.setattr(watch, "HURRIED_PAUSE", timedelta(seconds=0.01))
    async with told(tmp_path) as (cluster, table, source):
        await cluster.settled(count=3)
        pod = cluster.pod()
        async with asyncio.timeout(5):
            while says(table, pod.uid, pod.container_id()) is None:
                await asyncio.sleep(0.005)
        cluster.cut_watches(plural="pods")
        async with asyncio.timeout(5):
            while not source.problem:
                await asyncio.sleep(0.005)
        late = cluster.pod("late")
        arrived, _ = table.arrival(late.uid)
        source.want()
        await asyncio.wait_for(arrived, 5)
