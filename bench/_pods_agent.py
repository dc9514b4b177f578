"""
An agent's pod attestation in a process of its own, so that its CPU can be told apart.

Reads commands, one JSON line each, and answers each with one.  The clock is the machine's
monotonic one, which all its processes share.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from spiffe_wire.frontdoor.peer import PeerProof, PidFd, UnixPeer
from spiffe_wire.k8s.client import Client
from spiffe_wire.k8s.credentials import from_kubeconfig
from workload_api.attestors.apiserver import ApiServerPods
from workload_api.attestors.cgroup import CgroupLayout, read_cgroup
from workload_api.attestors.k8s import K8sAttestor
from workload_api.attestors.kubelet import KubeletPods, kubelet_access
from workload_api.attestors.pods import PodTable
from workload_api.attestors.procfs import read_status
from workload_api.attestors.registry import Attestation

HOT_ROUNDS = 15
HOT_TIMES = 200


class Agent:
    """The attestors of one node, and its processes by made-up numbers."""

    def __init__(self, kubeconfig: str, kubelet_port: int) -> None:
        access = from_kubeconfig(Path(kubeconfig))
        by_kubelet = bool(kubelet_port)
        self.table = PodTable(
            cluster="bench", namespaces=not by_kubelet, accounts=not by_kubelet
        )
        if by_kubelet:
            access = kubelet_access(access, "n1", kubelet_port, None)
            access = _at_loopback(access)
            self.source: Any = KubeletPods(Client(access), self.table)
        else:
            self.source = ApiServerPods(
                Client(access),
                self.table,
                "n1",
                namespaces=True,
                accounts=True,
                cluster="bench",
            )
        self._texts: dict[int, bytes] = {}
        attestor = K8sAttestor(
            self.table,
            self.source,
            layout=CgroupLayout.pods(),
            read=lambda pid: self._texts[pid],
        )
        self.attestation = Attestation([attestor])
        self._pidfd = PidFd(os.pidfd_open(os.getpid()))

    def process(self, number: int, cgroup: str) -> UnixPeer:
        """A process of that number in that cgroup."""
        self._texts[number] = f"0::{cgroup}\n".encode()
        return UnixPeer(number, 0, 0, PeerProof.PIDFD, self._pidfd)

    async def start(self, number: int, cgroup: str) -> dict[str, Any]:
        """Attest a process that has just started; when that was done."""
        found = await self.attestation.attest(self.process(number, cgroup))
        return {"number": number, "at": time.monotonic(), "why": str(dict(found.partial))}

    async def hot(self, cgroup: str) -> dict[str, Any]:
        """Microseconds to attest a known container, and to read its two files alone."""
        peer, me = self.process(1, cgroup), os.getpid()
        floor, ours = [], []
        for _ in range(HOT_ROUNDS):
            started = time.perf_counter()
            for _ in range(HOT_TIMES):
                read_cgroup(me)
                read_status(me)
            floor.append((time.perf_counter() - started) / HOT_TIMES)
            started = time.perf_counter()
            for _ in range(HOT_TIMES):
                await self.attestation.attest(peer)
            ours.append((time.perf_counter() - started) / HOT_TIMES)
        return {
            "floor": statistics.median(floor) * 1e6,
            "ours": statistics.median(ours) * 1e6,
        }


def _at_loopback(access: Any) -> Any:
    from dataclasses import replace

    return replace(access, host="127.0.0.1", server_name="n1")


async def main() -> None:
    """Serve commands until standard input ends."""
    agent = Agent(sys.argv[1], int(sys.argv[2]))
    following = asyncio.create_task(agent.source.run())
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    under_way: set[asyncio.Task[None]] = set()

    async def answer(command: dict[str, Any]) -> None:
        kind = command.pop("do")
        if kind == "cpu":
            said: dict[str, Any] = {"cpu": time.process_time(), "pods": len(agent.table)}
        elif kind == "hot":
            said = await agent.hot(**command)
        else:
            said = await agent.start(**command)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()

    while line := await reader.readline():
        task = asyncio.create_task(answer(json.loads(line)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    following.cancel()


if __name__ == "__main__":
    uvloop.run(main())
