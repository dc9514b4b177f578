"""
A trust domain over a cluster: server, agents of its nodes, and pods in real containers.

All is real but the API server, which is `tests.support.k8s`: server and agents are processes
that know it by kubeconfigs of their service accounts, with no right that our manifests do not
grant.  This machine is node ``n1``.
"""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spiffe_wire.k8s.rbac import AGENT_RULES, SERVER_RULES, Rules
from tests.support.contained import Workload, a_container, running
from tests.support.containers import Container, Engine, pod_cgroup
from tests.support.k8s import objects
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.stack import AgentProcess, ServerProcess

NAMESPACE, SERVER, AGENT = "spiffe", "spiffe-server", "spiffe-agent"
QUICK = {"no_identity_grace": "100ms"}
"""How long a stream without an identity is held in these tests."""


@dataclass
class PodStack:
    """What runs: see the module."""

    cluster: FakeCluster
    server: ServerProcess
    folder: Path
    agents: dict[str, AgentProcess] = field(default_factory=dict)

    @property
    def agent(self) -> AgentProcess:
        """That of this machine."""
        return self.agents["n1"]

    @property
    def sockets(self) -> Path:
        """The folder that pods find the Workload API in."""
        return self.agent.workload_socket.parent

    async def add_entry(self, path: str, *selectors: str, node: str = "n1") -> Any:
        """Add an entry below the agent of *node*."""
        return await self.server.add_entry(path, self.agents[node].agent_id, *selectors)

    async def new_agent(self, node: str, **changes: Any) -> AgentProcess:
        """The agent of a node, not started, with all that a pod of the DaemonSet finds."""
        cluster, folder = self.cluster, self.folder / node
        folder.mkdir(mode=0o711)
        pod = cluster.pod(f"{AGENT}-{node}", NAMESPACE, AGENT, node)
        token = folder / "spire-agent"
        token.write_text(cluster.projected_token(pod))
        token.chmod(0o600)
        access = cluster.account_token(NAMESPACE, AGENT)
        agent = AgentProcess(
            folder,
            self.server,
            {
                "node_attestor": "k8s_psat",
                "join_token_file": None,
                "kubernetes": {
                    "cluster": cluster.name,
                    "token_path": str(token),
                    "workloads": True,
                    "node_name": node,
                    "kubeconfig": str(cluster.kubeconfig(folder, token=access)),
                },
                "workloads": QUICK,
                **changes,
            },
        )
        self.agents[node] = agent
        return await agent.configure()


@contextlib.asynccontextmanager
async def a_cluster(**changes: Any) -> AsyncIterator[PodStack]:
    """A cluster and its server, not started; *changes* go into the server's settings."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(FakeCluster("demo"))
        for account, rules in ((SERVER, SERVER_RULES), (AGENT, AGENT_RULES)):
            cluster.service_account(NAMESPACE, account)
            subject = f"system:serviceaccount:{NAMESPACE}:{account}"
            cluster.grant(subject, *_rules(rules))
        # Every user of a node can reach the agent's socket; /tmp is too open for that (SEC-37).
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="si-", dir="/run"))
        )
        folder.chmod(0o711)
        place = folder / "s"
        place.mkdir(mode=0o711)
        access = cluster.account_token(NAMESPACE, SERVER)
        known = {
            "name": cluster.name,
            "kubeconfig": str(cluster.kubeconfig(place, token=access)),
            "service_account_allow_list": [f"{NAMESPACE}:{AGENT}"],
        }
        server = ServerProcess(place, {"clusters": [known], **changes})
        yield PodStack(cluster, server, folder)


@contextlib.asynccontextmanager
async def a_pod_stack(
    nodes: Sequence[str] = ("n1",), **changes: Any
) -> AsyncIterator[PodStack]:
    """A server of a cluster and the agents of *nodes*, which run on this machine."""
    async with a_cluster(**changes) as made, AsyncExitStack() as stack:
        stack.callback(made.server.process.close)
        await made.server.start()
        for node in nodes:
            agent = await made.new_agent(node)
            stack.callback(agent.process.close)
            await agent.start()
        yield made


def _rules(rules: Rules) -> list[dict[str, Any]]:
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for group, resource, verbs in rules
    ]


def a_pod(
    stack: PodStack, name: str = "web-1", *, containers: Sequence[str] = ("app",), **how: Any
) -> Pod:
    """A pod of this node whose containers are yet to start; *how* as `FakeCluster.pod`."""
    waiting = [objects.Container(one, waits=True) for one in containers]
    return stack.cluster.pod(name, containers=waiting, **how)


async def a_pod_container(
    engine: Engine, stack: PodStack, pod: Pod, *, known_as: str = "app", **how: Any
) -> Container:
    """
    A container of *pod*, not started; the API server knows it as *known_as*.

    With *known_as* empty it does not know it.  *how* as in `a_container`.
    """
    how.setdefault("cgroup", pod_cgroup(pod.uid))
    container = await a_container(engine, stack.sockets, **how)
    if known_as:
        stack.cluster.start_container(pod, known_as, container.id, scheme="docker")
    return container


@contextlib.asynccontextmanager
async def a_pod_workload(
    engine: Engine, stack: PodStack, pod: Pod, **how: Any
) -> AsyncIterator[Workload]:
    """A running container of *pod*; see `a_pod_container`."""
    async with running(await a_pod_container(engine, stack, pod, **how)) as workload:
        yield workload
