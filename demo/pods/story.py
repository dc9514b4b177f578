"""What happens in the demo of pods, step by step, and the facts each step yields."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.casting import FIRST_UID, Role
from demo.player import Event, Player, PlayerError
from demo.pods import thief
from demo.pods.forger import delegated
from demo.screen import TextScreen
from tests.support.contained import Workload
from tests.support.containers import ROOT, Engine, pod_cgroup
from tests.support.k8s.cluster import Pod
from tests.support.podstack import PodStack, a_pod, a_pod_workload

NODES = ("n1", "n2")
"""This machine, and one of which only the agent is there: its key will be stolen."""
NODES_ID = "/cluster/demo"
ENTRIES = {
    "/shop/web": ("k8s:ns:shop", "k8s:sa:web"),
    "/shop/payments": ("k8s:ns:shop", "k8s:sa:payments", "k8s:pod-label:tier:gold"),
}
FORGER = FIRST_UID + 900
PROGRAM = "/proc/self/exe"


@dataclass
class Facts:
    """What ``make demo-pods JSON=1`` prints as its last line."""

    made_of: str = "real containers, a stand-in API server"
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    mtls: dict[str, Any] = field(default_factory=dict)
    relabelled: dict[str, Any] = field(default_factory=dict)
    recreated: dict[str, Any] = field(default_factory=dict)
    forged: dict[str, Any] = field(default_factory=dict)
    stolen: dict[str, Any] = field(default_factory=dict)


@dataclass
class Running:
    """A pod, and the workload in its one container."""

    pod: Pod
    workload: Workload
    started_at: float


@dataclass
class Story:
    """The engine, the trust domain, and where it is told."""

    engine: Engine
    stack: PodStack
    screen: TextScreen
    facts: Facts = field(default_factory=Facts)

    async def tell(self) -> Facts:
        """Play it all; every step that does not come out as promised raises."""
        async with AsyncExitStack() as stack:
            await self._entries()
            web, payments = await self._first_svids(stack)
            await self._mutual_tls(web, payments)
            await self._relabel(payments)
            web = await self._recreate(web, stack)
            await self._forge(web)
            await self._steal(web)
        return self.facts

    async def _entries(self) -> None:
        self.screen.step("A cluster of two nodes, whose agents joined by their pods' tokens")
        server = self.stack.server
        await server.add_entry(NODES_ID, _id("/spire/server"), "k8s_psat:cluster:demo")
        for node in NODES:
            self.screen.line(f"agent of {node}  {self.stack.agents[node].agent_id}")
        for path, selectors in ENTRIES.items():
            await server.add_entry(path, _id(NODES_ID), *selectors)
            self.screen.line(f"entry  {_id(path)}  for  {'  '.join(selectors)}")

    async def _first_svids(self, stack: AsyncExitStack) -> tuple[Running, Running]:
        self.screen.step("Two pods in real containers on n1; each asks who it is")
        found = []
        for account, labels in (("web", {}), ("payments", {"tier": "gold"})):
            pod = a_pod(self.stack, f"{account}-0", service_account=account, labels=labels)
            one = await self._start(pod, stack)
            seen = await one.workload.svids(f"/shop/{account}")
            self._note(one, seen)
            found.append(one)
        web, payments = found
        return web, payments

    async def _start(self, pod: Pod, stack: AsyncExitStack) -> Running:
        """Start a container of *pod*, and have its program watch its identities."""
        began = time.monotonic()
        workload = await stack.enter_async_context(
            a_pod_workload(self.engine, self.stack, pod, network="bridge")
        )
        await workload.watch()
        return Running(pod, workload, began)

    def _note(self, one: Running, seen: Event) -> None:
        (spiffe_id,) = seen["svids"]
        asked = _ms(seen["received_at"] - seen["asked_at"])
        self.facts.pods[one.pod.name] = {
            "uid": one.pod.uid,
            "container": one.workload.container.id,
            "spiffe_id": spiffe_id,
            "connect_to_svid_ms": asked,
        }
        self.screen.line(
            f"pod {one.pod.name} {one.pod.uid[:8]}…, container {_short(one)}, pid "
            f"{one.workload.pid}:"
        )
        self.screen.line(f"  {spiffe_id}  {asked:.1f} ms after it asked")

    async def _mutual_tls(self, web: Running, payments: Running) -> None:
        self.screen.step("Mutual TLS 1.3 from pod to pod, each checks the other's SPIFFE ID")
        client, server = web.workload, payments.workload
        await server.player.do("serve", expect=_id("/shop/web"))
        await server.player.expect("listening")
        address = await server.container.address()
        await client.player.do("connect", address=address, expect=_id("/shop/payments"))
        client_saw, server_saw = await asyncio.gather(
            client.player.expect("mtls"), server.player.expect("mtls")
        )
        self.facts.mtls = {
            "server_saw": server_saw["peer"],
            "client_saw": client_saw["peer"],
            "ms": _ms(client_saw["seconds"]),
        }
        self.screen.line(f"{address} answers: {client_saw['answer']}")

    async def _relabel(self, payments: Running) -> None:
        self.screen.step("payments-0 loses the label that its entry asks for")
        since = payments.workload.seen
        changed = time.monotonic()
        self.stack.cluster.relabel(payments.pod, {"tier": "tin"})
        lost = await payments.workload.denied(since=since)
        gone = time.monotonic()
        self.stack.cluster.relabel(payments.pod, {"tier": "gold"})
        back = await payments.workload.svids("/shop/payments", since=since)
        self.facts.relabelled = {
            "spiffe_id": _id("/shop/payments"),
            "kind": lost["kind"],
            "lost_ms": _ms(lost["received_at"] - changed),
            "back_ms": _ms(back["received_at"] - gone),
        }
        self.screen.line(
            f"its open stream ends {self.facts.relabelled['lost_ms']:.1f} ms later: "
            f"{lost['kind']}: {lost['text']}"
        )

    async def _recreate(self, web: Running, stack: AsyncExitStack) -> Running:
        self.screen.step("web-0 is deleted and made anew under the same name")
        since = web.workload.seen
        changed = time.monotonic()
        pod = self.stack.cluster.recreate_pod(web.pod)
        lost = await web.workload.denied(since=since)
        new = await self._start(pod, stack)
        seen = await new.workload.svids("/shop/web")
        if await web.workload.fetched():
            raise PlayerError("the container of the pod that is gone still gets an identity")
        self.facts.recreated = {
            "name": pod.name,
            "old_uid": web.pod.uid,
            "new_uid": pod.uid,
            "old_stream_ended_ms": _ms(lost["received_at"] - changed),
            "spiffe_id": next(iter(seen["svids"])),
            "old_container_gets": [],
            "new_connect_to_svid_ms": _ms(seen["received_at"] - seen["asked_at"]),
        }
        self.screen.line(
            f"{web.pod.uid}: its stream ended after "
            f"{self.facts.recreated['old_stream_ended_ms']:.1f} ms, though its process runs on"
        )
        self.screen.line(f"{pod.uid}: gets {self.facts.recreated['spiffe_id']}")
        return new

    async def _forge(self, web: Running) -> None:
        path = f"{pod_cgroup(web.pod.uid)}/{web.workload.container.id}"
        self.screen.step("An ordinary user's process puts itself into a copy of web-0's cgroup")
        async with self._forger(path) as forger:
            cgroup = Path(f"/proc/{forger.pid}/cgroup").read_text().splitlines()[-1]
            await forger.do("fetch")
            answer = await forger.expect("fetched")
            reason, text = await self._explained(forger.pid)
        if answer["svids"]:
            raise PlayerError("the forger got an identity")
        self.facts.forged = {
            "uid": FORGER,
            "cgroup": cgroup,
            "svids": [],
            "kind": answer["kind"],
            "explained": reason,
            "text": text,
        }
        self.screen.line(cgroup)
        self.screen.line(f"it is told: {answer['kind']}: {answer['text']}")
        why = [line.strip() for line in text.splitlines() if "k8s" in line and "cgroup" in line]
        self.screen.line(f"issuer explain: {why[0] if why else text.splitlines()[-1]}")

    @contextlib.asynccontextmanager
    async def _forger(self, path: str) -> AsyncIterator[Player]:
        with delegated(FORGER) as folder:
            command = (
                sys.executable, "-m", "demo.pods.forger", str(FORGER), str(folder), path,
            )  # fmt: skip
            role = Role("forger", command, {"PYTHONPATH": str(ROOT)}, None, ())
            async with Player(role, self.stack.agent.endpoint) as player:
                yield player

    async def _steal(self, web: Running) -> None:
        self.screen.step("The key of n2's agent is stolen, and used to ask for web-0 of n1")
        (entry,) = await self.stack.server.entries("/shop/web")
        own = self.stack.cluster.pod("web-1", "shop", "web", "n2")
        stolen = await thief.steal(self.stack, "n2", entry.id, web.pod.uid, own.uid)
        if not all(stolen[one] for one in ("own_pod_signed", "refused", "audited")):
            raise PlayerError(f"the stolen key was not refused and audited: {stolen}")
        self.facts.stolen = stolen
        self.screen.line(f"{stolen['agent']}")
        self.screen.line(f"asks for its own node's pod {own.uid}: signed")
        self.screen.line(f"asks for n1's pod {web.pod.uid}")
        self.screen.line(f"refused after {stolen['ms']:.1f} ms: {stolen['text']}")
        self.screen.line(f"on record: {stolen['event']}: {stolen['why']}")

    async def _explained(self, pid: int) -> tuple[str, str]:
        answer = await self.stack.agent.explain(pid)
        return answer.reason, answer.text


def _short(one: Running) -> str:
    return f"{one.workload.container.id[:12]}"


def _id(path: str) -> str:
    return f"spiffe://example.org{path}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
