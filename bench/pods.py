"""
A node with 500 pods on which 20 start a second, and what the server's check of a pod costs.

The agent's attestation is a process of its own, fed by a stand-in for an API server or a
kubelet over TLS; processes are placed by cgroup texts.  The clock of a start begins when the
API server has the new pod, and ends when a process in it is attested.
"""

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench._crypto import sign_and_verify
from bench._harness import Result, alternate
from issuer.config import Cluster
from issuer.k8s.cluster import ClusterWatch
from issuer.k8s.tables import Arrivals
from issuer.k8s.verify import PodVerifier
from spiffe_core.agent import AttestedAgent
from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector
from spiffe_core.spiffeid import SpiffeId
from spiffe_wire.k8s.objects import meta_of, pod_of
from tests.support.k8s.cluster import FakeCluster, Pod

PODS = 500
STARTS = 200
PER_SECOND = 20


class _Agent:
    """The agent's process, and its answers in whatever order they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.answers.put_nowait(json.loads(line))

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        async with asyncio.timeout(60):
            return await self.answers.get()


@contextlib.asynccontextmanager
async def _agent(
    cluster: FakeCluster, folder: Path, kubelet_port: int
) -> AsyncIterator[_Agent]:
    kubeconfig = cluster.kubeconfig(folder, name=f"bench-{kubelet_port}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench._pods_agent", str(kubeconfig), str(kubelet_port),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    agent = _Agent(process)
    reading = asyncio.create_task(agent.read())
    try:
        while (await agent.ask(do="cpu"))["pods"] < PODS:
            await asyncio.sleep(0.05)
        yield agent
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await reading


async def _starts(cluster: FakeCluster, agent: _Agent, pods: list[Pod]) -> dict[str, float]:
    """Replace one pod after another, 20 a second; what that took."""
    born: dict[int, float] = {}
    before = await agent.ask(do="cpu")
    started = time.monotonic()
    for number in range(1000, 1000 + STARTS):
        await asyncio.sleep(max(0, started + (number - 1000) / PER_SECOND - time.monotonic()))
        cluster.delete_pod(pods.pop(0))
        born[number] = time.monotonic()
        pod = cluster.pod(f"new-{number}-{id(agent)}")
        pods.append(pod)
        agent.tell(do="start", number=number, cgroup=pod.cgroup())
        await asyncio.sleep(0)
    waits = []
    for _ in born:
        async with asyncio.timeout(20):
            said = await agent.answers.get()
        assert said["why"] == "{}", said["why"]
        waits.append((said["at"] - born[said["number"]]) * 1000)
    after = await agent.ask(do="cpu")
    return {
        "median": statistics.median(waits),
        "p99": sorted(waits)[int(len(waits) * 0.99) - 1],
        "cpu": (after["cpu"] - before["cpu"]) / STARTS * 1000,
        "share": (after["cpu"] - before["cpu"]) / (time.monotonic() - started) * 100,
    }


async def _node() -> list[Result]:
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with FakeCluster() as cluster:
            pods = [cluster.pod(f"pod-{number}") for number in range(PODS)]
            kubelet = await cluster.kubelet("n1")
            async with _agent(cluster, Path(folder), 0) as agent:
                hot = await agent.ask(do="hot", cgroup=pods[-1].cgroup())
                made = len(cluster.calls.made)
                took = await _starts(cluster, agent, pods)
                calls = len(cluster.calls.made) - made
            found += [
                Result(
                    "attest a process of a known container / read its two files alone",
                    hot["ours"] / hot["floor"],
                    at_most=2.0,
                    note=f"{hot['ours']:.0f} us, no call to anybody",
                ),
                Result(
                    "start to attested, by the API server's watch, median",
                    took["median"], unit="ms", note=f"p99 {took['p99']:.1f} ms, 20 a second",
                ),
                Result(
                    "agent CPU for each start, watch", took["cpu"], unit="ms",
                    note=f"{took['share']:.1f} % of a core; {calls} calls for {STARTS} starts",
                ),
            ]  # fmt: skip
            async with _agent(cluster, Path(folder), kubelet.port) as agent:
                made = len(kubelet.calls.made)
                by_kubelet = await _starts(cluster, agent, pods)
                calls = len(kubelet.calls.made) - made
            found += [
                Result(
                    "start to attested, by the kubelet's list, median",
                    by_kubelet["median"], unit="ms", note=f"p99 {by_kubelet['p99']:.1f} ms",
                ),
                Result(
                    "agent CPU for each start, kubelet / watch",
                    by_kubelet["cpu"] / took["cpu"],
                    note=f"{by_kubelet['share']:.0f} % of a core; {calls} calls",
                ),
            ]  # fmt: skip
    return found


def _check() -> list[Result]:
    """The server's check of one pod among 500 of its node, against a signature."""
    cluster = FakeCluster("bench")
    node = cluster.node("n1")
    pods = [
        cluster.pod(f"pod-{number}", labels={"app": f"a{number % 20}"})
        for number in range(PODS)
    ]
    watch = ClusterWatch(Cluster(name="bench"), None, Arrivals())  # type: ignore[arg-type]
    watch.pods.replace([pod_of(one.body) for one in pods])
    watch.nodes.replace([meta_of(node)])
    watch.namespaces.replace([meta_of(cluster.find("namespaces", "shop"))])
    watch.accounts.replace([meta_of(cluster.find("serviceaccounts", "web", "shop"))])
    for one in watch._all:
        one.synced.set()
        one.problem, one.away_since = "", None
    verifier = PodVerifier({"bench": watch})
    now = datetime.now(UTC)
    texts = ("cluster:bench", "agent_node_uid:" + node["metadata"]["uid"], "agent_node_name:n1")
    agent = AttestedAgent(
        SpiffeId.parse("spiffe://example.org/spire/agent/k8s_psat/bench/x"), "k8s_psat", "1",
        now + timedelta(hours=1), frozenset(Selector("k8s_psat", one) for one in texts),
    )  # fmt: skip
    wanted = ("cluster:bench", "ns:shop", "sa:web", "pod-label:app:a7", "container-name:app")
    entry = RegistrationEntry(
        SpiffeId.parse("spiffe://example.org/web"), agent.id,
        frozenset(Selector("k8s", one) for one in wanted), id="e",
    )  # fmt: skip
    uid = pods[7].uid
    took = alternate(
        {
            "floor": sign_and_verify(),
            "named": lambda: verifier.check(agent, entry, uid),
            "any": lambda: verifier.check(agent, entry, ""),
        },
        rounds=15,
        repeat=200,
        clock=time.thread_time,
    )
    return [
        Result(
            "server's check of the pod an agent names / S+V",
            took["named"] / took["floor"],
            at_most=0.2,
            note=f"{took['named'] * 1e6:.1f} us",
        ),
        Result(
            "server's check for an agent that names none / S+V", took["any"] / took["floor"],
            note=f"{took['any'] * 1e6:.1f} us; looks through the node's pods",
        ),
    ]  # fmt: skip


def main() -> list[Result]:
    """Run both."""
    return asyncio.run(_node()) + _check()
