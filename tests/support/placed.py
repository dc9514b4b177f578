"""
Processes in pods, without containers: real processes, whose cgroup texts the test writes.

`a_cluster_stack` runs a server, an agent and the stand-in for an API server in the test's loop.
Everything is real from a process's `connect()` to its SVID but two: what ``/proc/<pid>/cgroup``
says, and who answers as the API server.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from spiffe_wire.k8s.rbac import AGENT_RULES, KUBELET_RULES, Rules
from spiffe_wire.pb import workloadapi_pb2_grpc
from spiffe_wire.pb.spiffe_issuer.v1 import agentadmin_pb2, agentadmin_pb2_grpc
from tests.support.children import a_connected_child, spoken_through
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.pods import NOWHERE
from tests.support.stack import TRUST_DOMAIN, ServerCalls, a_folder, channel_to, serving
from workload_api.agent import config
from workload_api.agent.app import Agent, serve

AGENT = "system:serviceaccount:spiffe:spiffe-agent"


@dataclass
class ServerHere(ServerCalls):
    """A server in this loop."""

    admin_socket: Path
    port: int


@dataclass
class ClusterStack:
    """A cluster, a server and the agent of node n1."""

    folder: Path
    cluster: FakeCluster
    server: ServerHere
    agent: Agent = field(init=False)
    agent_id: str = field(init=False)
    texts: dict[int, bytes] = field(default_factory=dict)
    """What ``/proc/<pid>/cgroup`` says, of processes that were placed somewhere."""

    @property
    def socket(self) -> Path:
        """The Workload API."""
        return self.agent.settings.workload_socket

    def read_cgroup(self, pid: int) -> bytes:
        """See `workload_api.attestors.cgroup.read_cgroup`."""
        return self.texts.get(pid, NOWHERE)

    def place(self, pid: int, pod: Pod, container: str = "app") -> None:
        """Put a process into a container."""
        self.texts[pid] = f"0::{pod.cgroup(container)}\n".encode()

    async def add_entry(self, path: str, *selectors: str, **fields: Any) -> Any:
        """Add an entry below the agent, and wait until the agent has it."""
        made = await self.server.add_entry(path, self.agent_id, *selectors, **fields)
        async with asyncio.timeout(5):
            while self.agent.cache.index.get(made.id) is None:
                await asyncio.sleep(0.002)
        return made

    async def explain(self, pid: int) -> Any:
        """What an operator is told of a process."""
        async with channel_to(self.agent.settings.admin_socket) as channel:
            return await agentadmin_pb2_grpc.AgentAdminStub(channel).ExplainProcess(
                agentadmin_pb2.ExplainProcessRequest(pid=pid)
            )

    @contextlib.asynccontextmanager
    async def process(
        self, pod: Pod | None = None, container: str = "app", text: bytes = b""
    ) -> AsyncIterator["Caller"]:
        """A process of its own that has connected, in a container or where *text* says."""
        with a_connected_child(self.socket) as (child, connection):
            if text:
                self.texts[child.pid] = text
            elif pod is not None:
                self.place(child.pid, pod, container)
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with (
                spoken_through(connection) as address,
                grpc.aio.insecure_channel(address, options) as channel,
            ):
                yield Caller(child.pid, workloadapi_pb2_grpc.SpiffeWorkloadAPIStub(channel))


@dataclass
class Caller:
    """A process, and the Workload API as it is served to that process."""

    pid: int
    stub: Any


@contextlib.asynccontextmanager
async def a_cluster_stack(
    *,
    kubelet: bool = False,
    start_cluster: bool = True,
    status_port: int = 0,
    grace: timedelta = timedelta(0),
    rights: Iterable[tuple[str, str, frozenset[str]]] | None = None,
    **changes: Any,
) -> AsyncIterator[ClusterStack]:
    """
    All of it on node n1; *changes* are fields of `Kubernetes`.

    *kubelet*: pods come from the kubelet of n1 alone, which is `cluster.kubelets["n1"]`.
    *grace*: for how long the agent holds back who is nobody.
    *rights*: what the agent may ask; what the manifests grant unless told otherwise.
    """
    if rights is None:
        rights = KUBELET_RULES if kubelet else AGENT_RULES
    with a_folder() as folder, _umask():
        async with contextlib.AsyncExitStack() as stack:
            cluster = FakeCluster("demo")
            await cluster.start()
            stack.push_async_callback(cluster.__aexit__, None, None, None)
            cluster.grant(AGENT, *rules_of(frozenset(rights)))
            if kubelet:
                made = await cluster.kubelet()
                changes = {
                    "pods_from": config.PodSource.KUBELET,
                    "kubelet_host": "127.0.0.1",
                    "kubelet_port": made.port,
                    **changes,
                }
            server = await stack.enter_async_context(serving(folder))
            here = ServerHere(server.settings.admin_socket_path, server.port)
            found = ClusterStack(folder, cluster, here)
            token = await here.join_token()
            settings = await _settings(found, grace, changes)
            settings = replace(settings, status=config.Status(port=status_port))
            if not start_cluster:
                await cluster.stop()
            found.agent = await stack.enter_async_context(
                serve(settings, token, read_cgroup=found.read_cgroup)
            )
            async with asyncio.timeout(5):
                while not found.agent.syncer.state.connected:
                    await asyncio.sleep(0.005)
            assert found.agent.node.svid is not None
            found.agent_id = found.agent.node.svid.spiffe_id.uri
            if start_cluster and not kubelet:
                await cluster.settled("pods")
            yield found


async def _settings(
    stack: ClusterStack, grace: timedelta, changes: Mapping[str, Any]
) -> config.AgentSettings:
    folder, cluster = stack.folder, stack.cluster
    bundle = folder / "bundle.pem"
    bundle.write_text(await stack.server.bundle_pem())
    token = cluster.account_token("spiffe", "spiffe-agent")
    kubernetes = config.Kubernetes(
        cluster="demo",
        workloads=True,
        node_name="n1",
        kubeconfig=cluster.kubeconfig(folder, token=token),
    )
    return config.AgentSettings(
        trust_domain=TRUST_DOMAIN,
        data_dir=folder / "agent",
        runtime_dir=folder / "a",
        workload_socket=folder / "w" / "workload.sock",
        admin_socket=folder / "a" / "admin.sock",
        kubernetes=replace(kubernetes, **changes),
        server=config.Server(port=stack.server.port, trust_bundle=bundle),
        workloads=config.Workloads(no_identity_grace=grace),
    )


def rules_of(rules: Rules) -> list[dict[str, Any]]:
    """Declared rights, as RBAC has them."""
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for group, resource, verbs in rules
    ]


@contextlib.contextmanager
def _umask() -> Iterator[None]:
    """An agent sets the process's; another test must not find it."""
    before = os.umask(0o022)
    os.umask(before)
    try:
        yield
    finally:
        os.umask(before)
