"""Pods by a kubelet's word: over TLS, as somebody, asked no more often than is needed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import access_of
from spiffe_wire.k8s.rbac import KUBELET_RULES, Rules
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.k8s.kubelet import FakeKubelet
from tests.support.k8s.pki import ClusterCa
from tests.support.placed import AGENT, rules_of
from tests.support.pods import a_uid, values
from workload_api.attestors import kubelet as module
from workload_api.attestors.kubelet import KubeletPods, kubelet_access
from workload_api.attestors.pods import PodError, PodTable

INTERVAL = timedelta(seconds=0.1)
DEFAULT_PAUSE = module.LEAST_PAUSE


@dataclass
class Asked:
    """A kubelet, and a table that is kept by asking it."""

    cluster: FakeCluster
    kubelet: FakeKubelet
    table: PodTable
    source: KubeletPods

    async def until(self, ready: Callable[[], Any], within: float = 5) -> None:
        """Return once it is so."""
        async with asyncio.timeout(within):
            while not ready():
                await asyncio.sleep(0.003)

    async def right(self) -> None:
        """Return once it has been asked again, with success."""
        answered = self.good
        await self.until(lambda: self.good > answered + 1 and not self.source.problem)

    @property
    def good(self) -> int:
        """How often it has told."""
        return self.kubelet.calls.count(status=200)

    def knows(self, pod: Pod) -> bool:
        """True when a pod's container is in the table."""
        return self.table.find(pod.container_id(), pod.uid) is not None


@asynccontextmanager
async def asked(
    folder: Path,
    *,
    interval: timedelta = INTERVAL,
    token: str = "",
    ca: ClusterCa | None = None,
    authorities: Path | None = None,
    rules: Rules | tuple[()] = KUBELET_RULES,
) -> AsyncIterator[Asked]:
    """A node n1 with two pods, and a table that is kept by its kubelet's word."""
    async with FakeCluster() as cluster:
        cluster.grant(AGENT, *rules_of(frozenset(rules)))
        cluster.pod("web-0")
        cluster.pod("elsewhere", node="n2")
        kubelet = await cluster.kubelet(ca=ca)
        token = token or cluster.account_token("spiffe", "spiffe-agent")
        access = access_of(cluster.kubeconfig(folder, token=token), "", {})
        client = Client(
            kubelet_access(access, "127.0.0.1", kubelet.port, authorities),
            timeout=timedelta(seconds=0.3),
        )
        table = PodTable(cluster="demo")
        source = KubeletPods(client, table, interval=interval)
        running = asyncio.create_task(source.run())
        try:
            yield Asked(cluster, kubelet, table, source)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await client.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can wait out."""
    monkeypatch.setattr(module, "LEAST_PAUSE", timedelta(seconds=0.02))


async def test_sec_35_what_changes_is_noticed(tmp_path: Path) -> None:
    """SEC-35: asked again and again, the table is as old as the interval at most."""
    async with asked(tmp_path) as made:
        assert made.source.problem == "not asked yet"
        await made.right()
        assert len(made.table) == 1
        pod = made.cluster.pod("web-1", labels={"a": "1"})
        await made.right()
        known = made.table.find(pod.container_id(), pod.uid)
        assert known is not None
        assert {"pod-label:a:1", "node-name:n1"} <= values(known.selectors)
        assert not [one for one in values(known.selectors) if one.startswith(("ns-", "sa-"))]
        assert known.lacking == ""
        made.cluster.relabel(pod, {"a": "2"})
        await asyncio.wait_for(known.changed, 5)
        made.cluster.delete_pod(pod)
        await made.right()
        with pytest.raises(PodError, match="was deleted"):
            made.knows(pod)
        assert made.source.away == timedelta(0)


def test_sec_35_the_interval() -> None:
    """SEC-35: what is known of pods is at most 5 s old."""
    assert timedelta(seconds=5) >= module.INTERVAL


async def test_a_static_pod_goes_by_its_own_uid(tmp_path: Path) -> None:
    """A kubelet knows a pod of its own files by the UID that its cgroup has."""
    async with asked(tmp_path) as made:
        pod = made.cluster.pod("etcd", "kube-system", static=True)
        digest = pod.body["metadata"]["annotations"]["kubernetes.io/config.hash"]
        await made.right()
        known = made.table.find(pod.container_id(), digest)
        assert known is not None
        assert f"pod-uid:{digest}" in values(known.selectors)


async def test_a_container_that_is_waited_for(tmp_path: Path) -> None:
    """Whoever waits has the kubelet asked at once, and until it tells; its list is late."""
    async with asked(tmp_path, interval=timedelta(hours=1)) as made:
        await made.until(lambda: made.good == 1)
        await asyncio.sleep(0.05)
        assert made.good == 1  # an hour later
        made.kubelet.freeze()
        pod = made.cluster.pod("web-1")
        arrived, _ = made.table.arrival(pod.uid)
        made.source.want()
        await made.until(lambda: made.good > 4)
        assert not arrived.done()
        made.kubelet.thaw()
        await asyncio.wait_for(arrived, 5)
        assert made.knows(pod)
        told = made.good
        await asyncio.sleep(0.1)
        assert made.good <= told + 1


async def test_sec_80_it_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: for a container that nobody tells of it is asked for a while, and no longer."""
    monkeypatch.setattr(module, "WANTED_FOR", timedelta(seconds=0.2))
    async with asked(tmp_path, interval=timedelta(hours=1)) as made:
        await made.until(lambda: made.good == 1)
        waiting, _ = made.table.arrival(a_uid(77))
        made.source.want()
        await asyncio.sleep(0.6)
        told = made.good
        assert told > 1
        await asyncio.sleep(0.15)
        assert made.good == told
        assert not waiting.done()


async def test_sec_80_many_who_wait_are_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEC-80: one request at a time, and a pause after each, however many wait."""
    monkeypatch.setattr(module, "LEAST_PAUSE", timedelta(seconds=0.1))
    async with asked(tmp_path, interval=timedelta(hours=1)) as made:
        await made.until(lambda: made.good == 1)
        waiting = []
        started = asyncio.get_running_loop().time()
        for number in range(100):
            waiting.append(made.table.arrival(a_uid(number))[0])
            made.source.want()
            await asyncio.sleep(0.003)
        took = asyncio.get_running_loop().time() - started
        assert 2 <= made.good <= 2 + took / 0.1


def test_sec_80_four_times_a_second() -> None:
    """SEC-80: the pause after each question is a quarter of a second."""
    assert timedelta(milliseconds=250) == DEFAULT_PAUSE


FAILURES: dict[str, tuple[Callable[[Asked], Any], str]] = {
    "500": (lambda made: made.kubelet.faults.fail(500), "it answered 500"),
    "hang": (lambda made: made.kubelet.faults.hang(), "did not answer in time"),
    "reset": (lambda made: made.kubelet.faults.reset(), "cannot be reached"),
    "garbage": (lambda made: made.kubelet.faults.garbage(), "not JSON"),
    "no list": (lambda made: made.kubelet.faults.garbage(body=b'{"items": 7}'), "is not one"),
    "half": (lambda made: made.kubelet.faults.truncate(), "cannot be reached"),
    "another CA": (
        lambda made: made.kubelet.present(ClusterCa("x").serving(["n1", "127.0.0.1"])),
        "is not who it should be",
    ),
    "another node": (
        lambda made: made.kubelet.present(made.cluster.ca.serving(["n2"])),
        "is not who it should be",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_sec_34_failures_leave_what_is_known(tmp_path: Path, name: str) -> None:
    """SEC-34: a kubelet that fails, or is not who it should be, changes nothing."""
    fail, why = FAILURES[name]
    async with asked(tmp_path) as made:
        await made.right()
        fail(made)
        # Connections that are there already are not asked for a certificate again.
        await made.kubelet.stop()
        await made.kubelet.start()
        await made.until(lambda: why in made.source.problem)
        assert len(made.table) == 1
        assert made.source.away > timedelta(0)
        made.kubelet.faults.clear()
        made.kubelet.present(made.cluster.ca.serving(["n1", "127.0.0.1"]))
        made.cluster.pod("web-1")
        await made.right()
        assert len(made.table) == 2


async def test_sec_34_who_may_not_ask(tmp_path: Path) -> None:
    """SEC-34: without a token that it knows, or without the right, a kubelet tells nothing."""
    async with asked(tmp_path, token="nobody's") as made:
        await made.until(lambda: "is the token good" in made.source.problem)
    async with asked(tmp_path, rules=()) as made:
        who = f"user={AGENT}, verb=get, resource=nodes"
        await made.until(lambda: who in made.source.problem)
        assert "grant it by RBAC" in made.source.problem
        assert len(made.table) == 0


async def test_sec_34_a_ca_of_its_own(tmp_path: Path) -> None:
    """SEC-34: a kubelet whose certificate is of another CA is known by that CA alone."""
    own = ClusterCa("kubelets")
    path = tmp_path / "kubelet-ca.pem"
    path.write_bytes(own.pem)
    async with asked(tmp_path, ca=own) as made:
        await made.until(lambda: "is not who it should be" in made.source.problem)
        assert "kubeconfig" in made.source.problem
    async with asked(tmp_path, ca=own, authorities=path) as made:
        await made.right()
        assert len(made.table) == 1


async def test_a_kubelets_way_has_nothing_of_the_api_servers(tmp_path: Path) -> None:
    """A gateway's path and server name are for the API server alone."""
    async with FakeCluster() as cluster:
        path = cluster.kubeconfig(
            tmp_path, **{"server": "https://gate/k8s", "tls-server-name": "kube"}
        )
        made = kubelet_access(access_of(path, "", {}), "n1", 10250, None)
    assert (made.host, made.port, made.path, made.server_name) == ("n1", 10250, "", "")


async def test_a_mistake_of_ours_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in an unforeseen way is said, and tried again."""
    async with asked(tmp_path) as made:
        await made.right()
        with monkeypatch.context() as broken:
            broken.setattr(module, "pod_of", lambda _: 1 / 0)
            await made.until(lambda: "the log says why" in made.source.problem)
        await made.right()
