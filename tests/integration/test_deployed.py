"""
The manifests, run: their settings, their accounts and rights, and what they tell one to type.

Server and agent run in this loop with what their ConfigMaps say, but for folders and ports of
the test's own; the stand-in API server has the RBAC objects as they are written.
"""

import asyncio
import contextlib
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from issuer.app import Server
from issuer.app import serve as serve_server
from spiffe_wire.k8s.rbac import AGENT_RULES, SERVER_RULES, Rules
from tests.support import manifests
from tests.support.endpoint import fetch, read
from tests.support.k8s.cluster import FakeCluster, Pod
from tests.support.placed import ClusterStack, ServerHere
from tests.support.stack import a_folder
from workload_api.agent.app import serve as serve_agent

BASE, EXAMPLE = manifests.written("base"), manifests.written("example")
NAMESPACE, SERVER, AGENT = "spiffe-issuer", "spiffe-issuer-server", "spiffe-issuer-agent"
NODE = manifests.FIELDS["spec.nodeName"]


def user(account: str) -> str:
    """The name by which an API server knows a service account."""
    return f"system:serviceaccount:{NAMESPACE}:{account}"


@dataclass
class Deployed:
    """What runs."""

    cluster: FakeCluster
    server: Server
    stack: ClusterStack

    async def type_at_the_server(self, command: str) -> str:
        """`kubectl exec` of `issuer` in the server's pod; returns what it prints."""
        socket = str(self.server.settings.admin_socket_path)
        words = [sys.executable, "-m", "issuer", *shlex.split(command), "--socket", socket]
        done = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        said, _ = await done.communicate()
        assert done.returncode == 0
        return said.decode()

    def asked(self, account: str) -> set[tuple[str, str, str]]:
        """Everything that an account asked, as RBAC names it; none of it was refused."""
        made = self.cluster.calls.of(user=user(account))
        assert {one.status for one in made} <= {200, 201}
        return {one.grant for one in made}


def grants(rules: Rules) -> set[tuple[str, str, str]]:
    """Rules, one verb each."""
    return {(verb, group, resource) for group, resource, verbs in rules for verb in verbs}


@contextlib.asynccontextmanager
async def deployed() -> AsyncIterator[Deployed]:
    """A cluster to which the manifests were applied, with one node."""
    async with contextlib.AsyncExitStack() as stack:
        before = os.umask(0o022)  # both daemons set the process's
        stack.callback(os.umask, before)
        os.umask(before)
        folder = stack.enter_context(a_folder())
        cluster = await stack.enter_async_context(FakeCluster("any"))
        cluster.apply(*BASE, *EXAMPLE)
        cluster.node(NODE)
        server = await stack.enter_async_context(serve_server(server_settings(cluster, folder)))
        here = ServerHere(server.settings.admin_socket_path, server.port)
        found = ClusterStack(folder, cluster, here)
        # As agent.yaml has it: the operator makes the ConfigMap, and the kubelet mounts it.
        made = Deployed(cluster, server, found)
        bundle = folder / "bundle.pem"
        bundle.write_text(await made.type_at_the_server("bundle show"))
        settings = agent_settings(cluster, folder, server.port, bundle)
        found.agent = await stack.enter_async_context(
            serve_agent(settings, read_cgroup=found.read_cgroup)
        )
        async with asyncio.timeout(10):
            while not found.agent.syncer.state.connected:
                await asyncio.sleep(0.005)
        await cluster.settled(count=7)
        yield made


def server_settings(cluster: FakeCluster, folder: Path) -> Any:
    """Those of the ConfigMap, as if in a pod of the server's account."""
    given = manifests.server_settings(BASE)
    token = cluster.account_token(NAMESPACE, SERVER)
    (known,) = given.clusters
    kubeconfig = cluster.kubeconfig(folder, token=token, name="server")
    return replace(
        given,
        data_dir=folder / "server",
        runtime_dir=folder / "r",
        bind_address="127.0.0.1",
        bind_port=0,
        clusters=(replace(known, kubeconfig=kubeconfig),),
        status=replace(given.status, host="127.0.0.1", port=0),
    )


def agent_settings(cluster: FakeCluster, folder: Path, port: int, bundle: Path) -> Any:
    """Those of the ConfigMap, as if in a pod of the DaemonSet."""
    given = manifests.agent_settings(BASE)
    (volume,) = (each for each in manifests.pod(BASE, AGENT)["volumes"] if "projected" in each)
    (source,) = volume["projected"]["sources"]
    projected = source["serviceAccountToken"]
    pod = cluster.pod("agent-x", NAMESPACE, AGENT, NODE)
    life = timedelta(seconds=projected["expirationSeconds"])
    token = folder / projected["path"]
    token.write_text(cluster.projected_token(pod, projected["audience"], life))
    kubernetes = replace(
        given.kubernetes,
        token_path=token,
        kubeconfig=cluster.kubeconfig(
            folder, token=cluster.account_token(NAMESPACE, AGENT), name="agent"
        ),
    )
    return replace(
        given,
        data_dir=folder / "agent",
        runtime_dir=folder / "a",
        workload_socket=folder / "w" / "workload.sock",
        admin_socket=folder / "a" / "admin.sock",
        kubernetes=kubernetes,
        server=replace(given.server, address="127.0.0.1", port=port, trust_bundle=bundle),
        status=replace(given.status, port=0),
    )


def a_pod_of(cluster: FakeCluster, deployment: str) -> Pod:
    """A pod as the example's Deployment makes it."""
    found = manifests.one(EXAMPLE, "Deployment", deployment)
    spec = found["spec"]["template"]
    return cluster.pod(
        f"{deployment}-1",
        found["metadata"]["namespace"],
        spec["spec"]["serviceAccountName"],
        NODE,
        labels=spec["metadata"]["labels"],
    )


async def test_what_is_deployed_gives_the_example_its_identity() -> None:
    """By the settings, accounts, rights and commands of the manifests, and by nothing else."""
    text = dict(manifests.pages())[manifests.FOLDER / "example" / "workload.yaml"]
    commands = re.findall(r"\$I (.+)", text)
    (wanted,) = re.findall(r"--spiffe-id (\S+/sa/web)", text)
    async with deployed() as made:
        for command in commands:
            await made.type_at_the_server(command)
        async with made.stack.process(a_pod_of(made.cluster, "web")) as caller:
            answer = await read(fetch(caller.stub))
        assert [one.spiffe_id for one in answer.svids] == [wanted]

        # All that RBAC grants was needed for that, and nothing was asked for in vain.
        assert made.asked(SERVER) == grants(SERVER_RULES)
        assert made.asked(AGENT) == grants(AGENT_RULES)
